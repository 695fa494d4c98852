"""Retention is a pure function: it keeps what it was asked to, and never gives up what must stay."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.errors import ArgumentError
from ckpt_core.retention import Retention, StepFacts, check_metric, kept

VALUES = st.none() | st.floats() | st.integers(-3, 3) | st.booleans() | st.text(max_size=2) | st.just(10**400)


@st.composite
def runs(draw):
    """Some steps of a run, in any order."""
    steps = draw(st.lists(st.integers(0, 30), unique=True, max_size=12))
    return [StepFacts(s, {} if draw(st.booleans()) else {"loss": draw(VALUES)}, draw(st.booleans())) for s in steps]


@st.composite
def policies(draw):
    """Any policy."""
    best = draw(st.integers(0, 4))
    return Retention(
        keep_last=draw(st.integers(1, 5)),
        keep_best=best,
        metric="loss" if best else None,
        mode=draw(st.none() | st.sampled_from(["min", "max"])) if best else None,
        keep_every=draw(st.none() | st.integers(1, 7)),
    )


PINNED = st.sets(st.integers(0, 30), max_size=4)
CHAMPION = st.none() | st.integers(0, 30)


def steps_of(losses):
    """Steps 0, 1, ... with these losses."""
    return [StepFacts(step, {"loss": loss}) for step, loss in enumerate(losses)]


class TestProperties:
    """What holds for any run and any policy."""

    @given(runs(), policies(), PINNED, CHAMPION)
    def test_what_always_stays(self, run, policy, pinned, champion):
        """The newest valid step, pinned ones, the champion and damaged ones stay; nothing else comes into being."""
        keep = kept(run, policy, pinned=pinned, champion=champion)
        numbers = {fact.step for fact in run}
        valid = [fact.step for fact in run if fact.valid]
        assert keep <= numbers
        assert not valid or max(valid) in keep
        assert pinned & numbers <= keep
        assert champion not in numbers or champion in keep
        assert {fact.step for fact in run if not fact.valid} <= keep

    @given(runs(), policies(), PINNED, CHAMPION, st.randoms(use_true_random=False))
    def test_order_does_not_matter(self, run, policy, pinned, champion, random):
        """The same steps in another order give the same answer."""
        shuffled = random.sample(run, len(run))
        assert kept(shuffled, policy, pinned=pinned, champion=champion) == kept(
            run, policy, pinned=pinned, champion=champion
        )

    @given(runs(), policies(), st.sampled_from(["keep_last", "keep_best"]))
    def test_more_keeps_more(self, run, policy, name):
        """Asking for one more of the last or the best never gives up a step that stayed before."""
        more = {name: getattr(policy, name) + 1, "metric": "loss" if name == "keep_best" else policy.metric}
        assert kept(run, policy) <= kept(run, dataclasses.replace(policy, **more))

    @given(runs(), policies(), PINNED, CHAMPION)
    def test_twice_is_once(self, run, policy, pinned, champion):
        """Of the steps that stay, the same policy gives up none."""
        keep = kept(run, policy, pinned=pinned, champion=champion)
        left = [fact for fact in run if fact.step in keep]
        assert kept(left, policy, pinned=pinned, champion=champion) == keep

    @given(runs(), policies())
    def test_the_best_are_the_best(self, run, policy):
        """No step that is given up has a better metric than one that stays among the best, and only numbers rank."""
        only_best = dataclasses.replace(policy, keep_every=None)
        sign = -1 if policy.mode == "max" else 1
        ranked = {
            fact.step: sign * fact.metrics["loss"]
            for fact in run
            if fact.valid and type(fact.metrics.get("loss")) in {int, float}
            and (isinstance(fact.metrics["loss"], int) or math.isfinite(fact.metrics["loss"]))
        }  # fmt: skip
        keep = kept(run, only_best)
        given_up = [ranked[step] for step in ranked if step not in keep]
        stayed = sorted(ranked[step] for step in ranked if step in keep)
        assert len(stayed) >= min(policy.keep_best, len(ranked))
        assert not given_up or not policy.keep_best or min(given_up) >= stayed[policy.keep_best - 1]


class TestCases:
    """Policies one by one."""

    def test_last(self):
        """The newest steps stay, counted without damaged ones."""
        run = [StepFacts(step, valid=step != 8) for step in range(10)]
        assert kept(run, Retention(keep_last=2)) == {7, 8, 9}
        assert kept(run, Retention(keep_last=3)) == {6, 7, 8, 9}

    def test_best(self):
        """The best by a metric stay; of equal ones the newer; NaN, infinite and missing ones never."""
        losses = [2.0, 1.0, math.nan, 1.0, -math.inf, None, 3.0, True]
        assert kept(steps_of(losses), Retention(keep_last=1, keep_best=1, metric="loss")) == {3, 7}
        assert kept(steps_of(losses), Retention(keep_last=1, keep_best=2, metric="loss")) == {1, 3, 7}
        assert kept(steps_of(losses), Retention(keep_last=1, keep_best=1, metric="loss", mode="max")) == {6, 7}
        assert kept(steps_of(losses), Retention(keep_last=1, keep_best=9, metric="loss")) == {0, 1, 3, 6, 7}
        assert kept(steps_of(losses), Retention(keep_last=1, keep_best=9, metric="accuracy")) == {7}

    @pytest.mark.parametrize(
        ("metric", "mode", "best"),
        [
            ("accuracy", None, 1), ("eval_accuracy", None, 1), ("val/F1", None, 1), ("rougeL", None, 1),
            ("loss", None, 0), ("heldout_loss", None, 0), ("eval/perplexity", None, 0), ("test_WER", None, 0),
            ("loss", "max", 1), ("my_score", "max", 1), ("my_score", "min", 0),
        ],
    )  # fmt: skip
    def test_the_direction_is_the_metrics_own(self, metric, mode, best):
        """Accuracy is maximised and a loss minimised by name; of any other metric the caller has to say which."""
        run = [StepFacts(0, {metric: 0.1}), StepFacts(1, {metric: 0.9}), StepFacts(2, {metric: 0.5})]
        assert kept(run, Retention(keep_last=1, keep_best=1, metric=metric, mode=mode)) == {best, 2}

    def test_every(self):
        """Every multiple stays."""
        assert kept([StepFacts(step) for step in range(10)], Retention(keep_last=1, keep_every=4)) == {0, 4, 8, 9}

    @pytest.mark.parametrize(
        "wrong",
        [
            {"keep_last": 0},
            {"keep_last": -1},
            {"keep_last": 1, "keep_best": -1},
            {"keep_last": 1, "keep_best": 1},
            {"keep_last": 1, "metric": "loss"},
            {"keep_last": 1, "keep_best": 1, "metric": "loss", "mode": "best"},
            {"keep_last": 1, "keep_every": 0},
            {"keep_last": True},
            {"keep_last": 2.0},
            {"keep_last": "3"},
            {"keep_last": 1, "keep_best": True, "metric": "loss"},
            {"keep_last": 1, "keep_every": 1.5},
            {"keep_last": 1, "mode": "max"},
            {"keep_last": 1, "keep_best": 1, "metric": ""},
            {"keep_last": 1, "keep_best": 1, "metric": "my_score"},
            {"keep_last": 1, "keep_best": 1, "metric": "loss_of_hearing"},
            {"keep_last": 1, "keep_best": 1, "metric": "accuracy", "mode": "min"},
            {"keep_last": 1, "keep_best": 1, "metric": "perplexity", "mode": "max"},
        ],
    )
    def test_policies_that_are_none(self, wrong):
        """A policy that would keep nothing, says half of something or contradicts itself is refused when it is made."""
        with pytest.raises(ArgumentError, match=r"keep_|mode|metric="):
            Retention(**wrong)

    def test_numbers_of_other_types(self):
        """Integers of numpy are integers, and huge ones keep everything."""
        assert Retention(keep_last=np.int64(3), keep_every=np.int32(2)) == Retention(keep_last=3, keep_every=2)
        run = [StepFacts(step) for step in range(3)]
        assert kept(run, Retention(keep_last=10**30, keep_every=10**30)) == {0, 1, 2}


class TestMetric:
    """Whether a run's steps can be ranked."""

    BEST = Retention(keep_last=1, keep_best=1, metric="loss")

    @pytest.mark.parametrize("losses", [[None, None], [math.nan, math.inf], [1.0, True], [1.0, "0.5"], [[1.0], 2.0]])
    def test_steps_that_cannot_be_ranked(self, losses):
        """A metric that no step has as a finite number, or that is no number in one of them, is an error."""
        with pytest.raises(ArgumentError, match="is not known"):
            check_metric(steps_of(losses), self.BEST)

    def test_a_misspelt_name(self):
        """The error names the metrics that there are."""
        with pytest.raises(ArgumentError, match=r"no step has a finite one.*the steps have accuracy, loss"):
            check_metric(
                [StepFacts(1, {"loss": 1.0, "accuracy": 2, "note": "x"})],
                dataclasses.replace(self.BEST, metric="los", mode="min"),
            )

    @pytest.mark.parametrize("run", [[], steps_of([1.0, None, math.nan]), [StepFacts(1, {"loss": "x"}, valid=False)]])
    def test_steps_that_can(self, run):
        """One that has it is enough, and a run without whole steps has nothing to rank."""
        check_metric(run, self.BEST)
