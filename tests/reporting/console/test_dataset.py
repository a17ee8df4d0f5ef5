"""Warnings of the summary after ``prepare``: each fires on a log that has the mistake, and not on a clean one."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.reporting.console.dataset import summary_tables, warnings

COUNT = 400
START_MS = 1_714_521_600_000


def clean_log() -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(0), np.arange(COUNT)
    return {
        "user": np.array([f"u{n}" for n in rows % 40]),
        "item": np.array([f"v{n}" for n in rows * 7 % 50]),
        "ts": START_MS + 600_000 * rows,
        "dwell": rng.uniform(1, 15, COUNT),
        "like": (rows % 5 == 0).astype(int),
        "click": (rows % 3 == 0).astype(int),
        "length": rng.uniform(20, 60, COUNT),
        "tab": np.array([f"t{n}" for n in rows % 3], object),
    }


def prepare_log(folder: Path, log: dict[str, np.ndarray]) -> DatasetCard:
    spec = {
        "kind": "impressions",
        "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
        "actions": {"like": {"flag": "like"}},
        "labels": {"seen": "click"},
        "features": [
            {"name": "length", "level": "item", "kind": "buckets", "size": 4},
            {"name": "tab", "level": "context"},
        ],
        "duration_feature": "length",
    }
    (folder / "raw").mkdir()
    table = pa.table({name: pa.array(values.tolist()) for name, values in log.items()})
    pq.write_table(table, folder / "raw" / "log.parquet")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    config = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)
    card = prepare("generic", str(folder / "raw"), str(folder / "data"), config, str(folder / "spec.yaml"))
    assert DatasetCard.load(str(folder / "data")) == card
    return card


def with_one(name: str, value: str) -> dict[str, np.ndarray]:
    log = clean_log()
    log[name] = np.where(np.arange(COUNT) % 10 == 0, value, log[name])
    return log


def with_duplicates() -> dict[str, np.ndarray]:
    return {name: np.concatenate([values, values[:30]]) for name, values in clean_log().items()}


def without(name: str, first: int, last: int) -> dict[str, np.ndarray]:
    log = clean_log()
    log[name][first:last] = 0
    return log


def test_a_clean_log_has_no_warnings(tmp_path: Path) -> None:
    card = prepare_log(tmp_path, clean_log())
    assert warnings(card, time.time()) == []
    assert not [part for part in summary_tables(card) if "warning" in str(part)]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (with_one("user", "0"), "user '0' has 10.0% of all impressions: is it a placeholder?"),
        (with_one("item", "[null]"), "item '[null]' has 10.0% of all impressions: is it a placeholder?"),
        (clean_log() | {"tab": np.array([None] * (COUNT - 8) + ["t"] * 8, object)}, "feature tab is missing in 98.0%"),
        (clean_log() | {"dwell": 1000 * clean_log()["dwell"]}, "the median time of exit, "),
        (clean_log() | {"ts": START_MS + 600_000 * np.arange(COUNT) + 10**13}, "the last impression starts at "),
        (without("like", 320, 360), "like has no positives in valid"),
        (without("click", 320, 400), "seen has no positives in valid and test"),
        (without("like", 0, 400), "like has no positives in train and valid and test"),
        (with_duplicates(), "7.0% of the usable rows are duplicates (same user, item and time)"),
    ],
)
def test_warns_of_a_mistake(log: dict[str, np.ndarray], expected: str, tmp_path: Path) -> None:
    card = prepare_log(tmp_path, log)
    (line,) = warnings(card, time.time())
    assert line.startswith(expected)
    assert f"warning: {line}" in [str(part) for part in summary_tables(card)]


def test_warns_of_times_before_2000(tmp_path: Path) -> None:
    card = prepare_log(tmp_path, clean_log())
    train = replace(card.splits["train"], first_ms=1_714_521_600)
    early = replace(card, splits={**card.splits, "train": train})
    assert warnings(early, time.time()) == ["the first impression starts at 1970-01-20 20:15: check time_unit"]
    assert warnings(replace(early, has_calendar_time=False), time.time()) == []
