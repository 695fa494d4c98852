"""Copies of states in host memory: right, apart from what they were made of, and made in the same memory each time."""

import pytest
import torch
from gloo_ranks import run_ranks, values
from small_models import assert_same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ckpt_core.buffers import HostBuffers


def state():
    """Return a nested state with tensors of several forms."""
    return {
        "w": torch.arange(6.0).reshape(2, 3),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "part": torch.arange(10.0)[2:5],
        "every other": torch.arange(10.0)[::2],
        "expanded": torch.ones(1).expand(3),
        "empty": torch.empty(0, 2),
        "step": torch.tensor(3.0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "names": ["w"]}],
    }


def pointers(staged):
    """Return where the tensors of a dict lie."""
    return {name: value.data_ptr() for name, value in staged.items() if isinstance(value, torch.Tensor)}


def test_a_copy_is_the_state_as_it_was():
    """A copy has every value, and changes of the original, in tensors and in lists, do not reach it."""
    live = state()
    staged = HostBuffers().stage(live)
    assert_same(staged, {**state(), "conjugate": torch.tensor([1 - 2j])})
    for name in ("w", "transposed", "part", "step"):
        live[name].zero_()
    live["groups"][0]["names"].append("v")
    live["groups"][0]["lr"] = 0.2
    assert_same(staged, {**state(), "conjugate": torch.tensor([1 - 2j])})


def test_a_gradient_is_not_recorded():
    """The copy of a parameter is a plain tensor that needs no gradient and has no history."""
    staged = HostBuffers().stage({"w": torch.nn.Parameter(torch.ones(2))})["w"]
    assert type(staged) is torch.Tensor
    assert not staged.requires_grad
    assert staged.grad_fn is None


def test_memory_is_reused_while_nothing_but_values_changes():
    """The second copy lies where the first one did, also when other tensors came or went."""
    buffers = HostBuffers()
    first = pointers(buffers.stage(state()))
    changed = {**state(), "w": torch.full((2, 3), 7.0), "new": torch.ones(2)}
    staged = buffers.stage(changed)
    assert {name: pointer for name, pointer in pointers(staged).items() if name != "new"} == first
    assert torch.equal(staged["w"], changed["w"])


@pytest.mark.parametrize(
    "other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).t()], ids=str
)
def test_another_form_gets_other_memory(other):
    """A tensor of another shape, type or order in memory is copied whole, in its own form; the rest stays."""
    buffers = HostBuffers()
    first = pointers(buffers.stage(state()))
    staged = buffers.stage({**state(), "w": other})
    assert_same(staged["w"], other)
    assert staged["w"].stride() == other.stride()
    assert {**pointers(staged), "w": 0} == {**first, "w": 0}


def test_a_tensor_that_occurs_twice_is_copied_once():
    """Tied weights share one copy; a view of another shape has one of its own."""
    w = torch.arange(6.0).reshape(2, 3)
    staged = HostBuffers().stage(({"head": w.detach(), "embed": w}, {"flat": w.view(-1)}))
    assert staged[0]["head"] is staged[0]["embed"]
    assert staged[1]["flat"].data_ptr() != staged[0]["embed"].data_ptr()
    assert_same(staged[1]["flat"], w.view(-1))


def test_weights_that_are_tied_no_more_are_copied_apart():
    """After two names shared a tensor, and so its copy, each name's own tensor is copied whole."""
    buffers = HostBuffers()
    w = torch.ones(2)
    buffers.stage({"a": w, "b": w})
    staged = buffers.stage({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})
    assert_same(staged, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})


def test_sparse_tensors_are_copied_too():
    """What has no plain memory is copied anew each time."""
    sparse = torch.eye(3).to_sparse()
    staged = HostBuffers().stage([sparse])[0]
    sparse.values().zero_()
    assert torch.equal(staged.to_dense(), torch.eye(3))


def stage_shards():
    """Return what a rank's copies of a sharded matrix are: kind, shard, form, and whether the memory was reused."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Shard(0)])
    buffers = HostBuffers()
    first = buffers.stage([sharded])[0]
    place = first.to_local().data_ptr()
    sharded.to_local().add_(100)
    kept = first.to_local().clone()
    second = buffers.stage([sharded])[0]
    form = (type(first) is DTensor, first.placements == sharded.placements, tuple(first.shape))
    return kept, second.to_local().clone(), form, second.to_local().data_ptr() == place


def test_sharded_tensors_stay_sharded():
    """The copy of a DTensor is one with the same placement over a copy of its shard, in the same memory each time."""
    whole = torch.arange(15.0).reshape(5, 3)
    for found, shard in zip(values(run_ranks(2, stage_shards)), (whole[:3], whole[3:]), strict=True):
        assert_same(list(found[:2]), [shard, shard + 100])
        assert found[2:] == ((True, True, (5, 3)), True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_for_gpus_is_pinned():
    """What comes from a GPU lies in pinned host memory, reused, and is complete when `stage` returns."""
    buffers = HostBuffers()
    w = torch.zeros(1 << 24, device="cuda")
    first = buffers.stage([w])[0].data_ptr()
    for number in range(5):
        w.fill_(number)
        staged = buffers.stage([w])[0]
        w.fill_(-1)
        assert staged.is_pinned()
        assert staged.data_ptr() == first
        assert bool((staged == number).all())
