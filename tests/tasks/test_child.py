"""A child process with a JSON result."""

import os

import pytest
from programs.probe import PROGRAMS

from tasks.child import RESULT, run_json, write_result
from tasks.process import ChildFailedError


def answer(*args: str, lines: list[str] | None = None):
    """The result of `programs/answer.py`."""
    path = os.pathsep.join([str(PROGRAMS), str(PROGRAMS.parents[2])])
    return run_json("answer", args, on_line=([] if lines is None else lines).append, env={"PYTHONPATH": path})


def test_a_result_comes_back():
    """What the child's function returns is what `run_json` returns; its lines are handed out."""
    lines: list[str] = []
    assert answer("good", "a", "b c", lines=lines) == {"words": ["a", "b c"], "loss": 0.5}
    assert lines == ["working"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("damaged", "step_0000000500: no manifest; delete the step"),
        ("bad value", "rate is -1; expected more than 0"),
    ],
)
def test_an_error_for_people_comes_back_as_it_is(kind, message):
    """A reported error is its message alone, without a traceback."""
    with pytest.raises(ChildFailedError) as caught:
        answer(kind)
    assert str(caught.value) == message


def test_a_crash_comes_back_with_its_traceback():
    """An exception that nobody meant for people shows its last lines."""
    with pytest.raises(ChildFailedError, match=r"(?s)^answer ended with exit code 1; .*\nKeyError: 'lost'$"):
        answer("crash")


def test_a_child_killed_after_its_result_has_failed():
    """A result counts only together with a good end."""
    with pytest.raises(ChildFailedError, match=r"^answer was ended by SIGKILL"):
        answer("killed after its result")


def test_a_child_without_a_result_has_failed():
    """A good end counts only together with a result."""
    with pytest.raises(ChildFailedError, match=r"^answer ended well but left no JSON result; .*\nworking$"):
        answer("nothing")


def test_a_broken_result_is_no_result():
    """What is not JSON in the result's place is an error that names the child."""
    with pytest.raises(ChildFailedError, match=r"^answer ended well but left no JSON result"):
        answer("broken")


def test_the_last_result_counts(tmp_path, monkeypatch):
    """A second result replaces the first one, whole."""
    monkeypatch.setenv(RESULT, str(tmp_path / "result"))
    write_result({"step": 1})
    write_result({"step": 2})
    assert (tmp_path / "result").read_text() == '{"step": 2}'
    assert list(tmp_path.iterdir()) == [tmp_path / "result"]


def test_a_person_sees_the_result(monkeypatch, capsys):
    """A module that is started by hand prints its result."""
    monkeypatch.delenv(RESULT, raising=False)
    write_result([1, 2])
    assert capsys.readouterr().out == "[1, 2]\n"
