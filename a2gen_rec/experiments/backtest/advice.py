"""Advice of a backtest: which policy, and what more frequent training is worth."""

import math

from a2gen_rec.experiments.backtest.comparison import BacktestComparison, PolicyResult
from a2gen_rec.experiments.differences import Difference

AUC_TOLERANCE = 0.003
"""Loss of mean AUC to the best policy below which the cheaper policy is advised."""


def advised_policy(comparison: BacktestComparison) -> PolicyResult | None:
    """Return the cheapest policy in training time whose mean AUC is within ``AUC_TOLERANCE`` of the best.

    None if nothing was compared: a single policy, a single day (which all policies evaluate with the same model), or no
    AUC.
    """
    known = [policy for policy in comparison.policies if math.isfinite(policy.auc["all"])]
    if len(known) < 2 or len(known[0].days) < 2:
        return None
    best = max(policy.auc["all"] for policy in known)
    near = [policy for policy in known if policy.auc["all"] >= best - AUC_TOLERANCE]
    return min(near, key=lambda policy: policy.cost.training_s)


def advice(comparison: BacktestComparison) -> str:
    """Return the advice: the policy, with its differences to retraining and to no training."""
    chosen = advised_policy(comparison)
    if chosen is None:
        return "No advice: it takes two policies, two days and an outcome with positives and negatives."
    actions = {
        "frozen": "Train once",
        "retrain": "Retrain from scratch",
        "warm": "Continue the model with each day (`--init-from`)",
        "replay": "Continue the model with each day and replayed windows (`--train.replay-share`)",
    }
    parts = [f"{actions[chosen.name]}: mean AUC {chosen.auc['all']:.4f}"]
    retrain, frozen = comparison.policy("retrain"), comparison.policy("frozen")
    if retrain is not None and retrain is not chosen:
        text = f"{_text(chosen, 'retrain')} against retraining"
        if retrain.cost.training_s:
            text += f" at {chosen.cost.training_s / retrain.cost.training_s:.0%} of its training time"
        parts.append(text)
    if frozen is not None and frozen is not chosen:
        parts.append(f"{_text(chosen, 'frozen')} against a model that is never trained again")
    sentence = ", ".join(parts) + "."
    if frozen is not None and frozen.auc_by_age and (last := frozen.auc_by_age[max(frozen.auc_by_age)]):
        age = max(frozen.auc_by_age)
        sentence += (
            f" At an age of {age} days, that model differs from {comparison.reference} by {format_difference(last)}."
        )
    return sentence


def _text(policy: PolicyResult, other: str) -> str:
    difference = policy.auc_differences[other]["all"]
    return "no difference known" if difference is None else format_difference(difference)


def format_difference(difference: Difference, digits: int = 4) -> str:
    """Return a difference with its interval, such as +0.0012 [−0.0003, +0.0027]."""
    values = (difference.value, difference.low, difference.high)
    value, low, high = (f"{number:+.{digits}f}".replace("-", "−") for number in values)
    return f"{value} [{low}, {high}]"
