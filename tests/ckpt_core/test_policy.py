"""Which of two models is served: decided by figures, and said in a sentence."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.errors import ArgumentError
from ckpt_core.policy import Policy, decide

LOSS = Policy()
ACCURACY = Policy("accuracy", "higher", margin=0.25)
NO_FIGURE = [{}, {"heldout_loss": None}, *({"heldout_loss": float(text)} for text in ("nan", "inf", "-inf"))]


def decided(policy, challenger, champion, **options):
    """Decide between two figures of the policy's metric; None is no champion."""
    other = None if champion is None else {policy.metric: champion}
    return decide(policy, {policy.metric: challenger, "other": 9.0}, other, **options)


@pytest.mark.parametrize(
    ("policy", "challenger", "champion", "promote", "reason"),
    [
        (LOSS, 2.0, 2.5, True, "The challenger's heldout_loss is 2, the champion's 2.5; it is better by 0.5."),
        (LOSS, 2.5, 2.0, False, "The challenger's heldout_loss is 2.5, the champion's 2; it is worse by 0.5."),
        (LOSS, 2.0, 2.0, False, "The challenger's heldout_loss is 2, the champion's 2; equal is not better."),
        (LOSS, 2.0, None, True, "The challenger's heldout_loss is 2, and there is no champion."),
        (
            ACCURACY, 0.625, 0.5, False,
            "The challenger's accuracy is 0.625, the champion's 0.5; it is better by 0.125, less than the margin of "
            "0.25.",
        ),
        (ACCURACY, 0.75, 0.5, True, "The challenger's accuracy is 0.75, the champion's 0.5; it is better by 0.25."),
        (ACCURACY, 0.5, 0.75, False, "The challenger's accuracy is 0.5, the champion's 0.75; it is worse by 0.25."),
    ],
)  # fmt: skip
def test_a_better_figure_wins_by_the_margin(policy, challenger, champion, promote, reason):
    """What is better by no less than the margin wins; the reason is a sentence with both figures."""
    found = decided(policy, challenger, champion)
    assert (found.promote, found.reason) == (promote, reason)
    assert (found.metric, found.challenger, found.champion) == (policy.metric, challenger, champion)


@pytest.mark.parametrize("figures", NO_FIGURE, ids=str)
@pytest.mark.parametrize("champion", [None, {"heldout_loss": 2.0}, {"heldout_loss": float("nan")}, {}], ids=str)
def test_what_has_no_finite_figure_never_wins(figures, champion):
    """NaN, an infinity or a missing figure is refused, whatever is served, and even where it is the same content."""
    for same in (False, True):
        found = decide(LOSS, figures, champion, same=same)
        assert not found.promote
        assert "no finite figure cannot win" in found.reason


@pytest.mark.parametrize("champion", NO_FIGURE, ids=str)
def test_any_finite_figure_beats_a_champion_without_one(champion):
    """A champion that diverged, or was not measured, loses to a figure, and the sentence says so."""
    found = decide(LOSS, {"heldout_loss": 99.0}, champion)
    assert found.promote
    assert found.reason.endswith("which cannot win.")


def test_the_same_content_stays():
    """An equal figure wins where it is the same content, whatever the margin."""
    found = decided(ACCURACY, 0.5, 0.5, same=True)
    assert found.promote
    assert found.reason == "The challenger's accuracy is 0.5, the champion's 0.5; both are the same content."


@given(st.sampled_from(["lower", "higher"]), st.floats(0, 1e3), st.floats(), st.floats())
def test_two_models_never_beat_each_other(direction, margin, one, other):
    """Of two finite figures at most one wins against the other, so releases cannot go round in a circle."""
    policy = Policy("score", direction, margin)
    wins = [decided(policy, a, b) for a, b in ((one, other), (other, one))]
    assert not all(win.promote and "which cannot win" not in win.reason for win in wins)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heldout_loss", "smaller"), "direction 'smaller': expected 'lower' or 'higher'"),
        (("accuracy", "lower"), "direction 'lower': a higher accuracy is the better one"),
        (("score",), "metric 'score': whether a lower or a higher one is better is not known"),
        (("perplexity", "higher"), "direction 'higher': a lower perplexity is the better one"),
        (("score", "higher", -1.0), "margin -1.0: expected 0 or more, in the unit of score"),
        (("score", "higher", float("nan")), "margin nan"),
        (("score", "higher", float("inf")), "margin inf"),
    ],
)
def test_a_wrong_policy_is_refused(arguments, message):
    """A direction that is none, or the wrong one of a known metric, and a margin that is none, are told by name."""
    with pytest.raises(ArgumentError, match=message):
        Policy(*arguments)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("accuracy", "higher"), ("heldout_loss", "lower"), ("eval_f1", "higher"), ("wer", "lower")],
)
def test_the_direction_is_the_metrics_own(metric, direction):
    """It may be left out where the name says it."""
    assert Policy(metric).direction == direction


def test_deciding_needs_no_torch():
    """Importing policy and evaluation loads neither torch nor transformers nor numpy."""
    code = "import sys, ckpt_core.policy, ckpt_core.evaluation; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy"} & set(loaded)
