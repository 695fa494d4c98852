"""A job on several nodes is one job: it trains as on one, and what ends it on one node ends it on all."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from node_support import Program, light_job, machines, node, unplug
from programs.probe import PROGRAMS, marked, wait_until, wait_until_gone
from worker_support import committed_steps, manifest, prepare_tiny, step_records, tiny_job, write_job

import tasks.node
from ckpt_core.errors import ArgumentError
from tasks import cards, nodes
from tasks.config import ComputeSettings, Job
from tasks.elastic import run_ranks
from tasks.nodes import Call, NodesFailedError, Note, RankNote, answer, read_call, run_once
from tasks.process import ChildFailedError
from tasks.torchrun import Meeting, RankFailure, RanksFailedError, run_torchrun


@pytest.fixture
def mark(request: pytest.FixtureRequest):
    """A name that all descendants of a test carry; none is left after it."""
    name = f"{request.node.name}-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    wait_until_gone(name, seconds=15)


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ranks_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that this process starts import the programs of these tests, and wait but briefly for notes."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setattr(nodes, "NOTE_S", 2.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Prepare the tiny text once."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


def eight_steps(prepared: dict[str, Any], store: Path, **compute: Any) -> Job:
    """Return a job of two checkpoints, saved while training waits, so that the first is there when a rank dies."""
    job = tiny_job(prepared, store, end_step=8)
    settings = {"device": "cpu", "async_save": False, **compute}
    return job.model_copy(update={"compute": ComputeSettings.model_validate(settings)})


@pytest.fixture(scope="module")
def survived(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[str]]:
    """Two ranks on one machine, of which one is killed after the first checkpoint; the job, and what was told."""
    store = tmp_path_factory.mktemp("survived") / "store"
    job = eight_steps(prepared, store, ranks=2, max_restarts=1, min_ranks=1, trainer="dying_worker")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROGRAMS))
        run_ranks(job, lines.append)
    return job, lines


def test_a_killed_rank_is_left_out_and_training_ends(survived: tuple[Job, list[str]]):
    """After SIGKILL to one of two ranks, one goes on from the newest commit, to the end.

    The log, the manifests' lineage, the card and the world size tell of it; each step is recorded once.
    """
    job, lines = survived
    [told] = [line for line in lines if line.startswith("going on")]
    assert told.startswith(
        "going on from step 4 with 1 ranks, 0 more restarts left: dying_worker: rank 1 of 2 was ended"
    )
    assert committed_steps(job) == [4, 8]
    before, after = (manifest(job, step).lineage for step in (4, 8))
    assert (before["hardware"]["world_size"], "restarts" in before) == (2, False)
    assert (after["hardware"]["world_size"], after["restarts"][0]["after_step"]) == (1, 4)
    assert [entry["step"] for entry in step_records(job)] == list(range(1, 9))
    shown = {step: cards.checkpoint(f"{job.store}/{job.run}/step_{step:010d}").text for step in (4, 8)}
    assert "| Restarts | after step 4: dying_worker: rank 1 of 2 was ended by SIGKILL" in shown[8]
    assert "Restarts" not in shown[4]


def test_two_machines_train_as_one_does(prepared, survived, tmp_path: Path, mark: str):
    """Two ranks on two machines that share a store and a network commit the bytes of two ranks on one.

    The first machine has rank 0, the other one prints the lines of its own; nothing but checkpoints is left.
    """
    job = eight_steps(prepared, tmp_path / "store", ranks=1, nodes=2, rendezvous="10.213.77.1:29400")
    with machines() as places:
        first, other = places.values()
        helper = node(tmp_path / "store", mark, prefix=other)
        starter = Program([*first, sys.executable, str(PROGRAMS / "first_node.py"), str(write_job(job))], mark)
        assert starter.close(120) == 0, starter.lines
        helper.wait_for("job to step 8: done")
        assert helper.end() == 128 + signal.SIGTERM
    assert "[rank 0] step 8/8  checkpoint" in " ".join(starter.lines)
    assert [line for line in [*starter.lines, *helper.lines] if "Traceback" in line] == []
    assert committed_steps(job) == [4, 8]
    assert manifest(job, 4).lineage["hardware"]["world_size"] == 2
    assert manifest(job, 4).files == manifest(survived[0], 4).files
    run = tmp_path / "store" / "tiny"
    assert not [path for path in run.iterdir() if path.name.startswith((".nodes-", "training."))]


@pytest.mark.usefixtures("ranks_path")
def test_a_rank_that_dies_on_another_node_ends_the_job_on_all(tmp_path: Path, mark: str, port: int):
    """The error names node, rank, signal and last lines; a restart calls the same nodes again, as often as allowed."""
    helper = node(tmp_path, mark)
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(NodesFailedError) as failed:
        run_ranks(light_job(tmp_path, port, "die", max_restarts=1), lines.append)
    assert time.monotonic() - started < 40
    message = str(failed.value).splitlines()
    assert message[0] == (
        f"node_rank: rank 1 of 2 on node {socket.gethostname()}-{helper.process.pid} was ended by SIGKILL, as the "
        "kernel does when memory runs out; its last lines:"
    )
    assert message[1] == "rank 1 of 2, does die"
    assert lines.count("[rank 0] rank 0 of 2, does die") == 2
    assert [line for line in lines if line.startswith("going on from the start with 2 x 1 ranks, 0 more")]
    helper.wait_for("job to step 4: failed")
    assert helper.lines.count("[rank 1] rank 1 of 2, does die") == 2
    assert helper.end() == 128 + signal.SIGTERM


@pytest.mark.usefixtures("ranks_path")
def test_a_node_that_is_lost_is_told_and_left_out(tmp_path: Path, mark: str, port: int):
    """SIGKILL to a node ends its ranks and the others'; the job goes on with the ranks that are left."""
    helper = node(tmp_path, mark)
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "[rank 0] rank 0 of 2, does wait":
            helper.process.kill()

    run_ranks(light_job(tmp_path, port, "wait", until=1, max_restarts=1, min_ranks=1), on_line)
    name = f"{socket.gethostname()}-{helper.process.pid}"
    assert (
        "going on from the start with 1 ranks, 0 more restarts left: node_rank: node "
        f"{name} is gone: it does not tell how its ranks ended"
    ) in lines
    assert lines[-1] == "[rank 0] rank 0 of 1, does wait"
    assert helper.close() == -signal.SIGKILL


@pytest.mark.long
def test_a_machine_that_is_stopped_commits_first(prepared: dict[str, Any], tmp_path: Path, mark: str):
    """TERM to one of two machines has both commit the step that they are at; the other one goes on from it."""
    job = tiny_job(prepared, tmp_path / "store", end_step=100, checkpoint_every=100, evaluate_every=100)
    two = {"ranks": 1, "nodes": 2, "rendezvous": "10.213.77.1:29400", "max_restarts": 1, "min_ranks": 1}
    job = job.model_copy(update={"compute": ComputeSettings.model_validate({"device": "cpu", **two})})
    with machines() as places:
        first, other = places.values()
        helper = node(tmp_path / "store", mark, prefix=other)
        starter = Program([*first, sys.executable, str(PROGRAMS / "first_node.py"), str(write_job(job))], mark)
        starter.wait_for("[rank 0] step 1/100", seconds=180)
        assert helper.end() == 128 + signal.SIGTERM
        assert starter.close(240) == 0, starter.lines
    at, end = committed_steps(job)
    assert (1 <= at < 100, end) == (True, 100)
    [restart] = manifest(job, 100).lineage["restarts"]
    assert (restart["after_step"], restart["nodes"], restart["ranks"]) == (at, 1, 1)
    assert restart["reason"].endswith("left: it was told to stop")


@pytest.mark.usefixtures("ranks_path")
def test_a_job_that_is_stopped_is_stopped_on_all_nodes(tmp_path: Path, mark: str, port: int):
    """A cancellation of the first node ends the ranks of the others, which wait for the next job."""
    helper = node(tmp_path, mark)

    def on_line(line: str) -> None:
        if line == "[rank 0] rank 0 of 2, does wait":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(light_job(tmp_path, port, "wait", max_restarts=1), on_line)
    stopped = time.monotonic()
    helper.wait_for("job to step 4: failed: node_rank: this node's ranks were stopped: the ", seconds=30)
    print(f"{time.monotonic() - stopped:.1f} s later")
    wait_until(lambda: modules(mark) == ["tasks.node", "tasks.zygote"])  # which waits with its node, and has no fork
    assert helper.end() == 128 + signal.SIGTERM


def modules(mark: str) -> list[str]:
    """Return what a test's processes run."""
    return sorted(command.split(" -m ")[1].split()[0] for command in marked(mark).values())


@pytest.mark.long
def test_a_machine_that_falls_silent_is_left_out(tmp_path: Path, mark: str):
    """Without its cable a machine is missed after 15 s without a sign of life; it ends its own ranks, too."""
    with machines() as places:
        first, other = places.values()
        job = light_job(tmp_path, 29400, "wait", until=1, rendezvous="10.213.77.1:29400", max_restarts=1, min_ranks=1)
        helper = node(tmp_path, mark, prefix=other)
        starter = Program([*first, sys.executable, str(PROGRAMS / "first_node.py"), str(write_job(job))], mark)
        starter.wait_for("[rank 0] rank 0 of 2, does wait")
        unplug(other)
        silent = time.monotonic()
        assert starter.close(120) == 0, starter.lines
        print(f"went on {time.monotonic() - silent:.0f} s after the cable was pulled")
        assert any("going on from the start with 1 ranks" in line for line in starter.lines)
        helper.wait_for("job to step 4: left: torchrun of node_rank ended with exit code 1", seconds=120)
        assert any("the node that started the job does not answer" in line for line in helper.lines)
        print(f"the other machine's ranks ended {time.monotonic() - silent:.0f} s after")
        assert helper.end() == 128 + signal.SIGTERM


@pytest.mark.usefixtures("ranks_path")
def test_nodes_that_do_not_come_are_an_error(tmp_path: Path, port: int):
    """The job fails when it has waited long enough, and says for how many nodes."""
    meeting = Meeting(f"127.0.0.1:{port}", 2, host=True, wait_s=1)
    with pytest.raises(RanksFailedError, match=r"^node_rank: .*: fewer than 2 nodes came within 1 s$"):
        run_torchrun("node_rank", ["-"], ranks=1, on_line=print, run_id="job", meeting=meeting)


def test_a_rendezvous_that_cannot_be_reached_is_an_error_that_names_it():
    """A name that no machine has is told before anything is started."""
    meeting = Meeting("no-such-machine.invalid:29400", 2, host=False)
    with pytest.raises(ArgumentError, match=r"^rendezvous no-such-machine\.invalid:29400: cannot be reached from here"):
        run_torchrun("node_rank", ["-"], ranks=1, on_line=print, run_id="job", meeting=meeting)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch):
    """Stand in for a machine's share of a job; the test says how it ends."""
    ends: list[BaseException] = []

    def run(*arguments: object, **options: object) -> None:
        if ends:
            raise ends.pop()

    monkeypatch.setattr(nodes, "run_torchrun", run)
    monkeypatch.setattr(nodes, "NOTE_S", 0.0)
    return ends


def call_for(job, directory: Path) -> Call:
    """Put out a call, as the first node does, and return it."""
    call = Call(id="0123", job=job)
    (directory / ".nodes-0123").mkdir(parents=True)
    return call


def note_of(directory: Path) -> Note:
    """Return the only note of a call."""
    [path] = (directory / ".nodes-0123").iterdir()
    return Note.model_validate_json(path.read_bytes())


def test_a_node_tells_how_its_share_ended(tmp_path: Path, shares: list[BaseException]):
    """Ranks that failed are in its note with their last lines; a torchrun that did makes the node one that left."""
    call = call_for(light_job(tmp_path, 1, "end"), tmp_path)
    assert answer(tmp_path, call, print).state == "done"
    shares.append(RanksFailedError("the story", [RankFailure(3, -9, "last\nlines")]))
    answer(tmp_path, call, print)
    assert note_of(tmp_path).failures == [RankNote(rank=3, code=-9, lines="last\nlines")]
    shares.append(ChildFailedError("torchrun ended"))
    answer(tmp_path, call, print)
    assert (note_of(tmp_path).state, note_of(tmp_path).reason) == ("left", "torchrun ended")


def test_a_node_that_is_stopped_tells_that_it_left(tmp_path: Path, shares: list[BaseException]):
    """TERM to a node is no failure of its ranks; the exception passes."""
    call = call_for(light_job(tmp_path, 1, "end"), tmp_path)
    shares.append(SystemExit(143))
    with pytest.raises(SystemExit):
        answer(tmp_path, call, print)
    assert note_of(tmp_path).state == "left"


def test_an_error_tells_of_all_nodes_likely_causes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rank that a signal ended comes before those whose connection to it broke; a node that left counts as lost."""
    monkeypatch.setattr(nodes, "NOTE_S", 0.0)
    job = light_job(tmp_path, 1, "end", nodes=4, ranks=2)
    broken = RankFailure(0, 1, "Connection closed by peer"), RankFailure(1, 1, "Connection closed by peer")

    def share(*arguments: object, **options: object) -> None:
        [directory] = (tmp_path / "tiny").glob(".nodes-*")
        died = Note(node="b", state="failed", failures=[RankNote(rank=3, code=-9, lines="step 7")])
        for number, note in enumerate([died, Note(node="c", state="left"), Note(node="d", state="done")]):
            (directory / f"{number}.json").write_text(note.model_dump_json())
        raise RanksFailedError("here", broken)

    monkeypatch.setattr(nodes, "run_torchrun", share)
    with pytest.raises(NodesFailedError) as failed:
        run_once(job, print)
    lines = str(failed.value).splitlines()
    assert lines[0] == "node_rank: node c left: it was told to stop"
    assert lines[1].startswith("rank 3 of 8 on node b was ended by SIGKILL")
    assert lines[3].startswith(f"rank 0 of 8 on node {nodes.node_name()} ended with exit code 1")
    assert [failure.rank for failure in failed.value.failures] == [3, 0, 1]
    assert failed.value.lost == 1


def test_a_call_is_out_only_while_the_job_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It says where to meet and what to train, and goes however the job ends, with the notes of a flow that died."""
    job = light_job(tmp_path, 29400, "end")
    (tmp_path / "tiny" / ".nodes-old").mkdir(parents=True)
    seen: list[Call | None] = []

    def share(*arguments: object, **options: object) -> None:
        seen.append(read_call(tmp_path / "tiny"))
        raise KeyboardInterrupt

    monkeypatch.setattr(nodes, "run_torchrun", share)
    with pytest.raises(KeyboardInterrupt):
        run_once(job, print)
    assert seen[0] is not None
    assert seen[0].job == job
    assert list((tmp_path / "tiny").iterdir()) == []


def test_a_store_that_is_no_directory_is_an_error(capsys: pytest.CaptureFixture[str]):
    """A node says so, and ends."""
    assert tasks.node.main(["s3://bucket/store", "tiny"]) == 1
    assert "s3://bucket/store" in capsys.readouterr().out


def test_a_call_that_is_none_is_not_answered(tmp_path: Path):
    """A file that is missing or half is no call."""
    assert read_call(tmp_path) is None
    (tmp_path / "training.json").write_text('{"id": "0')
    assert read_call(tmp_path) is None
