"""Results as tables for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a table of numbers needs no torch
    from a2gen_rec.serving.rank import Candidate, Ranking

NONE = "–"
BETTER = "bold green"


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of an evaluation (see ``training.evaluate.evaluate``): actions, and times where any are recorded.

    Values better than their trivial reference stand out: a model's ranking and probability metrics against the
    item's smoothed rate on training data, times against the training median.
    """
    tables = [_actions_table(result)]
    if result["time"]:
        tables.append(_times_table(result))
    return tables


def ranking_table(ranking: "Ranking", top: int) -> Table:
    """The first ``top`` candidates of a ranking, best first."""
    shown = ranking.candidates[:top]
    table = _table(
        f"best {len(shown):,} of {len(ranking.candidates):,} candidates for user {ranking.user}",
        _about(ranking),
        compact=True,
    )
    names = list(shown[0].probability) if shown else []
    watched = any(candidate.expected_watch_s is not None for candidate in shown)
    table.add_column("#", justify="right")
    table.add_column("item", overflow="fold")
    for name in [*names, *(["watch"] if watched else [])]:
        header = Text(name.replace("_", "_\u200b"), style="bold" if name == ranking.by else "")
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("most probable timeline", ratio=1, overflow="fold")
    for place, candidate in enumerate(shown, start=1):
        chances = [_percent(candidate.probability[name], 1) for name in names]
        watch = [_seconds(candidate.expected_watch_s)] if watched else []
        table.add_row(str(place), _item(candidate), *chances, *watch, _timeline(candidate))
    return table
