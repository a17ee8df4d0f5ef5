"""User windows as flat numpy columns.

An Arrow list column is a jagged tensor (offsets and values). Decoding therefore copies contiguous buffers and never
loops over rows. ``parquet_reader.py`` checks the values against the dataset card.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import UNKNOWN

_WINDOW_FIELDS = ("user_key", "first_target", "lengths", "user_ids", "user_bags", "user_numbers")
_IMPRESSION_FIELDS = (
    "impression_ids",
    "impression_bags",
    "item_index",
    "numbers",
    "session",
    "outcome",
    "ts_ms",
    "end_ms",
    "labels",
    "objectives",
    "oracle",
    "action_lengths",
)
_TOKEN_FIELDS = ("action", "offset_s")
_TARGET_FIELDS = ("statistics",)


def concat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``[starts[0] .. starts[0]+lengths[0]-1, starts[1] .. ]`` as one int64 array."""
    offsets = _exclusive_sum(lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - offsets, lengths)


def jagged_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (sequence, position in it) of every token, given lengths [sequences]. Both [tokens], int64."""
    return np.repeat(np.arange(len(lengths)), lengths), concat_ranges(np.zeros_like(lengths), lengths)


@dataclass(frozen=True)
class CandidateItems:
    """Items to rank.

    Attributes:
        ids: raw identifiers, [items].
        is_known: [items] bool, whether the dataset has the item.
        rows: item feature -> [items] table rows.
        statistics: [items, statistics] float16.
        numbers: [items, item numbers] float32, NaN if missing.
        bags: multi-valued item feature -> [items] table rows.
        index: [items] int64 index of the items' vectors, -1 for unknown items; None without vectors.
    """

    ids: list[str]
    is_known: np.ndarray
    rows: dict[str, np.ndarray]
    statistics: np.ndarray
    numbers: np.ndarray
    bags: dict[str, Bags] = field(default_factory=dict)
    index: np.ndarray | None = None


@dataclass(frozen=True)
class WindowColumns:
    """Windows as flat arrays.

    Attributes:
        user_key: [windows] int64 hash of the user.
        first_target: [windows] int64 index of the first target in the window.
        starts: [windows] int64 index of the window's first impression.
        lengths: [windows] int64 number of impressions.
        user_ids: user feature -> [windows] table rows.
        impression_ids: item or context feature -> [impressions] table rows.
        session: session feature -> [impressions] table rows.
        outcome: outcome feature -> [impressions] table rows.
        ts_ms: [impressions] int64 start time.
        end_ms: [impressions] int64 end time.
        labels: [impressions, labels] float32.
        objectives: [impressions, objectives] float32.
        oracle: [impressions, oracle columns] float32.
        action_starts: [impressions] int64 index of the impression's first token.
        action_lengths: [impressions] int64 number of tokens.
        action: [tokens] int64 action codes.
        offset_s: [tokens] float32 seconds since the start of the impression.
        target_starts: [windows] int64 index of the window's first target among all targets.
        statistics: [targets, statistics] float16.
        user_numbers: [windows, user numbers] float32, NaN if missing.
        numbers: [impressions, item and context numbers] float32, NaN if missing.
        user_bags: multi-valued user feature -> [windows] table rows.
        impression_bags: multi-valued item or context feature -> [impressions] table rows.
        item_index: [impressions] int64 index of the items' vectors, -1 without one.
    """

    user_key: np.ndarray
    first_target: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    user_ids: dict[str, np.ndarray]
    impression_ids: dict[str, np.ndarray]
    session: dict[str, np.ndarray]
    outcome: dict[str, np.ndarray]
    ts_ms: np.ndarray
    end_ms: np.ndarray
    labels: np.ndarray
    objectives: np.ndarray
    oracle: np.ndarray
    action_starts: np.ndarray
    action_lengths: np.ndarray
    action: np.ndarray
    offset_s: np.ndarray
    target_starts: np.ndarray
    statistics: np.ndarray
    user_numbers: np.ndarray
    numbers: np.ndarray
    user_bags: dict[str, Bags] = field(default_factory=dict)
    impression_bags: dict[str, Bags] = field(default_factory=dict)
    item_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def empty(cls, card: DatasetCard) -> "WindowColumns":
        """Return zero windows. Features keep the card's order, as in the loader."""
        none = np.zeros(0, np.int64)
        impression_ids = [x for x in card.features if x.level in ("item", "context") and not x.multi_valued]
        return cls._with_starts(
            dict.fromkeys((*_WINDOW_FIELDS, *_IMPRESSION_FIELDS, *_TOKEN_FIELDS), none)
            | {
                "user_ids": {},
                "user_bags": {},
                "impression_bags": {feature.name: Bags.unknown(0) for feature in card.bags_at("item", "context")},
                "impression_ids": {feature.name: none for feature in impression_ids},
                "session": {feature.name: none for feature in card.features_at("session")},
                "outcome": {feature.name: none for feature in card.features_at("outcome")},
                "labels": np.zeros((0, len(card.labels)), np.float32),
                "objectives": np.zeros((0, len(card.objectives)), np.float32),
                "oracle": np.zeros((0, 0), np.float32),
                "offset_s": np.zeros(0, np.float32),
                "statistics": np.zeros((0, len(card.statistics)), np.float16),
                "user_numbers": np.zeros((0, len(card.numbers_at("user"))), np.float32),
                "numbers": np.zeros((0, len(card.numbers_at("item", "context"))), np.float32),
            }
        )

    @classmethod
    def concat(cls, parts: Sequence["WindowColumns"]) -> "WindowColumns":
        """Concatenate the windows of at least one part."""
        if len(parts) == 1:
            return parts[0]
        names = (*_WINDOW_FIELDS, *_IMPRESSION_FIELDS, *_TOKEN_FIELDS, *_TARGET_FIELDS)
        return cls._with_starts({name: _map(_concatenate, *(getattr(part, name) for part in parts)) for name in names})

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> "WindowColumns":
        """Return copies of the windows ``rows`` [windows] (int64)."""
        impressions = concat_ranges(self.starts[rows], self.lengths[rows])
        tokens = concat_ranges(self.action_starts[impressions], self.action_lengths[impressions])
        targets = concat_ranges(self.target_starts[rows], (self.lengths - self.first_target)[rows])
        axes = (
            (_WINDOW_FIELDS, rows),
            (_IMPRESSION_FIELDS, impressions),
            (_TOKEN_FIELDS, tokens),
            (_TARGET_FIELDS, targets),
        )
        return self._with_starts(
            {
                name: _map(lambda values, index=index: values[index], getattr(self, name))
                for names, index in axes
                for name in names
            }
        )

    def append_candidates(
        self,
        items: CandidateItems,
        card: DatasetCard,
        now_ms: int,
        context: Mapping[str, float | Bags],
        session: Mapping[str, int],
    ) -> "WindowColumns":
        """Append every item to this single window as an impression at one query time.

        The user's response is unknown. A placeholder stands for it, and no prediction reads it.

        Args:
            items: candidates to append.
            card: dataset card.
            now_ms: query time.
            context: context feature -> row or bag, and context number -> standardized value, at the query time. A
                missing one has that of the last impression; without history it is unknown [ours].
            session: session feature -> row at the query time.
        """
        num_history, count = len(self.ts_ms), len(items.ids)

        def extend(history: np.ndarray, value: Any) -> np.ndarray:
            return np.concatenate([history, np.full((count, *history.shape[1:]), value, history.dtype)])

        item_ids = {name: np.concatenate([self.impression_ids[name], rows]) for name, rows in items.rows.items()}
        context_ids = {
            feature.name: extend(
                self.impression_ids[feature.name],
                context.get(feature.name, self.impression_ids[feature.name][-1] if num_history else 0),
            )
            for feature in card.features_at("context")
            if not feature.multi_valued
        }
        bags = {name: Bags.concat([self.impression_bags[name], rows]) for name, rows in items.bags.items()}
        for feature in card.bags_at("context"):
            history = self.impression_bags[feature.name]
            last = history[np.array([-1])] if num_history else Bags.unknown(1)
            bag = context.get(feature.name, last)
            assert isinstance(bag, Bags)
            bags[feature.name] = Bags.concat([history, bag[np.zeros(count, np.int64)]])
        last_numbers = self.numbers[-1] if num_history else np.full(self.numbers.shape[1], np.nan, np.float32)
        contexts = [
            context.get(number.name, last_numbers[items.numbers.shape[1] + index])
            for index, number in enumerate(card.numbers_at("context"))
        ]
        numbers = np.concatenate([items.numbers, np.tile(np.array(contexts, np.float32), (count, 1))], axis=1)
        action_lengths = extend(self.action_lengths, 2)
        return replace(
            self,
            first_target=np.array([num_history]),
            starts=np.zeros(1, np.int64),
            lengths=np.array([num_history + count]),
            impression_ids=item_ids | context_ids,
            impression_bags=bags,
            item_index=np.concatenate([self.item_index, np.full(count, -1) if items.index is None else items.index]),
            session={name: extend(self.session[name], row) for name, row in session.items()},
            outcome={name: extend(rows, UNKNOWN) for name, rows in self.outcome.items()},
            ts_ms=extend(self.ts_ms, now_ms),
            end_ms=extend(self.end_ms, now_ms),
            labels=extend(self.labels, np.nan),
            objectives=extend(self.objectives, np.nan),
            oracle=extend(self.oracle, np.nan),
            action_starts=_exclusive_sum(action_lengths),
            action_lengths=action_lengths,
            action=np.concatenate([self.action, np.tile([0, len(card.actions) - 1], count)]),
            offset_s=np.concatenate([self.offset_s, np.tile(np.array([0, np.nan], np.float32), count)]),
            target_starts=np.zeros(1, np.int64),
            statistics=items.statistics,
            numbers=np.concatenate([self.numbers, numbers]),
        )

    @classmethod
    def _with_starts(cls, fields: dict[str, Any]) -> "WindowColumns":
        """Build columns from all fields but the start indices, which follow from the lengths."""
        return cls(
            **fields,
            starts=_exclusive_sum(fields["lengths"]),
            action_starts=_exclusive_sum(fields["action_lengths"]),
            target_starts=_exclusive_sum(fields["lengths"] - fields["first_target"]),
        )


def _exclusive_sum(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _concatenate(*parts: Any) -> Any:
    return Bags.concat(parts) if isinstance(parts[0], Bags) else np.concatenate(parts)


def _map(function: Callable[..., Any], *fields: Any) -> Any:
    """Apply ``function`` to one field of several columns: to the arrays, or per feature to those of dictionaries."""
    if isinstance(fields[0], dict):
        return {name: function(*(field[name] for field in fields)) for name in fields[0]}
    return function(*fields)
