"""Backfill: the latest impressions of a log, encoded like impressions sent as events."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.data import sources
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import DataError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving import backfill as backfilling
from a2gen_rec.serving.backfill import backfill, latest_impressions
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN
from a2gen_rec.serving.stores.factory import open_store
from tests.helpers.logs import SPEC, Log, hashed_log, simulated_log

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    folder = tmp_path_factory.mktemp("simulated")
    return folder, simulated_log(folder)


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """Return the log with its exported model."""
    folder = tmp_path_factory.mktemp("hashed")
    log = hashed_log(folder)
    export_run(log.run, str(folder / "model"), "fp32")
    return folder, log


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(["backfill", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("last", [1, 7, 1000])
def test_latest_impressions_of_every_user(simulated: tuple[Path, Log], last: int) -> None:
    folder, log = simulated
    source = sources.open_source("simulated", str(folder / "raw"))
    latest = dict(latest_impressions(source, "raw", DatasetCard.load(log.data), last))
    assert latest.keys() == log.impressions.keys()
    items = {str(row["item_id"]): row for row in pq.read_table(folder / "raw" / "items.parquet").to_pylist()}
    for user, past in latest.items():
        expected = log.impressions[user][-last:]
        assert [(impression.item, impression.ts_ms) for impression in past] == [
            (impression.item, impression.ts_ms) for impression in expected
        ]
        for actual, reference in zip(past, expected, strict=True):
            assert actual.watch_s == pytest.approx(reference.watch_s)
            assert dict(actual.actions) == pytest.approx(dict(reference.actions))
            item = items[actual.item]
            assert actual.features == {
                **reference.features,
                "author_id": str(item["author_id"]),
                "category": str(item["category"]),
                "upload_type": item["upload_type"],
                "duration_s": pytest.approx(item["duration_s"]),
            }


def test_backfilled_histories_match_events(
    hashed: tuple[Path, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Includes unknown action and watch times, missing and unseen features; a repetition changes nothing."""
    folder, log = hashed
    location, model = str(tmp_path / "events.db"), str(folder / "model")
    arguments = [
        "--raw",
        str(folder / "raw"),
        "--spec",
        str(folder / "spec.yaml"),
        "--model",
        model,
        "--event-store",
        location,
    ]
    ranker = Ranker.load(model)
    max_impressions = ranker.card.max_history + SESSION_MARGIN
    for _ in range(2):
        main(["backfill", "generic", *arguments])
        sums = sum(min(len(impressions), max_impressions) for impressions in log.impressions.values())
        assert capsys.readouterr().out.endswith(f"{location}: {sums:,} impressions of {len(log.impressions)} users\n")
        store = open_store(location)
        for user, impressions in log.impressions.items():
            _, recorded = store.get_recent(user, 1000)
            assert [impression.ts_ms for impression in recorded] == [
                impression.ts_ms for impression in impressions[-max_impressions:]
            ]
            actual, reference = ranker.encode(recorded), ranker.encode(impressions[-max_impressions:])
            assert actual.items == reference.items
            assert actual.state_keys == reference.state_keys
            for field in dataclasses.fields(actual.columns):
                values, expected = (getattr(columns, field.name) for columns in (actual.columns, reference.columns))
                if field.name.endswith("bags"):
                    values, expected = (
                        {name: vars(bags) for name, bags in part.items()} for part in (values, expected)
                    )
                np.testing.assert_equal(values, expected)
        store.close()


def test_limits_pending_writes(hashed: tuple[Path, Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log = hashed
    monkeypatch.setattr(backfilling, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(backfilling, "FETCH_ROWS", 3)  # fetches end in the middle of users
    location = str(tmp_path / "events.db")
    result = backfill(
        "generic",
        str(folder / "raw"),
        str(folder / "model"),
        location,
        max_impressions=4,
        spec=str(folder / "spec.yaml"),
    )
    store = open_store(location)
    recorded = {user: store.get_recent(user, 1000)[1] for user in log.impressions}
    store.close()
    assert result.users == len(log.impressions)
    assert result.impressions == sum(map(len, recorded.values()))
    for user, impressions in log.impressions.items():
        assert [impression.ts_ms for impression in recorded[user]] == [
            impression.ts_ms for impression in impressions[-4:]
        ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda spec: spec["features"].pop(), "required by the model but missing from the log generic"),
        (lambda spec: spec["actions"].update(share={"flag": "hate"}), "the model has no action 'share'"),
    ],
)
def test_rejects_logs_that_do_not_match_the_model(
    change: Callable[[dict], object], reason: str, hashed: tuple[Path, Log], tmp_path: Path
) -> None:
    folder, _ = hashed
    spec = yaml.safe_load(yaml.safe_dump(SPEC))
    change(spec)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    location = tmp_path / "events.db"
    with pytest.raises(DataError, match=reason):
        backfill("generic", str(folder / "raw"), str(folder / "model"), str(location), spec=str(tmp_path / "spec.yaml"))


def test_errors_are_one_line(simulated: tuple[Path, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, log = simulated
    raw = str(folder / "raw")
    error = error_of(capsys, "simulated", "--raw", raw, "--model", log.run, "--event-store", str(tmp_path / "e.db"))
    assert error.startswith(f"a2gen: error: {log.run}: no exported model found")
    for option, value, name in (
        ("--max-impressions", "-1", "max-impressions"),
        ("--memory-limit-gb", "0", "memory_limit_gb"),
    ):
        assert name in error_of(capsys, "simulated", "--raw", raw, "--model", log.run, option, value)
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_log_without_usable_rows(simulated: tuple[Path, Log], tmp_path: Path) -> None:
    folder, log = simulated
    for name in ("items", "users"):
        (tmp_path / f"{name}.parquet").write_bytes((folder / "raw" / f"{name}.parquet").read_bytes())
    (tmp_path / "impressions").mkdir()
    table = next(iter((folder / "raw" / "impressions").iterdir()))
    rows = pq.read_table(table)
    invalid_users = pa.array([-1] * len(rows), rows.schema.field("user_id").type)
    column = rows.schema.get_field_index("user_id")
    pq.write_table(rows.set_column(column, "user_id", invalid_users), tmp_path / "impressions" / table.name)
    source = sources.open_source("simulated", str(tmp_path))
    with pytest.raises(DataError, match=f"no usable impression in {len(rows)} rows"):
        next(latest_impressions(source, "raw", DatasetCard.load(log.data), 5))


def test_nan_becomes_none() -> None:
    assert [backfilling._none_if_nan(value) for value in (float("nan"), 0.0, None, "nan")] == [None, 0.0, None, "nan"]
    assert Impression("v", 1) == Impression("v", 1, backfilling._none_if_nan(float("nan")))
