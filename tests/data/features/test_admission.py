"""Admission to vocabularies against a reference in Python, over several increments."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.features.admission import AdmissionRule, EarlierVocabulary, admit_values
from a2gen_rec.data.schema import FeatureSpec, VocabularyRows
from a2gen_rec.data.sql import connect
from tests.helpers.properties import examples

SPEC = FeatureSpec("item_id", "item")
TTL = 2

Day = list[tuple[str, bool]]
"""Values of a day's impressions, and whether each is training."""
days = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([True, True, False])), max_size=12),
    min_size=2,
    max_size=6,
)


@dataclass
class Reference:
    """Vocabulary as dictionaries: value -> row, training count, count, last day, increment of admission."""

    min_count: int
    ttl: int
    rows: int = 0
    row: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    admitted: dict[str, int] = field(default_factory=dict)
    reused: dict[str, bool] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def advance(self, day: int, impressions: Day, capacity: float) -> VocabularyRows:
        train: dict[str, int] = {}
        total: dict[str, int] = {}
        for value, is_train in impressions:
            total[value] = total.get(value, 0) + 1
            train[value] = train.get(value, 0) + is_train
            self.last[value] = day
        retired = [x for x in self.row if self.ttl and self.last[x] < day - self.ttl]
        candidates = {}
        for value in {*self.pending, *total} - set(self.row):
            if not self.ttl or self.last[value] >= day - self.ttl:
                candidates[value] = self.pending.get(value, 0) + train.get(value, 0)
        self.count |= {value: self.count[value] + train.get(value, 0) for value in self.row}
        before = dict(self.pending)
        self.pending = {x: before.get(x, 0) + total.get(x, 0) for x in candidates}
        for value in retired:
            del self.row[value], self.count[value], self.admitted[value], self.reused[value]
        ranked = sorted((x for x in candidates if candidates[x] >= self.min_count), key=lambda x: (-candidates[x], x))
        needed = len(self.row) + len(ranked)
        if not day:
            self.rows = -int(-(capacity or 1.0) * needed // 1)
        elif capacity and needed > self.rows:
            self.rows = max(self.rows, -int(-capacity * needed // 1))
        free = [row for row in range(1, self.rows + 1) if row not in self.row.values()]
        free.sort(key=lambda row: (row in self.used, row))
        taken = list(zip(ranked, free, strict=False))
        for value, row in taken:
            self.row[value], self.count[value] = row, candidates[value]
            self.admitted[value], self.reused[value] = day, row in self.used
            del self.pending[value]
        self.used |= set(self.row.values())
        reused = sum(self.reused[value] for value, _ in taken)
        return VocabularyRows(
            len(self.used) + 1, len(self.row), len(taken), reused, len(retired), len(ranked) - len(taken)
        )


@given(days, st.integers(1, 3), st.sampled_from([0.0, 1.0, 1.5]), st.booleans(), st.sampled_from([0, TTL]))
@examples(15)
def test_increments_equal_the_reference(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Day], min_count: int, capacity: float, grows: bool, ttl: int
) -> None:
    folder = tmp_path_factory.mktemp("admission")
    reference, earlier = Reference(min_count, ttl), None
    with connect(0.5, 1, folder / "spill") as connection:
        for day, impressions in enumerate(drawn):
            values, splits = [value for value, _ in impressions], [int(not is_train) for _, is_train in impressions]
            log = pa.table(
                {
                    "item_id": pa.array(values, pa.string()),
                    "ts_ms": pa.array([day] * len(values), pa.int64()),
                    "split": pa.array(splits, pa.int8()),
                }
            )
            connection.register("log", log)
            capacity_now = capacity if grows or not day else 0.0
            rule = AdmissionRule(min_count, capacity_now, increment=day, retire_before_ms=day - ttl if ttl else None)
            file, pending = folder / f"{day}.parquet", folder / f"pending{day}.parquet"
            cardinality, rows = admit_values(connection, "log", SPEC, rule, file, pending, earlier)
            assert rows == reference.advance(day, impressions, capacity_now)
            assert cardinality == reference.rows + 1
            assert pq.read_table(file).to_pylist() == [
                {
                    "value": value,
                    "row": row,
                    "count": reference.count[value],
                    "last_ms": reference.last[value],
                    "admitted": reference.admitted[value],
                    "reused": reference.reused[value],
                }
                for value, row in sorted(reference.row.items(), key=lambda pair: pair[1])
            ]
            known = pq.read_table(pending).to_pylist()
            assert {x["value"]: x["count"] for x in known} == reference.pending
            earlier = EarlierVocabulary(file, pending, cardinality, rows.next_row)


def write_day(folder: Path, values: str, rule: AdmissionRule) -> tuple[int, VocabularyRows]:
    log = pa.table(
        {"item_id": list(values), "ts_ms": [0] * len(values), "split": pa.array([0] * len(values), pa.int8())}
    )
    with connect(0.5, 1, folder / "spill") as connection:
        connection.register("log", log)
        return admit_values(connection, "log", SPEC, rule, folder / "vocabulary.parquet")


def test_a_new_table_has_spare_rows_up_to_the_maximum_of_values(tmp_path: Path) -> None:
    assert write_day(tmp_path, "aabc", AdmissionRule(1, capacity=1.5)) == (6, VocabularyRows(4, 3, 3))
    assert write_day(tmp_path, "aabc", AdmissionRule(1, capacity=1.5, max_values=4)) == (5, VocabularyRows(4, 3, 3))
    assert write_day(tmp_path, "aabc", AdmissionRule(1, min_values=7)) == (8, VocabularyRows(4, 3, 3))
    assert write_day(tmp_path, "aabc", AdmissionRule(1, max_values=2)) == (3, VocabularyRows(3, 2, 2, waiting=1))
    assert [row["value"] for row in pq.read_table(tmp_path / "vocabulary.parquet").to_pylist()] == ["a", "b"]
