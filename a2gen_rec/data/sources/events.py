"""Impressions from a log with one event per row [ours].

A user's events on one item form a thread. An open event starts an impression. Later events of the thread belong to it
until an idle gap or a close event ends it. A repeated open event continues the impression. An action without an open
impression is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from a2gen_rec.data.sql import quote_identifier, quote_literal

OPENED = '"start of impression"'


@dataclass(frozen=True)
class SessionizationRules:
    """Meaning of the values of the action column.

    Attributes:
        open_event: value that starts an impression.
        actions: action name -> value.
        idle_gap_s: maximum seconds between two events of one impression.
        close_event: value that ends an impression and sets the exit time; empty if exits are not recorded.
    """

    open_event: str
    actions: Mapping[str, str]
    idle_gap_s: float
    close_event: str = ""


def impressions_from_events(events: str, rules: SessionizationRules, features: Sequence[str]) -> str:
    """Return the SQL of impressions from the relation ``events`` (user_id, item_id, action, t_ms and ``features``).

    Features come from the open event; with several open events at that time, from the maximum value.
    """
    # Order of simultaneous events: open event first, close event last.
    values = [rules.open_event, *rules.actions.values()]
    ranks = " ".join(f"WHEN {quote_literal(value)} THEN {rank}" for rank, value in enumerate(values))
    is_open = f"action = {quote_literal(rules.open_event)}"
    was_closed = f"lag(action) OVER thread = {quote_literal(rules.close_event)}" if rules.close_event else "false"
    at = "".join(
        f", (min(t_ms) FILTER (action = {quote_literal(value)}) - {OPENED}) / 1000 AS {quote_identifier(f'at_{name}')}"
        for name, value in rules.actions.items()
    )
    dwell = "'nan'::DOUBLE"
    if rules.close_event:
        exit_s = f"(min(t_ms) FILTER (action = {quote_literal(rules.close_event)}) - {OPENED}) / 1000"
        dwell = f"coalesce({exit_s}, {dwell})"
    columns = [quote_identifier(name) for name in features]
    open_values = "".join(f", max({name}) FILTER ({is_open} AND t_ms = {OPENED}) AS {name}" for name in columns)
    no_actions = "".join(f", NULL AS {quote_identifier(f'at_{name}')}" for name in rules.actions)
    feature_columns = "".join(f", {name}" for name in columns)
    return f"""
        WITH ranked AS (
            SELECT *, CASE action {ranks} ELSE {len(values)} END AS "rank of event" FROM {events}),
        threads AS (
            SELECT *, coalesce({was_closed} OR t_ms - lag(t_ms) OVER thread > {round(rules.idle_gap_s * 1000)}, true)
                AS "starts impression"
            FROM ranked WINDOW thread AS (PARTITION BY user_id, item_id ORDER BY t_ms, "rank of event")),
        segments AS (
            SELECT *, sum("starts impression"::INT) OVER (PARTITION BY user_id, item_id ORDER BY t_ms, "rank of event"
                ROWS UNBOUNDED PRECEDING) AS "segment of thread" FROM threads),
        opened AS (
            SELECT *, min(t_ms) FILTER ({is_open}) OVER (PARTITION BY user_id, item_id, "segment of thread") AS {OPENED}
            FROM segments)
        SELECT user_id, item_id, {OPENED} AS ts_ms, {dwell} AS dwell_s{at}{open_values}, NULL AS drop_reason
        FROM opened WHERE t_ms >= {OPENED} GROUP BY user_id, item_id, "segment of thread", {OPENED}
        UNION ALL
        SELECT user_id, item_id, t_ms, 'nan'::DOUBLE{no_actions}{feature_columns}, action || ' with no open impression'
        FROM opened WHERE {OPENED} IS NULL OR t_ms < {OPENED}"""
