"""Directions of metrics by name: whether a lower or a higher value is the better one."""

from __future__ import annotations

import re
from typing import Literal, get_args

from ckpt_core.errors import ArgumentError
from ckpt_core.evaluation import METRICS

Direction = Literal["lower", "higher"]

# Only names whose direction nobody disputes: for any other the caller has to say, since a wrong guess deletes the best.
_LOWER = """
    bits_per_byte bpb bits_per_character bits_per_token cer cross_entropy error_rate eval_loss fid log_loss loss
    mae mape mean_absolute_error mean_squared_error mse nll perplexity ppl rmse root_mean_squared_error ter wer
"""
_HIGHER = """
    acc accuracy acc_norm auc auroc average_precision balanced_accuracy bleu chrf exact_match f1 f1_score iou macro_f1
    matthews_correlation mcc mean_iou mean_reward meteor micro_f1 mrr ndcg pearson pearsonr precision r2 recall reward
    roc_auc rouge1 rouge2 rougel rougelsum sacrebleu spearman spearmanr token_accuracy top_1_accuracy top_5_accuracy
    top1_accuracy top5_accuracy win_rate
"""
_CONVENTIONS: dict[str, Direction] = {
    **dict.fromkeys(_LOWER.split(), "lower"),
    **dict.fromkeys(_HIGHER.split(), "higher"),
}
_DATA_SET = re.compile(r"(?:best|eval|heldout|held_out|mean|test|train|training|val|valid|validation)[_/.:-]")
"""What such a name often begins with: it says what was measured on, which does not change the direction."""


def direction_of(metric: str, given: str | None = None) -> Direction:
    """Return which way a metric is better: as given, or as its name is commonly understood.

    Args:
        metric: its name.
        given: `lower` or `higher`, where the caller says so.

    Raises:
        ArgumentError: `given` is another word, or contradicts one of this library's own metrics; or nothing was given
            and the name is not a common one.
    """
    own = METRICS.get(metric)
    if given is not None:
        if given not in get_args(Direction):
            raise ArgumentError(f"direction {given!r}: expected 'lower' or 'higher', which of them is better")
        if own and own.direction != given:
            raise ArgumentError(f"direction {given!r}: a {own.direction} {metric} is the better one")
        return "lower" if given == "lower" else "higher"
    found = own.direction if own else _common(metric)
    if found is None:
        raise ArgumentError(f"metric {metric!r}: whether a lower or a higher one is better is not known; say which.")
    return found


def _common(metric: str) -> Direction | None:
    """Return the direction of a common metric, whatever data set its name begins with."""
    name = metric.lower()
    while name not in _CONVENTIONS:
        prefix = _DATA_SET.match(name)
        if prefix is None:
            return None
        name = name[prefix.end() :]
    return _CONVENTIONS[name]
