"""Advice of a backtest: which policy, and what more frequent training is worth."""

from a2gen_rec.experiments.backtest.comparison import BacktestComparison, PolicyResult
from a2gen_rec.experiments.differences import Difference

AUC_TOLERANCE = 0.003
"""Loss of mean AUC to the best policy below which the cheaper policy is advised."""


def advised_policy(comparison: BacktestComparison) -> PolicyResult:
    """Return the cheapest policy in training time whose mean AUC is within ``AUC_TOLERANCE`` of the best."""
    best = max(policy.auc["all"] for policy in comparison.policies)
    near = [policy for policy in comparison.policies if policy.auc["all"] >= best - AUC_TOLERANCE]
    return min(near, key=lambda policy: policy.cost.training_s)


def advice(comparison: BacktestComparison) -> str:
    """Return one sentence: the advised policy, with its differences to retraining and to no training."""
    chosen = advised_policy(comparison)
    actions = {
        "frozen": "Train once",
        "retrain": "Retrain from nothing",
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
        text = f"{_text(chosen, 'frozen')} against a model that is never trained again"
        if frozen.auc_by_age and (last := frozen.auc_by_age[max(frozen.auc_by_age)]):
            text += f" (at an age of {max(frozen.auc_by_age)} days, it is at {format_difference(last)})"
        parts.append(text)
    return ", ".join(parts) + "."


def _text(policy: PolicyResult, other: str) -> str:
    difference = policy.auc_differences[other]["all"]
    return "no difference known" if difference is None else format_difference(difference)


def format_difference(difference: Difference, digits: int = 4) -> str:
    """Return a difference with its interval, such as +0.0012 [−0.0003, +0.0027]."""
    values = (difference.value, difference.low, difference.high)
    value, low, high = (f"{number:+.{digits}f}".replace("-", "−") for number in values)
    return f"{value} [{low}, {high}]"
