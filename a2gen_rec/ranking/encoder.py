"""Raw impressions to what the model reads, by the very SQL and functions that ``prepare`` applies to the whole log.

One query is a few milliseconds whether of one impression or of a thousand: impressions are encoded when they are
added, never while candidates are ranked. What a vocabulary has is looked up beforehand, so that no query reads one.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from hashlib import blake2b
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from a2gen_rec.artifact.artifact import IDENTIFIERS
from a2gen_rec.artifact.entity_index import EntityIndex
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.features import encodings, feedback
from a2gen_rec.data.features.calendar import calendar_feature, features_from_time
from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.sessions import impression_end_ms
from a2gen_rec.data.prepare import staging
from a2gen_rec.data.prepare.windows import action_lists
from a2gen_rec.data.schema import ITEM_ID, DatasetCard, Feature, FeatureSpec
from a2gen_rec.data.sql import ROW_COLUMN, quote_identifier, quote_literal
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.history import EncodedHistory, merge_histories
from a2gen_rec.ranking.types import Impression, Value

SQL_TYPES = {"buckets": "DOUBLE", "vocabulary": "VARCHAR", "hash": "VARCHAR"}
CACHE_SIZE = 4096
"""Sets of raw values whose rows are kept: those of requests recur."""


class ImpressionEncoder:
    """Rows of raw values as a dataset's ``prepare`` makes them.

    Args:
        vocabularies: vocabulary feature -> raw value -> row; identifiers aside, which the catalogue has.
        items: of the dataset.
        keep: most impressions of a history that matter to the model.

    Raises:
        DataError: the card does not tell how context features came of time.
    """

    def __init__(
        self, card: DatasetCard, vocabularies: Mapping[str, Mapping[str, int]], items: EntityIndex, max_history: int
    ) -> None:
        self.card, self.vocabularies, self.catalogue, self.keep = card, vocabularies, items, max_history
        self.connection = duckdb.connect(":memory:", config={"threads": 1, "enable_external_access": False})
        self.connection.execute("SET enable_progress_bar = false")
        self.from_time = features_from_time(card)
        self.shown = [feature for feature in _raw_features(card, "item", "context") if feature.name != ITEM_ID]
        self.moment = _raw_features(card, "context")
        self.given = {feature.name: feature for feature in self.shown if feature.name not in self.from_time}
        self.of_context = {feature.name: feature for feature in self.moment if feature.name not in self.from_time}
        users = _raw_features(card, "user")
        self.about_users = {feature.name: feature for feature in users if feature.name != IDENTIFIERS["user"]}
        self._query = self._impressions_query()
        self._remembered: dict[tuple[object, ...], dict[str, int]] = {}

    def history(self, impressions: Sequence[Impression], after: EncodedHistory | None = None) -> EncodedHistory:
        """See :meth:`Ranker.encode`."""
        self.check(impressions)
        before = self.empty_history() if after is None else after
        latest = {(each.ts_ms, each.item): each for each in impressions}
        if not latest:
            return before
        fresh = [latest[key] for key in sorted(latest)]
        columns = self._columns(fresh)
        unplaced = np.zeros(len(fresh), np.int64)
        made = EncodedHistory(columns, [each.item for each in fresh], _action_states(columns), unplaced)
        return merge_histories(before, made, self.card, self.keep)

    def empty_history(self) -> EncodedHistory:
        """The history of a user without any."""
        return EncodedHistory(WindowColumns.empty(self.card), [], [], np.zeros(0, np.int64))

    def context(self, now_ms: int, values: Mapping[str, Value]) -> dict[str, int]:
        """Context feature -> row of those given and of those computed from time."""
        if not values and not self.from_time:
            return {}
        hour_ms = 3_600_000
        offset_ms = round(self.card.utc_offset_hours * hour_ms)
        # Features of time change with the hour at most.
        return self._rows_of(values, self.of_context, (now_ms + offset_ms) // hour_ms * hour_ms - offset_ms)

    def user(self, values: Mapping[str, Value]) -> dict[str, int]:
        """User feature -> row of those given."""
        return self._rows_of(values, self.about_users, None) if values else {}

    def check_values(self, context: Mapping[str, Value], user: Mapping[str, Value]) -> None:
        """Raise a UserError for a request's first feature that is not of this dataset, or not of its kind."""
        _check_values(context, self.of_context, "context of the request")
        _check_values(user, self.about_users, "user of the request")

    def check(self, impressions: Sequence[Impression]) -> None:
        """Raise a UserError for the first impression that cannot be of this dataset."""
        events = set(self.card.predicted_actions)
        for each in impressions:
            where = f"impression of {each.item!r} at {each.ts_ms}"
            names = [name for name, _ in each.actions]
            for name in names:
                if name not in events:
                    raise UserError(f"{where}: no action {name!r}; there are {', '.join(self.card.predicted_actions)}")
            if len(set(names)) < len(names):
                raise UserError(f"{where}: has an action twice")
            times = [seconds for _, seconds in each.actions] + [each.watch_s]
            if any(seconds is not None and not 0 <= seconds < math.inf for seconds in times):
                raise UserError(f"{where}: a time is not a number of seconds of at least 0")
            _check_values(each.features, self.given, where)

    def _rows_of(self, values: Mapping[str, Value], known: Mapping[str, Feature], ts_ms: int | None) -> dict[str, int]:
        """Rows of raw values and, at a time, of the features computed from it."""
        key = (ts_ms, *sorted((name, repr(value)) for name, value in values.items()))
        found = self._remembered.get(key)
        if found is None:
            from_time = [feature for feature in self.moment if feature.name in self.from_time and ts_ms is not None]
            features = [known[name] for name in values] + from_time
            relation = _relation([("ts_ms", "BIGINT"), *_raw_columns(features, self.from_time)])
            made = [
                f"{calendar_feature(each.name, self.card.utc_offset_hours)} AS {quote_identifier(each.name)}"
                for each in from_time
            ]
            moment = f"(SELECT {', '.join(['*', *made])} FROM ({relation}))"
            query = encode_relation(moment, self._encodings(features), ["raw.ts_ms"])
            arguments = [[ts_ms]]
            for feature in features:
                if feature.name not in self.from_time:
                    arguments += self._arguments(feature, [values[feature.name]])
            rows = self._run(query, arguments)
            found = {feature.name: int(rows[feature.name][0]) for feature in features}
            if len(self._remembered) >= CACHE_SIZE:
                self._remembered.clear()
            self._remembered[key] = found
        return found

    def _columns(self, impressions: Sequence[Impression]) -> WindowColumns:
        """A window of its own for each impression, in their order; session features are yet to come."""
        places = self.catalogue.lookup([each.item for each in impressions])
        rule = self.card.feedback
        arguments: list[list[Any]] = [
            [each.ts_ms for each in impressions],
            [each.watch_s for each in impressions],
        ]
        happened = [{name: math.nan if at is None else at for name, at in each.actions} for each in impressions]
        arguments += [[times.get(name) for times in happened] for name in self.card.predicted_actions]
        for feature in self.shown:
            if feature.name in self.from_time:
                continue
            raw = [each.features.get(feature.name) for each in impressions]
            if rule is not None and feature.name == rule.duration_feature and len(self.catalogue.duration_s):
                lengths = self.catalogue.duration_s[places]
                raw = [
                    value if feature.name in each.features else float(length)
                    for value, each, length in zip(raw, impressions, lengths, strict=True)
                ]
            arguments += self._arguments(feature, raw)
        rows = self._run(self._query, arguments)
        return self._as_windows(impressions, places, rows)

    def _as_windows(
        self, impressions: Sequence[Impression], places: np.ndarray, rows: Mapping[str, np.ndarray]
    ) -> WindowColumns:
        card, count = self.card, len(impressions)
        ids = self.catalogue.rows_at(places)
        for feature in self.shown:
            own = rows[ROW_COLUMN + feature.name].astype(np.int64)
            if feature.level == "item":
                is_given = np.array([feature.name in each.features for each in impressions])
                own = np.where(is_given, own, ids[feature.name])
            ids[feature.name] = own
        times = [rows[f"at_{name}"] for name in card.predicted_actions]
        happened = np.stack([~np.ma.getmaskarray(each) for each in times], 1) if times else np.zeros((count, 0), bool)
        seconds = [np.ma.filled(each, np.nan).astype(np.float32) for each in times]
        dwell = np.ma.filled(rows["dwell_s"], np.nan).astype(np.float32)
        offsets = np.stack(seconds, 1) if times else np.zeros((count, 0), np.float32)
        codes, offset_s = action_lists(offsets, happened, pa.array(dwell))
        ts_ms, action_lengths = rows["ts_ms"].astype(np.int64), np.diff(codes.offsets.to_numpy()).astype(np.int64)
        one = np.ones(count, np.int64)
        return WindowColumns(
            user_key=0 * one,
            first_target=one,
            starts=np.arange(count),
            lengths=one,
            user_ids={},
            impression_ids={feature.name: ids[feature.name] for feature in _raw_features(card, "item", "context")},
            session={feature.name: 0 * one for feature in card.features_at("session")},
            outcome={each.name: rows[ROW_COLUMN + each.name].astype(np.int64) for each in card.features_at("outcome")},
            ts_ms=ts_ms,
            end_ms=impression_end_ms(ts_ms, reduce(np.fmax, seconds, dwell)),
            labels=np.full((count, len(card.labels)), np.nan, np.float32),
            objectives=np.full((count, len(card.objectives)), np.nan, np.float32),
            oracle=np.zeros((count, 0), np.float32),
            action_starts=np.cumsum(action_lengths) - action_lengths,
            action_lengths=action_lengths,
            action=codes.values.to_numpy().astype(np.int64),
            offset_s=offset_s.values.to_numpy(),
        )

    def _impressions_query(self) -> str:
        """SQL of the rows of impressions, given one list of each raw column's values."""
        card = self.card
        columns = staging.StagedColumns(
            tuple(FeatureSpec(feature.name, feature.level, feature.kind) for feature in self.shown),
            tuple(card.predicted_actions),
            (),
            (),
            tuple(self.from_time),
        )
        raw = [
            ("ts_ms", "BIGINT"),
            ("dwell_s", "DOUBLE"),
            *((f"at_{name}", "DOUBLE") for name in card.predicted_actions),
        ]
        features = _raw_columns(self.shown, self.from_time)
        looked_up = [quote_identifier(name) for name, _ in features if name.startswith(LOOKUP_SQL)]
        canonical = [*staging.canonical_columns_sql(columns, card.utc_offset_hours), *looked_up, "place"]
        relation = _relation([*raw, *features])
        numbered = f"(SELECT *, '' AS user_id, '' AS item_id, row_number() OVER () AS place FROM ({relation}))"
        levelled = feedback.add_feedback_columns(f"(SELECT {', '.join(canonical)} FROM {numbered})", card.feedback)
        encodings = [*self._encodings(self.shown), *feedback.feedback_encodings(card.feedback)]
        kept = ["raw.ts_ms", "raw.dwell_s", *(f"raw.{name}" for name in columns.action_columns)]
        return f"{encode_relation(levelled, encodings, kept, ROW_COLUMN)} ORDER BY raw.place"

    def _encodings(self, features: Sequence[Feature]) -> list[FeatureEncoding]:
        return [encodings.encoding_from_card(feature, self._found(feature)) for feature in features]

    def _found(self, feature: Feature) -> str:
        """SQL of a vocabulary's row: looked up before, but for the few values that SQL computes from time."""
        if feature.name not in self.from_time:
            return f"raw.{quote_identifier(LOOKUP_SQL + feature.name)}"
        known = self.vocabularies[feature.name].items()
        cases = " ".join(f"WHEN {quote_literal(value)} THEN {row}" for value, row in known)
        return f"CASE raw.{quote_identifier(feature.name)} {cases} END" if cases else "NULL"

    def _arguments(self, feature: Feature, raw: Sequence[Value]) -> list[list[Any]]:
        """A feature's raw values as its columns take them, see :func:`_raw_columns`."""
        if feature.kind == "buckets":
            return [[None if value is None else float(value) for value in raw]]
        values = [None if value is None else str(value) for value in raw]
        if feature.kind == "hash":
            return [values]
        known = self.vocabularies[feature.name]
        return [values, [None if value is None else known.get(value) for value in values]]

    def _run(self, query: str, arguments: list[list[Any]]) -> dict[str, np.ndarray]:
        try:
            return dict(self.connection.execute(query, arguments).fetchnumpy())
        except duckdb.Error as error:
            raise UserError(f"impression cannot be encoded ({str(error).splitlines()[0]})") from error


LOOKUP_SQL = "found "
"""Prefix of columns that hold what a vocabulary has."""


def _action_states(columns: WindowColumns) -> list[bytes]:
    """Names of action-level states, which depend on what was shown and done: a digest of both."""
    ids = np.stack(list(columns.impression_ids.values()), 1)
    ends = np.cumsum(columns.action_lengths)
    names = []
    for row, start, end in zip(ids, ends - columns.action_lengths, ends, strict=True):
        content = (row, columns.action[start:end], columns.offset_s[start:end])
        names.append(blake2b(b"".join(part.tobytes() for part in content), digest_size=16).digest())
    return names


def _raw_features(card: DatasetCard, *levels: Any) -> list[Feature]:
    """In the card's order, as the loader has them."""
    return [feature for feature in card.features if feature.level in levels]


def _raw_columns(features: Sequence[Feature], from_time: Sequence[str]) -> list[tuple[str, str]]:
    """Name and SQL type of the columns of raw values; of vocabulary features, what was looked up too."""
    columns = []
    for feature in features:
        if feature.name in from_time:
            continue
        columns.append((feature.name, SQL_TYPES[feature.kind]))
        if feature.kind == "vocabulary":
            columns.append((LOOKUP_SQL + feature.name, "BIGINT"))
    return columns


def _relation(columns: Sequence[tuple[str, str]]) -> str:
    """SQL of a relation of parameters, each a list of one column's values."""
    lists = [f"unnest(${place}::{kind}[]) AS {quote_identifier(name)}" for place, (name, kind) in enumerate(columns, 1)]
    return f"SELECT {', '.join(lists)}"


def _check_values(values: Mapping[str, Value], known: Mapping[str, Feature], where: str) -> None:
    for name, value in values.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"{where}: no such feature {name!r}; there are {there}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number or (isinstance(value, str) and known[name].kind != "buckets")):
            kind = "number" if known[name].kind == "buckets" else "text"
            raise UserError(f"{where}: feature {name!r} is not a {kind} but {value!r}")
