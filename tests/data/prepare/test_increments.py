"""Increments of a dataset: their union equals one dataset of all days; rows, retirement, late rows, refusals."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import Phase, given
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.features.calendar import CALENDAR_FEATURES
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.errors import ConfigError, DataError
from tests.helpers.properties import examples

DAY_MS = 86_400_000
START_MS = 1_767_225_600_000
"""1 January 2026, 00:00 UTC."""
MIN_COUNT = {"user_id": 1, "item_id": 1, "author": 2, "tags": 2, "tab": 1}
SPEC: dict[str, Any] = {
    "kind": "impressions",
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}, "comment": {"offset_s": "comment"}, "hate": {"flag": "hate"}},
    "labels": {"click": "click"},
    "features": [
        {"name": "user_id", "level": "user"},
        {"name": "item_id", "level": "item"},
        {"name": "author", "level": "item", "min_count": 2},
        {"name": "length", "level": "item", "kind": "buckets", "size": 3},
        {"name": "shop", "level": "item", "kind": "hash", "size": 5},
        {"name": "views", "level": "item", "kind": "number"},
        {"name": "tags", "level": "item", "multi_valued": True, "min_count": 2},
        {"name": "tab", "level": "context"},
    ],
    "vectors": [{"name": "content", "width": 2}],
    "duration_feature": "length",
    "negative_actions": ["hate"],
    "split": {"valid_fraction": 0, "test_fraction": 0},
}
SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "item": pa.string(),
        "ts": pa.int64(),
        "dwell": pa.float64(),
        "like": pa.int64(),
        "comment": pa.float64(),
        "hate": pa.int64(),
        "click": pa.int64(),
        "author": pa.string(),
        "length": pa.float64(),
        "shop": pa.string(),
        "views": pa.float64(),
        "tags": pa.list_(pa.string()),
        "tab": pa.string(),
        "content": pa.list_(pa.float32()),
    }
)
Row = dict[str, Any]
CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, max_history=3, max_targets=2, capacity=20.0)


def write_log(file: Path, rows: Sequence[Row]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), file)
    return str(file)


def prepare_part(
    folder: Path, name: str, rows: Sequence[Row], base: str = "", spec: dict[str, Any] = SPEC, **settings: Any
) -> DatasetCard:
    """Prepare rows to ``folder/name``, as an increment of ``folder/base`` if a base is named."""
    raw = write_log(folder / "raw" / name / "log.parquet", rows)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    config = replace(CONFIG, **settings)
    return prepare(
        "generic", raw, str(folder / name), config, str(folder / "spec.yaml"), base=str(folder / base) if base else ""
    )


def make_row(user: str, item: str, ts: int, **values: Any) -> Row:
    return {"user": user, "item": item, "ts": START_MS + ts, "dwell": 5.0, "like": 0, "hate": 0, "tab": "a", **values}


# --- the union of increments --------------------------------------------------------------------------------------

ITEM = st.fixed_dictionaries(
    {
        "author": st.sampled_from([None, "x", "y", "z"]),
        "length": st.sampled_from([None, 4.0, 9.0, 30.0]),
        "shop": st.sampled_from([None, "s", "t"]),
        "views": st.sampled_from([None, 0.0, 7.0, 100.0]),
        "tags": st.sampled_from([None, ["p"], ["p", "q"], ["r"]]),
        "content": st.sampled_from([None, [1.0, 0.5]]),
    }
)
IMPRESSION = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["u1", "u2", "u3"]),
        "item": st.integers(0, 4),
        "wait": st.sampled_from([0, 900, 60_000, 1_900_000, DAY_MS // 3, 2 * DAY_MS]),
        "dwell": st.sampled_from([None, 1.0, 5.0, 12.0]),
        "like": st.integers(0, 1),
        "comment": st.sampled_from([None, 0.5, 3.0]),
        "hate": st.sampled_from([0, 0, 1]),
        "click": st.sampled_from([None, 0, 1]),
        "tab": st.sampled_from([None, "a", "b"]),
    }
)


@st.composite
def logs(draw: st.DrawFn) -> list[list[Row]]:
    """Draw a log that is cut at three to five random moments."""
    items = draw(st.lists(ITEM, min_size=5, max_size=5))
    rows, ts = [], START_MS
    for drawn in draw(st.lists(IMPRESSION, min_size=8, max_size=40)):
        ts += drawn.pop("wait")
        number = drawn.pop("item")
        features = dict(items[number])
        if number == 0 and ts > START_MS + DAY_MS:  # features of items change
            features |= {"author": "w", "length": 9.0, "content": None}
        rows.append({**drawn, "item": f"i{number}", "ts": ts, **features})
    rows = list({(row["user"], row["ts"], row["item"]): row for row in rows}.values())
    times = sorted({row["ts"] for row in rows})
    if len(times) < 4:
        rows += [{**rows[-1], "ts": times[-1] + DAY_MS * day} for day in (1, 2, 3, 4)]
        times = sorted({row["ts"] for row in rows})
    cuts = sorted(draw(st.lists(st.sampled_from(times[1:]), min_size=2, max_size=4, unique=True)))
    edges = [0, *cuts, math.inf]
    return [[row for row in rows if low <= row["ts"] < high] for low, high in pairwise(edges)]


def decoded(folder: Path) -> Iterator[tuple[str, Row, list[Row]]]:
    """Yield user, target and its latest impressions of a dataset's windows, with raw values instead of rows."""
    card = DatasetCard.load(str(folder))
    values = {
        name: {0: None}
        | {x["row"]: x["value"] for x in pq.read_table(folder / f"vocabulary/{name}.parquet").to_pylist()}
        for name in card.vocabularies
    }

    items = pq.read_table(folder / "items.parquet")["item"].to_pylist()

    def decode(name: str, row: Any) -> Any:
        return sorted(filter(None, map(values[name].get, row))) if isinstance(row, list) else values[name][row]

    for file in (file for split in SPLITS for file in sorted((folder / split).glob("*.parquet"))):
        for window in pq.read_table(file).to_pylist():
            lists = {name: x for name, x in window.items() if isinstance(x, list) and name not in ("statistics",)}
            width = len(card.statistics)
            impressions = []
            for index in range(len(window["ts_ms"])):
                one = {name: decode(name, x[index]) if name in values else repr(x[index]) for name, x in lists.items()}
                one["item_index"] = items[window["item_index"][index]]
                target = index - window["first_target"]
                if target >= 0:
                    statistics = repr(window["statistics"][width * target : width * (target + 1)])
                    yield window["user"], one | {"statistics": statistics}, impressions[-CONFIG.max_history - 1 :]
                impressions.append(one)


def grouped(targets: Iterator[tuple[str, Row, list[Row]]]) -> dict[str, list[tuple[Row, list[Row]]]]:
    users: dict[str, list[tuple[Row, list[Row]]]] = {}
    for user, target, history in targets:
        users.setdefault(user, []).append((target, history))
    return users


VALUES = [name for name in MIN_COUNT if name != "user_id"]


def without_values(impression: Row) -> Row:
    return {name: x for name, x in impression.items() if name not in (*VALUES, *CALENDAR_FEATURES)}


def check_values(impression: Row, row: Row, counts: Counter[tuple[str, str]]) -> None:
    """Check decoded values against the log, in which ``counts`` are the impressions until the end of the dataset."""
    assert impression["item_index"] == row["item"]
    for name in VALUES:
        raw = row["item" if name == "item_id" else name]
        if name == "tags":
            assert impression[name] == sorted(x for x in raw or [] if counts[name, x] >= MIN_COUNT[name])
        else:
            assert impression[name] == (raw if counts[name, raw] >= MIN_COUNT[name] else None)


def count_values(rows: Sequence[Row]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts.update((name, row[name]) for name in ("author", "tab"))
        counts.update([("item_id", row["item"]), *(("tags", tag) for tag in row["tags"] or [])])
    return counts


def rows_of(file: Path, without: Set[str] = frozenset()) -> list[str]:
    """Return the rows of a file as text, in which NaN equals NaN."""
    table = pq.read_table(file)
    return list(map(repr, table.select([name for name in table.column_names if name not in without]).to_pylist()))


@given(logs())
@examples(5, phases=[Phase.generate])  # shrinking takes minutes
def test_the_union_of_increments_equals_one_dataset(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[Row]]
) -> None:
    """The whole is fitted on the first part. Only its vocabularies differ: they lack the values of later parts."""
    folder = tmp_path_factory.mktemp("union")
    rows = [row for part in parts for row in part]
    cuts = [str(min(row["ts"] for row in part)) for part in parts]
    whole = prepare_part(folder, "whole", rows, valid_start=cuts[1], test_start=cuts[2])
    cards = [
        prepare_part(folder, f"part{number}", part, base=f"part{number - 1}" if number else "")
        for number, part in enumerate(parts)
    ]
    last = folder / f"part{len(parts) - 1}"
    assert cards[-1].identity.lineage[:-1] == cards[-2].identity.lineage
    assert sum(card.splits["train"].targets for card in cards) == len(rows)
    for name in ("feedback", "median_time_s", "base_rate", "statistics", "numbers", "actions", "timed_actions"):
        assert all(getattr(card, name) == getattr(whole, name) for card in cards), name

    log: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["user"], row["ts"], row["item"])):
        log.setdefault(row["user"], []).append(row)
    expected = grouped(decoded(folder / "whole"))
    seen: Counter[str] = Counter()
    for number in range(len(parts)):
        counts = count_values([row for earlier in parts[: number + 1] for row in earlier])
        for user, targets in grouped(decoded(folder / f"part{number}")).items():
            for target, history in targets:
                index = seen[user]
                seen[user] += 1
                other, other_history = expected[user][index]
                for one, row in zip([*history, target], log[user][index - len(history) : index + 1], strict=True):
                    check_values(one, row, counts)
                for one, another in zip([*history, target], [*other_history, other], strict=True):
                    assert without_values(one) == without_values(another)
    assert {user: len(targets) for user, targets in expected.items()} == dict(seen)

    for file in sorted((folder / "whole" / "carry").rglob("*.parquet")):
        name = file.relative_to(folder / "whole")
        if "pending" not in name.parts:
            assert rows_of(file) == rows_of(last / name), name
    for level in ("item", "user"):
        one, another = (rows_of(path / f"{level}s.parquet", set(MIN_COUNT)) for path in (folder / "whole", last))
        assert one == another
    vectors = [np.load(path / "vectors" / "content.npy") for path in (folder / "whole", last)]
    np.testing.assert_array_equal(*vectors)


# --- rows of vocabularies -----------------------------------------------------------------------------------------


def vocabulary(folder: Path, name: str = "item_id") -> dict[str, int]:
    return {row["value"]: row["row"] for row in pq.read_table(folder / "vocabulary" / f"{name}.parquet").to_pylist()}


def test_values_wait_for_a_row_until_the_table_grows(tmp_path: Path) -> None:
    first = [make_row("u", item, number) for number, item in enumerate("aab")]
    second = [make_row("u", item, DAY_MS + number) for number, item in enumerate("abcddeef")]
    third = [make_row("v", "a", 2 * DAY_MS)]
    card = prepare_part(tmp_path, "one", first, capacity=1.5)
    assert (rows_of_table(card), card.vocabularies["item_id"].values) == (4, 2)
    card = prepare_part(tmp_path, "two", second, base="one", capacity=0.0)
    assert rows_of_table(card) == 4
    assert vocabulary(tmp_path / "two") == {"a": 1, "b": 2, "d": 3}, "the most frequent new value takes the free row"
    assert card.vocabularies["item_id"].waiting == 3
    card = prepare_part(tmp_path, "three", third, base="two", capacity=1.0)
    assert vocabulary(tmp_path / "three") == {"a": 1, "b": 2, "d": 3, "e": 4, "c": 5, "f": 6}
    assert (rows_of_table(card), card.vocabularies["item_id"].waiting) == (7, 0)
    assert list(vocabulary(tmp_path / "three", "user_id")) == ["u", "v"]


def rows_of_table(card: DatasetCard, name: str = "item_id") -> int:
    return next(feature.cardinality for feature in card.features if feature.name == name)


def test_unseen_values_users_and_items_retire(tmp_path: Path) -> None:
    """The retired value's row is marked as reused; no table has the value, and histories lose its row and vector."""
    prepare_part(tmp_path, "day0", [make_row("u", "a", 0, content=[1.0, 2.0]), make_row("gone", "a", 1)], capacity=2.0)
    days = [[make_row("u", "b", DAY_MS), make_row("u", "c", DAY_MS + 1)]]
    days.append([make_row("u", item, 2 * DAY_MS + number, content=[0.0, 3.0]) for number, item in enumerate("bcd")])
    for number, rows in enumerate(days, 1):
        card = prepare_part(tmp_path, f"day{number}", rows, base=f"day{number - 1}", capacity=0.0, ttl_days=1.5)
    assert card.ttl_days == 1.5
    last = tmp_path / "day2"
    state = pq.read_table(last / "vocabulary" / "item_id.parquet").to_pylist()
    assert [(x["value"], x["row"], x["admitted"], x["reused"]) for x in state] == [
        ("c", 1, 2, True),
        ("b", 2, 1, False),
    ]
    assert (card.vocabularies["item_id"].retired, card.vocabularies["item_id"].reused) == (1, 1)
    assert pq.read_table(last / "items.parquet")["item"].to_pylist() == ["b", "c", "d"]
    assert pq.read_table(last / "users.parquet")["user"].to_pylist() == ["u"]
    (window,) = [x for file in (last / "train").iterdir() for x in pq.read_table(file).to_pylist()][:1]
    assert window["item_id"][:3] == [0, 2, 1], "a has retired; c, which waited, has its row"
    assert window["item_index"][0] == -1
    carried = [x for file in (last / "carry" / "history").iterdir() for x in pq.read_table(file)["user_id"].to_pylist()]
    assert set(carried) == {"u"}
    assert not any("gone" in str(rows_of(file)) for file in last.rglob("*.parquet"))


# --- rows before the end of the base ------------------------------------------------------------------------------


def test_late_and_repeated_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    first = [make_row("u", "a", 0), make_row("u", "b", 5), make_row("v", "a", 9)]
    second = [make_row(*row) for row in (("u", "c", 20), ("v", "a", 9), ("u", "c", 20), ("w", "a", 3), ("u", "a", 10))]
    prepare_part(tmp_path, "one", first)
    card = prepare_part(tmp_path, "two", second, base="one", max_late_share=0.5)
    assert card.dropped_rows == {"late": 1, "repeated": 1, "duplicate": 1}
    assert card.splits["train"].targets == 2
    ((user, target, history), (_, other, _)) = decoded(tmp_path / "two")
    assert (user, target["item_id"], other["item_id"]) == ("u", "a", "c"), "sorted by time"
    assert [impression["item_id"] for impression in history] == ["a", "b"]


def fail(folder: Path, rows: Sequence[Row], **settings: Any) -> str:
    """Return the only line of the refusal of an increment, which leaves nothing."""
    with pytest.raises((ConfigError, DataError)) as error:
        prepare_part(folder, "two", rows, base="one", **settings)
    assert not [path for path in folder.iterdir() if "two" in path.name]
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


NEXT = [make_row("u", "a", 20)]


def test_logs_that_do_not_follow_the_base_are_refused(tmp_path: Path) -> None:
    prepare_part(tmp_path, "one", [make_row("u", "a", ts) for ts in (0, 5, 9)])
    end = f"until {START_MS + 9} ms, the end of {tmp_path / 'one'}"
    message = fail(tmp_path, [make_row("u", "a", ts) for ts in (1, 5)])
    assert f"log.parquet, field 'ts_ms': all 2 impressions start {end}" in message
    message = fail(tmp_path, [make_row("u", "a", ts) for ts in (8, 9, 10, 11)])
    assert f"overlaps its base: 2 of 4 impressions start {end} (1 of them in it)" in message
    order = [SPEC["features"][0], *reversed(SPEC["features"][1:])]
    changes = {
        "name is 'other', but 'generic' there": {"name": "other"},
        "features author min_count is 1, but 2 there": {"features": [{**x, "min_count": 1} for x in SPEC["features"]]},
        "features shop is missing there": {"features": [x for x in SPEC["features"] if x["name"] != "shop"]},
        "features have another order there": {"features": order},
        "time_zone is 'Asia/Shanghai', but '' there": {"time_zone": "Asia/Shanghai"},
        "vectors content width is 3, but 2 there": {"vectors": [{"name": "content", "width": 3}]},
    }
    for reason, change in changes.items():
        message = fail(tmp_path, NEXT, spec=SPEC | change)
        assert f"is another source than that of {tmp_path / 'one'}: {reason}" in message
    assert "max_history 4, but 3 in" in fail(tmp_path, NEXT, max_history=4)
    (tmp_path / "one" / "carry" / "source.yaml").write_text("[]")
    assert "carry/source.yaml: invalid" in fail(tmp_path, NEXT)
    (tmp_path / "one" / "carry" / "source.yaml").unlink()
    assert "carry/source.yaml: not found: the dataset was prepared with --carry false" in fail(tmp_path, NEXT)


def test_settings_are_those_of_the_base(tmp_path: Path) -> None:
    prepare_part(tmp_path, "one", [make_row("u", "a", 0)], max_history=7, min_count=1, statistics=False)
    card = prepare_part(tmp_path, "two", NEXT, base="one", max_history=PrepareConfig.max_history)
    assert (card.max_history, card.statistics) == (7, [])


def test_a_failure_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_part(tmp_path, "one", [make_row("u", "a", 0)])
    before = {file: file.read_bytes() for file in (tmp_path / "one").rglob("*") if file.is_file()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("a2gen_rec.data.prepare.pipeline.identify_dataset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(tmp_path, "two", NEXT, base="one")
    assert not [path for path in tmp_path.iterdir() if "two" in path.name]
    assert before == {file: file.read_bytes() for file in (tmp_path / "one").rglob("*") if file.is_file()}


def test_without_a_calendar_targets_read_the_impressions_of_all_earlier_datasets(tmp_path: Path) -> None:
    spec = SPEC | {"has_calendar_time": False}
    first = [make_row(user, "a", number) for number, user in enumerate("uvw")]
    prepare_part(tmp_path, "one", first, spec=spec)
    assert "the times of generic are not elapsed time" in fail(tmp_path, NEXT, spec=spec, ttl_days=1.0)
    prepare_part(tmp_path, "two", [make_row("u", "a", 20), make_row("x", "a", 21)], base="one", spec=spec)
    prepare_part(tmp_path, "three", [make_row("u", "a", 30)], base="two", spec=spec)
    for name, impressions in (("two", 3), ("three", 5)):
        for _, target, _ in decoded(tmp_path / name):
            assert float(target["statistics"].strip("[").split(",")[0]) == np.float16(math.log1p(impressions))
