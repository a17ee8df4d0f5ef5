"""From a log of single actions, each with its own time, to impressions [ours].

A user's events on one item are one thread. An opening action opens an impression; what follows on the thread
belongs to it until an idle gap passes or a closing action ends it. Opening again inside an open impression
continues it; an action with no open impression is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from a2gen_rec.data.sql import quote_identifier, quote_literal


@dataclass(frozen=True)
class SessionizationRules:
    """What the values of the action column mean.

    Attributes:
        opening: value that opens an impression.
        actions: vocabulary name of an action to its value.
        idle_gap_s: an impression closes when the thread is silent for longer.
        closing: value that ends an impression and times its exit; empty: exits are not recorded.
    """

    open_event: str
    actions: Mapping[str, str]
    idle_gap_s: float
    close_event: str = ""


def impressions_from_events(events: str, rules: SessionizationRules, features: Sequence[str]) -> str:
    """SQL of impressions from the relation ``events`` (user_id, item_id, action, t_ms BIGINT and ``features``).

    Features are taken at the opening; of several openings at that moment, the greatest value.
    """
    # Events of one moment: the opening comes first, the closing last.
    values = [rules.open_event, *rules.actions.values()]
    rank = " ".join(f"WHEN {quote_literal(value)} THEN {place}" for place, value in enumerate(values))
    opens = f"action = {quote_literal(rules.open_event)}"
    closed = f"lag(action) OVER thread = {quote_literal(rules.close_event)}" if rules.close_event else "false"
    at = "".join(
        f", (min(t_ms) FILTER (action = {quote_literal(value)}) - opened_ms) / 1000 AS {quote_identifier(f'at_{name}')}"
        for name, value in rules.actions.items()
    )
    dwell = "'nan'::DOUBLE"
    if rules.close_event:
        exit_s = f"(min(t_ms) FILTER (action = {quote_literal(rules.close_event)}) - opened_ms) / 1000"
        dwell = f"coalesce({exit_s}, {dwell})"
    columns = [quote_identifier(name) for name in features]
    at_opening = "".join(f", max({name}) FILTER ({opens} AND t_ms = opened_ms) AS {name}" for name in columns)
    no_actions = "".join(f", NULL AS {quote_identifier(f'at_{name}')}" for name in rules.actions)
    listed = "".join(f", {name}" for name in columns)
    return f"""
        WITH ranked AS (
            SELECT *, CASE action {rank} ELSE {len(values)} END AS rank FROM {events}),
        threads AS (
            SELECT *, coalesce({closed} OR t_ms - lag(t_ms) OVER thread > {round(rules.idle_gap_s * 1000)}, true)
                AS begins
            FROM ranked WINDOW thread AS (PARTITION BY user_id, item_id ORDER BY t_ms, rank)),
        segments AS (
            SELECT *, sum(begins::INT) OVER (PARTITION BY user_id, item_id ORDER BY t_ms, rank
                ROWS UNBOUNDED PRECEDING) AS segment FROM threads),
        opened AS (
            SELECT *, min(t_ms) FILTER ({opens}) OVER (PARTITION BY user_id, item_id, segment) AS opened_ms
            FROM segments)
        SELECT user_id, item_id, opened_ms AS ts_ms, {dwell} AS dwell_s{at}{at_opening}, NULL AS drop_reason
        FROM opened WHERE t_ms >= opened_ms GROUP BY user_id, item_id, segment, opened_ms
        UNION ALL
        SELECT user_id, item_id, t_ms, 'nan'::DOUBLE{no_actions}{listed}, action || ' with no open impression'
        FROM opened WHERE opened_ms IS NULL OR t_ms < opened_ms"""
