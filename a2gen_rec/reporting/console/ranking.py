"""A ranked list as terminal tables, at most 100 columns wide where names allow it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from a2gen_rec.reporting.console.tables import new_table
from a2gen_rec.reporting.formatting import MISSING, format_probability, format_seconds

if TYPE_CHECKING:  # tables do not need torch
    from a2gen_rec.ranking.types import RankedList, ScoredCandidate

MAX_SIDE_BY_SIDE = 7
"""Maximum number of outcome and score columns next to a timeline."""


def ranking_tables(ranking: "RankedList") -> list[Table]:
    """Return the ranked candidates, with their most probable timelines if the model generates any.

    If there are many outcomes, the first table has only the sort key, and a second table has all outcomes. Otherwise
    no space would be left for the timelines.
    """
    candidates = ranking.candidates
    names = list(candidates[0].probability) if candidates else []
    main_names = (
        names
        if len(names) + (ranking.sort_by == "ensemble") <= MAX_SIDE_BY_SIDE
        else [name for name in names if name == ranking.sort_by]
    )
    title = f"user {ranking.user}: best {len(candidates):,} of {ranking.num_candidates:,} candidates"
    tables = [_candidates_table(ranking, main_names, new_table(title, _caption(ranking)), full=True)]
    if names != main_names:
        tables.append(_candidates_table(ranking, names, new_table("probabilities"), full=False))
    return tables


def _candidates_table(ranking: "RankedList", names: Sequence[str], table: Table, full: bool) -> Table:
    """Fill the table with the outcomes ``names`` and, if ``full``, score, watch time and timeline."""
    has_score = full and ranking.sort_by == "ensemble"
    has_watch = full and any(candidate.expected_watch_s is not None for candidate in ranking.candidates)
    has_timeline = full and any(candidate.timeline for candidate in ranking.candidates)
    sort_column = "score" if has_score else ranking.sort_by
    table.add_column("#", justify="right")
    table.add_column("item", overflow="fold")
    for name in [*(["score"] if has_score else []), *names, *(["watch"] if has_watch else [])]:
        header = Text(name.replace("_", "_\n"), style="underline" if name == sort_column else "")
        table.add_column(header, justify="right", no_wrap=True)
    if has_timeline:
        table.add_column("timeline", overflow="fold")
    for rank, candidate in enumerate(ranking.candidates, start=1):
        row: list[Text | str] = [_score(candidate)] if has_score else []
        row += [format_probability(candidate.probability[name]) for name in names]
        row += [format_seconds(candidate.expected_watch_s)] if has_watch else []
        row += [_timeline(candidate)] if has_timeline else []
        table.add_row(str(rank), _item(candidate), *row)
    return table


def _caption(ranking: "RankedList") -> str:
    keys = {"watch": "expected watch time", "ensemble": "ensemble score"}
    key = keys.get(ranking.sort_by, f"probability of {ranking.sort_by}") + (", ascending" if ranking.ascending else "")
    history = f"history: {ranking.history_length:,} impressions"
    if not ranking.user_known:
        history = "user not in the dataset: no history"
    unknown = f"\n? not in the dataset: {ranking.unknown_items:,} candidates" if ranking.unknown_items else ""
    return f"by {key} · {history}{unknown}"


def _item(candidate: "ScoredCandidate") -> Text:
    return Text(candidate.item) if candidate.known else Text.assemble(candidate.item, (" ?", "bold yellow"))


def _score(candidate: "ScoredCandidate") -> str:
    return MISSING if candidate.score is None else f"{candidate.score:+.4f}"


def _timeline(candidate: "ScoredCandidate") -> Text:
    if candidate.timeline_probability is None:
        return Text(MISSING)
    steps = [name if time is None else f"{name}@{_offset(time)}" for name, time in candidate.timeline]
    return Text.assemble(" → ".join(steps), (f" ({candidate.timeline_probability:.0%})", "dim"))


def _offset(seconds: float) -> str:
    return "0" if seconds == 0 else format_seconds(seconds)
