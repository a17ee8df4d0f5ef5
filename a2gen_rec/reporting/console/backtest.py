"""Results of a backtest as a terminal table."""

from rich.table import Table

from a2gen_rec.experiments.backtest.advice import advice, format_difference
from a2gen_rec.experiments.backtest.comparison import BacktestComparison
from a2gen_rec.experiments.differences import Difference
from a2gen_rec.reporting.console.tables import new_metrics_table
from a2gen_rec.reporting.formatting import MISSING


def backtest_table(comparison: BacktestComparison) -> list[Table | str]:
    """Return the policies with their differences to the reference, and the advice."""
    others = [name for name in ("retrain", "frozen") if comparison.policy(name) is not None]
    caption = f"means over days; 95% intervals over {comparison.users:,} users; training without the first one"
    headers = [
        "mean\nAUC",
        *(f"difference\nto {name}" for name in others),
        "MAE,\nlog1p s",
        "new\nitems",
        "training,\ns",
    ]
    table = new_metrics_table("backtest", caption, *headers)
    for policy in comparison.policies:
        table.add_row(
            policy.name,
            f"{policy.auc['all']:.4f}",
            *(_cell(policy.auc_differences.get(name, {}).get("all")) for name in others),
            f"{policy.mae_log['all']:.4f}",
            f"{policy.auc['new items']:.4f}",
            f"{policy.cost.training_s:,.0f}",
        )
    return [table, advice(comparison)]


def _cell(difference: Difference | None) -> str:
    return MISSING if difference is None else format_difference(difference)
