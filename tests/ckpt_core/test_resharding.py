"""States saved on one mesh and loaded on another: FSDP2 alone, FSDP2 with tensor parallelism, and no mesh at all."""

import math
from pathlib import Path
from typing import Any

import pytest
import sharded_meshes
from gloo_ranks import run_ranks, values
from small_models import assert_same

MESHES = [(2,), (3,), (2, 2)]


@pytest.fixture(scope="module", params=MESHES, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return where ranks on a mesh saved, and the whole state that they had."""
    directory = tmp_path_factory.mktemp("saved")
    ranks = run_ranks(math.prod(request.param), sharded_meshes.save, directory, request.param, seconds=120)
    return directory, values(ranks)[0]


@pytest.mark.parametrize("mesh", [(3,), (2, 2), (1, 2)], ids=str)
def test_another_mesh_has_the_same_state(saved: tuple[Path, Any], mesh: tuple[int, ...]) -> None:
    """Model and optimizer come back bit for bit on any mesh, by both interfaces, where nothing divides evenly."""
    directory, expected = saved
    for found in values(run_ranks(math.prod(mesh), sharded_meshes.load, directory, mesh, seconds=120))[0]:
        assert_same(found, expected)


def test_no_mesh_has_the_same_state(saved: tuple[Path, Any]) -> None:
    """One process without a group restores what ranks on a mesh saved."""
    directory, expected = saved
    for found in sharded_meshes.load(directory, ()):
        assert_same(found, expected)


def test_there_is_something_to_compare(saved: tuple[Path, Any]) -> None:
    """The saved state is not that of the models that it is loaded into."""
    model, _ = sharded_meshes.build((), seed=1, steps=1)
    assert not torch_equal(saved[1][0]["up.weight"], model.up.weight)


def torch_equal(one: Any, other: Any) -> bool:
    """Whether two tensors are the same."""
    return bool((one == other).all())
