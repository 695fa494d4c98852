"""Benchmarks: each beside its baseline, round by round in turns, with a table of the ratios at the end.

`make bench` measures 2.6 GB of float32 in two ranks. Elsewhere each runs once and small, to see that it works.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rank_pool import RankPool

_results: list["Result"] = []


@dataclass(frozen=True)
class Result:
    """A figure, its goal, and what was compared."""

    what: str
    baseline: str
    ratio: float
    goal: str
    good: bool
    detail: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the size be chosen."""
    parser.addoption("--megabytes", type=int, default=2600, help="size of the benchmarks' state, in 10^6 bytes")


@pytest.fixture(scope="session")
def measuring(pytestconfig: pytest.Config) -> bool:
    """Whether figures are wanted, and not only to see that everything runs."""
    return pytestconfig.getoption("benchmark_enable")


@pytest.fixture(scope="module")
def pool(pytestconfig: pytest.Config, measuring: bool) -> Iterator[RankPool]:
    """Two ranks with a state."""
    ranks = RankPool(2, pytestconfig.getoption("megabytes") if measuring else 40)
    yield ranks
    ranks.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory-backed storage."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def memory_root() -> Iterator[Path]:
    """A directory in memory-backed storage for all tests of a module."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-") as directory:
        yield Path(directory)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory on a disk."""
    return tmp_path


@dataclass(frozen=True)
class Race:
    """Measures something against its baseline, in turns, so that both meet the same noise."""

    benchmark: BenchmarkFixture
    rounds: int

    def run(
        self,
        what: str,
        baseline: str,
        *,
        ours: Callable[[], float],
        theirs: Callable[[], float],
        between: Callable[[], object] = lambda: None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Run both in turns; the ratio is that of the medians.

        Args:
            what: is measured.
            baseline: what it is compared with.
            ours: does it, and returns the seconds that count.
            theirs: the same of the baseline.
            between: is called before each of them.
            at_least: the goal: how many times faster than the baseline.
            at_most: the goal: how many times the baseline's time.
        """
        mine: list[float] = []
        other: list[float] = []

        def prepare() -> None:
            between()
            other.append(theirs())
            between()

        def measure() -> None:
            mine.append(ours())

        for _ in range(self.rounds > 1):  # a first time for both: memory and files are used for the first time
            prepare()
            measure()
            mine.clear()
            other.clear()
        self.benchmark.group = baseline
        self.benchmark.pedantic(measure, setup=prepare, rounds=self.rounds, iterations=1)
        between()
        seconds, base = statistics.median(mine), statistics.median(other)
        ratio = base / seconds if at_least is not None else seconds / base
        goal = f"at least {at_least:g} x faster" if at_least is not None else f"at most {at_most:g} x its time"
        good = ratio >= at_least if at_least is not None else ratio <= (at_most or 0)
        self.benchmark.extra_info.update(baseline_s=base, ours_s=seconds, ratio=ratio, goal=goal)
        self.note(what, baseline, ratio, goal, good=good, detail=f"{seconds:.2f} s, {base:.2f} s")

    def note(self, what: str, baseline: str, ratio: float, goal: str, *, good: bool, detail: str) -> None:
        """Put a figure into the table."""
        if self.rounds > 1:
            _results.append(Result(what, baseline, ratio, goal, good, detail))


@pytest.fixture
def race(benchmark: BenchmarkFixture, measuring: bool) -> Race:
    """What measures."""
    return Race(benchmark, 5 if measuring else 1)


@pytest.fixture
def few(benchmark: BenchmarkFixture, measuring: bool) -> Race:
    """What measures where the baseline takes long."""
    return Race(benchmark, 2 if measuring else 1)


@pytest.fixture
def clean() -> Callable[..., Callable[[], None]]:
    """Make a function that deletes directories."""
    return lambda *directories: lambda: [shutil.rmtree(d, ignore_errors=True) for d in directories] and None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ratios, as the README shows them."""
    if not _results:
        return
    terminalreporter.section("ratios to the baseline in the same run")
    terminalreporter.line("| what | against | ratio | goal | medians |")
    terminalreporter.line("|---|---|---|---|---|")
    for r in _results:
        mark = "" if r.good else " (missed)"
        terminalreporter.line(f"| {r.what} | {r.baseline} | {r.ratio:.2f} | {r.goal}{mark} | {r.detail} |")
