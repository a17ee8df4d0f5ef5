"""Encoding of raw impressions as model inputs, by the same SQL and functions that ``prepare`` applies to the log.

One query takes a few milliseconds for one impression or for a thousand. Impressions are therefore encoded when they
are added, not while candidates are ranked. Vocabulary rows are looked up before the query, so no query reads one.
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
from a2gen_rec.data.bag_sql import ROWS_TYPE, WEIGHTS_COLUMN
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.features import encodings, feedback
from a2gen_rec.data.features.calendar import calendar_feature
from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.numbers import number_encoding
from a2gen_rec.data.features.sessions import impression_end_ms
from a2gen_rec.data.inputs import Number
from a2gen_rec.data.prepare import staging
from a2gen_rec.data.prepare.windows import action_lists
from a2gen_rec.data.schema import ITEM_ID, NUMERIC_KINDS, Feature, FeatureSpec, Input
from a2gen_rec.data.sql import ROW_COLUMN, disable_progress_bar, quote_identifier, quote_literal
from a2gen_rec.data.text import value_text
from a2gen_rec.data.time_zone import QUARTER_HOUR_MS
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.bag_values import bag_entries, bags_of_rows, check_bag, known_rows
from a2gen_rec.ranking.checks import check_identifier, describe_value, is_number
from a2gen_rec.ranking.history import EncodedHistory, merge_histories
from a2gen_rec.ranking.types import Impression, Value
from a2gen_rec.ranking.window import check_time

EncodedValue = float | Bags
"""Row, standardized number, or bag of rows of one value."""
CACHE_SIZE = 4096
"""Maximum number of cached sets of raw values with their rows; requests repeat the same sets."""


class ImpressionEncoder:
    """Encoder of raw values as table rows, identical to the dataset's ``prepare``.

    Args:
        card: Dataset card.
        vocabularies: Vocabulary feature -> raw value -> row, without identifiers, which ``items`` contains.
        items: Items of the dataset.
        max_history: Maximum number of impressions in a history.

    Raises:
        DataError: The card lacks the rule of the context features computed from time.
    """

    def __init__(
        self, card: DatasetCard, vocabularies: Mapping[str, Mapping[str, int]], items: EntityIndex, max_history: int
    ) -> None:
        self.card, self.vocabularies, self.items, self.max_history = card, vocabularies, items, max_history
        self.connection = duckdb.connect(":memory:", config={"threads": 1, "enable_external_access": False})
        disable_progress_bar(self.connection)
        self.from_time = card.time_features
        self.zone = card.zone
        self.impression_features = [
            feature for feature in _raw_features(card, "item", "context") if feature.name != ITEM_ID
        ]
        self.impression_numbers = card.numbers_at("item", "context")
        impression_inputs: list[Input] = [*self.impression_features, *self.impression_numbers]
        self.context_features = _raw_features(card, "context")
        self.raw_impression_features = self._by_name(impression_inputs)
        self.raw_context_features = self._by_name([*self.context_features, *card.numbers_at("context")])
        users: list[Input] = [*_raw_features(card, "user"), *card.numbers_at("user")]
        self.raw_user_features = {feature.name: feature for feature in users if feature.name != IDENTIFIERS["user"]}
        self._query = self._impressions_query()
        self._row_cache: dict[tuple[object, ...], dict[str, EncodedValue]] = {}

    def encode(self, impressions: Sequence[Impression], after: EncodedHistory | None = None) -> EncodedHistory:
        """Encode impressions and append them to a history; see :meth:`Ranker.encode`."""
        self.validate(impressions)
        previous = self.empty_history() if after is None else after
        latest = {(impression.ts_ms, impression.item): impression for impression in impressions}
        if not latest:
            return previous
        ordered = [latest[key] for key in sorted(latest)]
        columns = self._columns(ordered)
        no_positions = np.zeros(len(ordered), np.int64)
        new = EncodedHistory(
            columns, [impression.item for impression in ordered], _action_state_keys(columns), no_positions
        )
        return merge_histories(previous, new, self.card, self.max_history)

    def empty_history(self) -> EncodedHistory:
        """Return the history of a user without impressions."""
        return EncodedHistory(WindowColumns.empty(self.card), [], [], np.zeros(0, np.int64))

    def context(self, now_ms: int, values: Mapping[str, Value]) -> dict[str, EncodedValue]:
        """Return rows and standardized numbers of the given context, and rows of features computed from time."""
        if not values and not self.from_time:
            return {}
        # Features computed from time change at most once per quarter of an hour.
        return self._rows_of(values, self.raw_context_features, now_ms // QUARTER_HOUR_MS * QUARTER_HOUR_MS)

    def user(self, values: Mapping[str, Value]) -> dict[str, EncodedValue]:
        """Return the rows of the given user features, and standardized numbers."""
        return self._rows_of(values, self.raw_user_features, None) if values else {}

    def validate_values(self, context: Mapping[str, Value], user: Mapping[str, Value]) -> None:
        """Raise a UserError for the first feature of a request that is unknown or has a value of the wrong kind."""
        _validate_values(context, self.raw_context_features, "context of the request")
        _validate_values(user, self.raw_user_features, "user of the request")

    def validate(self, impressions: Sequence[Impression]) -> None:
        """Raise a UserError for the first impression that does not match the dataset."""
        actions = set(self.card.predicted_actions)
        for impression in impressions:
            check_identifier(impression.item, "item of an impression")
            location = f"impression of {impression.item!r} at {describe_value(impression.ts_ms)}"
            names = [name for name, _ in impression.actions]
            for name in names:
                if name not in actions:
                    choices = ", ".join(self.card.predicted_actions)
                    raise UserError(f"{location}: unknown action {name!r}; choose one of {choices}")
            if len(set(names)) < len(names):
                raise UserError(f"{location}: duplicate action")
            times = [seconds for _, seconds in impression.actions] + [impression.watch_s]
            for seconds in times:
                if seconds is not None and not (is_number(seconds) and 0 <= seconds < math.inf):
                    raise UserError(f"{location}: times must be at least 0 seconds, not {describe_value(seconds)}")
            for name in impression.labels:
                if name not in self.card.labels:
                    choices = ", ".join(self.card.labels) or "none"
                    raise UserError(f"{location}: unknown label {name!r}; available: {choices}")
            _validate_values(impression.features, self.raw_impression_features, location)
            check_time(impression.ts_ms, f"impression of {impression.item!r}: ts_ms", self.card.has_calendar_time)

    def _by_name(self, features: Sequence[Input]) -> dict[str, Input]:
        """Return the features that are not computed from time, by name."""
        return {feature.name: feature for feature in features if feature.name not in self.from_time}

    def _rows_of(
        self, values: Mapping[str, Value], features: Mapping[str, Input], ts_ms: int | None
    ) -> dict[str, EncodedValue]:
        """Return rows and numbers of raw values and, given a time, rows of the features computed from it."""
        key = (ts_ms, *sorted((name, repr(value)) for name, value in values.items()))
        cached = self._row_cache.get(key)
        if cached is None:
            from_time = [
                feature for feature in self.context_features if feature.name in self.from_time and ts_ms is not None
            ]
            selected: list[Input] = [*(features[name] for name in values), *from_time]
            numbers = [number_encoding(each) for each in selected if isinstance(each, Number)]
            relation = _relation([("ts_ms", "BIGINT"), *_raw_columns(selected, self.from_time)])
            computed = [
                f"{calendar_feature(feature.name, self.zone)} AS {quote_identifier(feature.name)}"
                for feature in from_time
            ]
            with_time = f"(SELECT {', '.join(['*', *computed])} FROM ({relation}))"
            query = encode_relation(with_time, self._encodings(selected), ["raw.ts_ms"], numbers=numbers)
            arguments = [[ts_ms]]
            for feature in selected:
                if feature.name not in self.from_time:
                    arguments += self._arguments(feature, [values[feature.name]])
            rows = self._run(query, arguments)
            cached = {each.name: _bags(rows, each) if _is_bag(each) else rows[each.name][0].item() for each in selected}
            if len(self._row_cache) >= CACHE_SIZE:
                self._row_cache.clear()
            self._row_cache[key] = cached
        return cached

    def _columns(self, impressions: Sequence[Impression]) -> WindowColumns:
        """Return one window per impression, in order, with empty session features."""
        items = self.items.lookup([impression.item for impression in impressions])
        rule = self.card.feedback
        arguments: list[list[Any]] = [
            [impression.ts_ms for impression in impressions],
            # float: DuckDB 2.0.1 does not accept numpy's numbers.
            [None if impression.watch_s is None else float(impression.watch_s) for impression in impressions],
        ]
        action_times = [
            {name: math.nan if seconds is None else float(seconds) for name, seconds in impression.actions}
            for impression in impressions
        ]
        arguments += [[times.get(name) for times in action_times] for name in self.card.predicted_actions]
        for feature in self.raw_impression_features.values():
            raw: Sequence[Value] = [impression.features.get(feature.name) for impression in impressions]
            if rule is not None and feature.name == rule.duration_feature and len(self.items.duration_s):
                durations = self.items.duration_s[items]
                raw = [
                    value if feature.name in impression.features else float(duration)
                    for value, impression, duration in zip(raw, impressions, durations, strict=True)
                ]
            arguments += self._arguments(feature, raw)
        rows = self._run(self._query, arguments)
        return self._as_windows(impressions, items, rows)

    def _as_windows(
        self, impressions: Sequence[Impression], items: np.ndarray, rows: Mapping[str, np.ndarray]
    ) -> WindowColumns:
        card, count = self.card, len(impressions)
        ids, bags = self.items.rows_at(items), self.items.bags_at(items)
        for feature in self.impression_features:
            if feature.multi_valued:
                encoded_bags = _bags(rows, feature, ROW_COLUMN)
                if feature.level == "item":
                    index = np.arange(count) + np.where(_is_present(feature, impressions), 0, count)
                    encoded_bags = Bags.concat([encoded_bags, bags[feature.name]])[index]
                bags[feature.name] = encoded_bags
                continue
            encoded = rows[ROW_COLUMN + feature.name].astype(np.int64)
            if feature.level == "item":
                encoded = np.where(_is_present(feature, impressions), encoded, ids[feature.name])
            ids[feature.name] = encoded
        numbers = self.items.numbers[items]
        numbers = np.concatenate([numbers, np.zeros((count, len(card.numbers_at("context"))), np.float32)], axis=1)
        for column, number in enumerate(self.impression_numbers):
            encoded = rows[ROW_COLUMN + number.name]
            if number.level == "item":
                encoded = np.where(_is_present(number, impressions), encoded, numbers[:, column])
            numbers[:, column] = encoded
        times = [rows[f"at_{name}"] for name in card.predicted_actions]
        occurred = np.stack([~np.ma.getmaskarray(time) for time in times], 1) if times else np.zeros((count, 0), bool)
        seconds = [np.ma.filled(time, np.nan).astype(np.float32) for time in times]
        dwell = np.ma.filled(rows["dwell_s"], np.nan).astype(np.float32)
        offsets = np.stack(seconds, 1) if times else np.zeros((count, 0), np.float32)
        codes, offset_s = action_lists(offsets, occurred, pa.array(dwell))
        ts_ms, action_lengths = rows["ts_ms"].astype(np.int64), np.diff(codes.offsets.to_numpy()).astype(np.int64)
        one = np.ones(count, np.int64)
        return WindowColumns(
            user_key=0 * one,
            first_target=one,
            starts=np.arange(count),
            lengths=one,
            user_ids={},
            impression_ids={
                feature.name: ids[feature.name]
                for feature in _raw_features(card, "item", "context")
                if not feature.multi_valued
            },
            impression_bags={feature.name: bags[feature.name] for feature in card.bags_at("item", "context")},
            session={feature.name: 0 * one for feature in card.features_at("session")},
            outcome={
                feature.name: rows[ROW_COLUMN + feature.name].astype(np.int64)
                for feature in card.features_at("outcome")
            },
            ts_ms=ts_ms,
            end_ms=impression_end_ms(ts_ms, reduce(np.fmax, seconds, dwell)),
            labels=np.array(
                [[each.labels.get(name, np.nan) for name in card.labels] for each in impressions], np.float32
            ).reshape(count, len(card.labels)),
            objectives=np.full((count, len(card.objectives)), np.nan, np.float32),
            oracle=np.zeros((count, 0), np.float32),
            action_starts=np.cumsum(action_lengths) - action_lengths,
            action_lengths=action_lengths,
            action=codes.values.to_numpy().astype(np.int64),
            offset_s=offset_s.values.to_numpy(),
            target_starts=0 * one,
            statistics=np.zeros((0, len(card.statistics)), np.float16),
            item_index=items,
            user_bags={feature.name: Bags.unknown(count) for feature in card.bags_at("user")},
            user_numbers=np.zeros((count, len(card.numbers_at("user"))), np.float32),
            numbers=numbers,
        )

    def _impressions_query(self) -> str:
        """Return the SQL of the rows of impressions; its parameters are one list of values per raw column."""
        card = self.card
        inputs: list[Input] = [*self.impression_features, *self.impression_numbers]
        columns = staging.StagedColumns(
            tuple(FeatureSpec(each.name, each.level, each.kind, multi_valued=_is_bag(each)) for each in inputs),
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
        features = _raw_columns(list(self.raw_impression_features.values()), self.from_time)
        lookups = [quote_identifier(name) for name, _ in features if name.startswith(LOOKUP_SQL)]
        canonical = [*staging.canonical_columns_sql(columns, self.zone), *lookups, '"row index"']
        relation = _relation([*raw, *features])
        numbered = f"(SELECT *, '' AS user_id, '' AS item_id, row_number() OVER () AS \"row index\" FROM ({relation}))"
        with_feedback = feedback.add_feedback_columns(f"(SELECT {', '.join(canonical)} FROM {numbered})", card.feedback)
        encodings = [*self._encodings(self.impression_features), *feedback.feedback_encodings(card.feedback)]
        kept = ["raw.ts_ms", "raw.dwell_s", *(f"raw.{name}" for name in columns.action_columns)]
        numbers = [number_encoding(number) for number in self.impression_numbers]
        encoded = encode_relation(with_feedback, encodings, kept, ROW_COLUMN, numbers=numbers)
        return f'{encoded} ORDER BY raw."row index"'

    def _encodings(self, features: Sequence[Input]) -> list[FeatureEncoding]:
        return [
            encodings.encoding_from_card(feature, self._vocabulary_row_sql(feature))
            for feature in features
            if isinstance(feature, Feature)
        ]

    def _vocabulary_row_sql(self, feature: Feature) -> str:
        """Return the SQL of a vocabulary row: a column of rows looked up in advance, or a CASE expression for the few
        values that SQL computes from time."""
        if feature.name not in self.from_time:
            return f"raw.{quote_identifier(LOOKUP_SQL + feature.name)}"
        vocabulary = self.vocabularies[feature.name].items()
        cases = " ".join(f"WHEN {quote_literal(value)} THEN {row}" for value, row in vocabulary)
        return f"CASE raw.{quote_identifier(feature.name)} {cases} END" if cases else "NULL"

    def _arguments(self, feature: Input, raw: Sequence[Any]) -> list[list[Any]]:
        """Return a feature's raw values as the parameters of its columns, see :func:`_raw_columns`."""
        if _is_bag(feature):
            entries = [bag_entries(value) for value in raw]
            if feature.kind == "hash":
                return [entries]
            rows = self.vocabularies[feature.name]
            return [entries, [known_rows(values, rows) for values in entries]]
        if feature.kind in NUMERIC_KINDS:
            return [[None if value is None else float(value) for value in raw]]
        values = [None if value is None else value_text(value) for value in raw]
        if feature.kind == "hash":
            return [values]
        vocabulary = self.vocabularies[feature.name]
        return [values, [None if value is None else vocabulary.get(value) for value in values]]

    def _run(self, query: str, arguments: list[list[Any]]) -> dict[str, np.ndarray]:
        try:
            return dict(self.connection.execute(query, arguments).fetchnumpy())
        except duckdb.Error as error:
            raise UserError(f"impression cannot be encoded ({str(error).splitlines()[0]})") from error


LOOKUP_SQL = "looked-up row of "
"""Prefix of the columns of vocabulary rows looked up in advance."""


def _action_state_keys(columns: WindowColumns) -> list[bytes]:
    """Return the keys of action-level states: digests of all that the states depend on."""
    ids = np.stack(list(columns.impression_ids.values()), 1)
    ends = np.cumsum(columns.action_lengths)
    bags = [(bag, np.append(0, np.cumsum(bag.lengths))) for bag in columns.impression_bags.values()]
    keys: list[bytes] = []
    for index, (start, end) in enumerate(zip(ends - columns.action_lengths, ends, strict=True)):
        content = [
            ids[index],
            columns.item_index[index : index + 1],
            columns.numbers[index],
            columns.action[start:end],
            columns.offset_s[start:end],
        ]
        for bag, edges in bags:
            values = slice(edges[index], edges[index + 1])
            content += [bag.lengths[index : index + 1], bag.ids[values], bag.weights[values]]
        keys.append(blake2b(b"".join(part.tobytes() for part in content), digest_size=16).digest())
    return keys


def _raw_features(card: DatasetCard, *levels: Any) -> list[Feature]:
    """Return the features of some levels in the card's order, as in the loader."""
    return [feature for feature in card.features if feature.level in levels]


def _is_bag(feature: Input) -> bool:
    return isinstance(feature, Feature) and feature.multi_valued


def _bags(rows: Mapping[str, np.ndarray], feature: Input, prefix: str = "") -> Bags:
    """Return the bags of a multi-valued feature from the columns of a query."""
    return bags_of_rows(rows[prefix + feature.name], rows.get(prefix + WEIGHTS_COLUMN + feature.name))


def _is_present(feature: Input, impressions: Sequence[Impression]) -> np.ndarray:
    """Return [impressions] bool, whether an impression has its own value of a feature."""
    return np.array([feature.name in impression.features for impression in impressions])


def _raw_columns(features: Sequence[Input], from_time: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and SQL type of the columns of raw values; vocabulary features have a second column of rows."""
    columns = []
    for feature in features:
        if feature.name in from_time:
            continue
        columns.append((feature.name, staging.raw_type(feature.kind, _is_bag(feature))))
        if feature.kind == "vocabulary":
            columns.append((LOOKUP_SQL + feature.name, ROWS_TYPE if _is_bag(feature) else "BIGINT"))
    return columns


def _relation(columns: Sequence[tuple[str, str]]) -> str:
    """Return the SQL of a relation whose parameters are lists of column values."""
    lists = [f"unnest(${index}::{kind}[]) AS {quote_identifier(name)}" for index, (name, kind) in enumerate(columns, 1)]
    return f"SELECT {', '.join(lists)}"


def _validate_values(values: Mapping[str, Value], features: Mapping[str, Input], location: str) -> None:
    for name, value in values.items():
        if name not in features:
            choices = ", ".join(features) or "none"
            raise UserError(f"{location}: unknown feature {name!r}; available: {choices}")
        if _is_bag(features[name]):
            check_bag(value, f"{location}: feature {name!r}")
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_numeric = features[name].kind in NUMERIC_KINDS
        if value is not None and not (is_number or (isinstance(value, str) and not is_numeric)):
            kind = "number" if is_numeric else "text"
            raise UserError(f"{location}: feature {name!r} must be a {kind}, not {describe_value(value)}")
