"""What ranks exchange, so that all of them succeed or all of them fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Outcome, attempt, run_ranks, values

from ckpt_core import io, ranks
from ckpt_core.errors import StepExistsError


class UnpicklableError(Exception):
    """An error that cannot be carried to another process."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one)
        self.other = other
        self.handle = open(Path(__file__))  # noqa: PTH123, SIM115 - something that cannot be pickled

    def __reduce__(self) -> Any:
        self.handle.close()
        return super().__reduce__()


def on_rank(number: int, error: Exception) -> int:
    """Return this rank's number, or raise on one rank."""
    if dist.get_rank() == number:
        raise error
    return dist.get_rank()


def exchange() -> dict[str, Outcome]:
    """Call each function once in each way; return this rank's outcomes."""
    taken = StepExistsError("step 1 exists")
    odd = UnpicklableError("odd", "one")
    return {
        "numbers": Outcome((ranks.rank(), ranks.world_size(), ranks.group() is not None)),
        "gather": Outcome(ranks.gather(dist.get_rank() * 10)),
        "each": Outcome(ranks.each(lambda: dist.get_rank() * 2)),
        "together": Outcome(ranks.together(lambda: on_rank(5, taken))),
        "first": Outcome(ranks.first(lambda: on_rank(5, taken))),
        "each fails": attempt(ranks.each, lambda: on_rank(1, taken)),
        "together fails": attempt(ranks.together, lambda: on_rank(2, taken)),
        "first fails": attempt(ranks.first, lambda: on_rank(0, taken)),
        "first, which would fail elsewhere": attempt(ranks.first, lambda: on_rank(1, taken)),
        "odd": attempt(ranks.together, lambda: on_rank(1, odd)),
        "all fail": attempt(ranks.together, lambda: on_rank(dist.get_rank(), ValueError(f"rank {dist.get_rank()}"))),
    }


def test_three_ranks_succeed_or_fail_together() -> None:
    """Each rank gets every rank's, its own or the first rank's value; an error on one rank is raised on all of them."""
    found = values(run_ranks(3, exchange))
    for number, outcomes in enumerate(found):
        assert outcomes["numbers"].value == (number, 3, True)
        assert outcomes["gather"].value == [0, 10, 20]
        assert outcomes["each"].value == [0, 2, 4]
        assert outcomes["together"].value == number
        assert outcomes["first"].value == 0
        assert outcomes["first, which would fail elsewhere"] == Outcome(0)
        for name in ("each fails", "together fails", "first fails"):
            assert outcomes[name].errors[0] == "StepExistsError", name
            assert outcomes[name].text == "step 1 exists", name
        assert "odd" in outcomes["odd"].text
        assert outcomes["all fail"].text == f"rank {number}"


def save_by_two(directory: Path) -> list[Any]:
    """Let the last two of three ranks act as a group: exchange values, fail, and save what both have."""
    pair = dist.new_group([1, 2], backend="gloo")
    said: list[Any] = [ranks.gather(dist.get_rank())]
    if dist.get_rank() > 0:
        with ranks.within(pair):
            assert ranks.group() is pair
            said += [ranks.rank(), ranks.world_size(), ranks.gather(dist.get_rank()), ranks.first(dist.get_rank)]
            said.append(attempt(ranks.first, lambda: on_rank(1, ValueError("one"))).text)
            said.append(sorted(io.save({"w": torch.ones(2), "v": torch.ones(3)}, directory)))
    return [*said, ranks.group() is dist.group.WORLD, ranks.world_size()]


def test_a_group_acts_alone(tmp_path: Path) -> None:
    """Within a group its ranks are numbered, exchange, fail and save without the others; afterwards all act again."""
    first, second, third = values(run_ranks(3, save_by_two, tmp_path / "dcp"))
    assert first == [[0, 1, 2], True, 3]
    common = [2, [1, 2], 1, "one"]
    assert second == [[0, 1, 2], 0, *common, [".metadata", "__0_0.distcp"], True, 3]
    assert third == [[0, 1, 2], 1, *common, ["__1_0.distcp"], True, 3]
    target = {"w": torch.zeros(2), "v": torch.zeros(3)}
    io.load(target, tmp_path / "dcp")
    assert target["w"].tolist() + target["v"].tolist() == [1.0] * 5


def test_one_process_is_the_only_rank() -> None:
    """Without a process group each function runs here alone, and its error is raised as it is."""
    assert (ranks.rank(), ranks.world_size(), ranks.group() is not None) == (0, 1, False)
    assert ranks.gather("a") == ["a"]
    assert ranks.each(lambda: 1) == [1]
    assert ranks.together(lambda: None) is None
    assert ranks.first(lambda: "b") == "b"
    error = StepExistsError("taken")
    for function in (ranks.each, ranks.together, ranks.first):
        with pytest.raises(StepExistsError) as caught:
            function(lambda: on_no_rank(error))
        assert caught.value is error


def on_no_rank(error: Exception) -> None:
    """Raise."""
    raise error
