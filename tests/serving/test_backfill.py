"""A log's latest impressions in a store: read by another hand, and encoded like those sent one by one."""

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
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import DataError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving import backfill as backfilling
from a2gen_rec.serving.backfill import backfill, latest_impressions
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN
from a2gen_rec.serving.stores.factory import open_store
from tests.helpers.logs import SPEC, Log, hashed_log, simulated_log


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    folder = tmp_path_factory.mktemp("simulated")
    return folder, simulated_log(folder)


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """With its run's export."""
    folder = tmp_path_factory.mktemp("hashed")
    log = hashed_log(folder)
    export_run(log.run, str(folder / "model"), "fp32")
    return folder, log


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(["backfill", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("last", [1, 7, 1000])
def test_the_latest_impressions_of_every_user(simulated: tuple[Path, Log], last: int) -> None:
    folder, log = simulated
    source = sources.open_source("simulated", str(folder / "raw"))
    found = dict(latest_impressions(source, "raw", DatasetCard.load(log.data), last))
    assert found.keys() == log.impressions.keys()
    items = {str(row["item_id"]): row for row in pq.read_table(folder / "raw" / "items.parquet").to_pylist()}
    for user, past in found.items():
        expected = log.impressions[user][-last:]
        assert [(each.item, each.ts_ms) for each in past] == [(each.item, each.ts_ms) for each in expected]
        for mine, theirs in zip(past, expected, strict=True):
            assert mine.watch_s == pytest.approx(theirs.watch_s)
            assert dict(mine.actions) == pytest.approx(dict(theirs.actions))
            item = items[mine.item]
            assert mine.features == {
                **theirs.features,
                "author_id": str(item["author_id"]),
                "category": str(item["category"]),
                "upload_type": item["upload_type"],
                "duration_s": pytest.approx(item["duration_s"]),
            }


def test_a_backfilled_store_gives_the_histories_of_events(
    hashed: tuple[Path, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Actions at unknown times, unknown watch times, features missing and unseen included; done again, all the same."""
    folder, log = hashed
    where, model = str(tmp_path / "events.db"), str(folder / "model")
    given = [
        "--raw",
        str(folder / "raw"),
        "--spec",
        str(folder / "spec.yaml"),
        "--model",
        model,
        "--event-store",
        where,
    ]
    ranker = Ranker.load(model)
    keep = ranker.card.max_history + SESSION_MARGIN
    for _ in range(2):
        main(["backfill", "generic", *given])
        sums = sum(min(len(each), keep) for each in log.impressions.values())
        assert capsys.readouterr().out.endswith(f"{where}: {sums:,} impressions of {len(log.impressions)} users\n")
        store = open_store(where)
        for user, impressions in log.impressions.items():
            _, recorded = store.get_recent(user, 1000)
            assert [each.ts_ms for each in recorded] == [each.ts_ms for each in impressions[-keep:]]
            mine, theirs = ranker.encode(recorded), ranker.encode(impressions[-keep:])
            assert mine.items == theirs.items
            assert mine.state_keys == theirs.state_keys
            for field in dataclasses.fields(mine.columns):
                np.testing.assert_equal(getattr(mine.columns, field.name), getattr(theirs.columns, field.name))
        store.close()


def test_many_users_wait_for_the_store_together(
    hashed: tuple[Path, Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = hashed
    monkeypatch.setattr(backfilling, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(backfilling, "FETCH_ROWS", 3)  # batches of rows end in the middle of users
    where = str(tmp_path / "events.db")
    done = backfill(
        "generic", str(folder / "raw"), str(folder / "model"), where, max_impressions=4, spec=str(folder / "spec.yaml")
    )
    store = open_store(where)
    recorded = {user: store.get_recent(user, 1000)[1] for user in log.impressions}
    store.close()
    assert done.users == len(log.impressions)
    assert done.impressions == sum(map(len, recorded.values()))
    for user, impressions in log.impressions.items():
        assert [each.ts_ms for each in recorded[user]] == [each.ts_ms for each in impressions[-4:]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda spec: spec["features"].pop(), "required by the model but missing from the log generic"),
        (lambda spec: spec["actions"].update(share={"flag": "hate"}), "the model has no action 'share'"),
    ],
)
def test_logs_of_another_kind(
    change: Callable[[dict], object], reason: str, hashed: tuple[Path, Log], tmp_path: Path
) -> None:
    folder, _ = hashed
    spec = yaml.safe_load(yaml.safe_dump(SPEC))
    change(spec)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    where = tmp_path / "events.db"
    with pytest.raises(DataError, match=reason):
        backfill("generic", str(folder / "raw"), str(folder / "model"), str(where), spec=str(tmp_path / "spec.yaml"))


def test_what_keeps_it_from_beginning_is_one_line(
    simulated: tuple[Path, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = simulated
    raw = str(folder / "raw")
    told = fails(capsys, "simulated", "--raw", raw, "--model", log.run, "--event-store", str(tmp_path / "e.db"))
    assert told.startswith(f"a2gen: error: {log.run}: no exported model found")
    for wrong in (["--max-impressions", "-1"], ["--memory-limit-gb", "0"]):
        assert wrong[0].strip("-") in fails(capsys, "simulated", "--raw", raw, "--model", log.run, *wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_log_without_a_usable_row(simulated: tuple[Path, Log], tmp_path: Path) -> None:
    folder, log = simulated
    for name in ("items", "users"):
        (tmp_path / f"{name}.parquet").write_bytes((folder / "raw" / f"{name}.parquet").read_bytes())
    (tmp_path / "impressions").mkdir()
    table = next(iter((folder / "raw" / "impressions").iterdir()))
    rows = pq.read_table(table)
    strangers = pa.array([-1] * len(rows), rows.schema.field("user_id").type)
    place = rows.schema.get_field_index("user_id")
    pq.write_table(rows.set_column(place, "user_id", strangers), tmp_path / "impressions" / table.name)
    source = sources.open_source("simulated", str(tmp_path))
    with pytest.raises(DataError, match=f"no usable impression in {len(rows)} rows"):
        next(latest_impressions(source, "raw", DatasetCard.load(log.data), 5))


def test_not_a_number_is_nothing() -> None:
    assert [backfilling._none_if_nan(value) for value in (float("nan"), 0.0, None, "nan")] == [None, 0.0, None, "nan"]
    assert Impression("v", 1) == Impression("v", 1, backfilling._none_if_nan(float("nan")))
