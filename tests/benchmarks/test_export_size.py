"""Export sizes match the exported files, and inconsistent exports are rejected."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import export_size
import pyarrow.parquet as pq
import pytest
import torch
from export_size import Export, Settings, check_exports, make_report, measure

from a2gen_rec.artifact.manifest import Manifest
from a2gen_rec.cli.main import main
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext

pytestmark = pytest.mark.training

SINGLE = DistributedContext(0, 1, 1, torch.device("cpu"))
TINY = Settings(items=300, users=60, impressions_per_user=40, dims=[8], dtypes=["int8", "fp32"], steps=2)


def test_sizes_match_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = SimpleNamespace(TemporaryDirectory=lambda prefix: nullcontext(str(tmp_path)))
    monkeypatch.setattr(export_size, "tempfile", scratch)
    monkeypatch.setattr(export_size, "run_command", lambda folder, *arguments: main(arguments))
    result = measure(TINY, SINGLE)
    sizes, catalog, columns, auc = result.tables
    total = {}
    for row in sizes.rows:
        cells = dict(zip(sizes.columns, row, strict=True))
        folder = tmp_path / f"model-8-{cells['dtype']}"
        file_bytes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*.*")}
        total[cells["dtype"]] = sum(file_bytes.values())
        assert cells["total MiB"] == pytest.approx(sum(file_bytes.values()) / 2**20)
        assert cells["tables MiB"] == pytest.approx(file_bytes["tables.safetensors"] / 2**20)
        assert cells["items MiB"] == pytest.approx(file_bytes["items.parquet"] / 2**20)
        parts = ("tables", "dense", "vocabularies", "users", "items", "rest")
        assert sum(cells[f"{part} MiB"] for part in parts) == pytest.approx(cells["total MiB"])  # type: ignore[misc]
    assert result.metrics["int8_8_percent"] == pytest.approx(100 * total["int8"] / total["fp32"])
    items = pq.read_table(tmp_path / "model-8-int8" / "items.parquet")
    assert catalog.rows[0][1:4] == [300, len(items), sum(row > 0 for row in items["item_id"].to_pylist())]
    assert [row[1] for row in columns.rows if row[0] == "items"] == items.column_names
    assert 0 < sum(row[2] for row in columns.rows if row[0] == "items") < catalog.rows[0][4]  # type: ignore[misc,operator]
    assert len(auc.rows) == 6
    assert all(len(row) == len(auc.columns) for row in auc.rows)
    assert not result.goals  # no table of the goal width, too few positives


def make_export(
    dim: int, dtype: str, tables: int, exported: float, items: str = "a", within: bool | None = True
) -> Export:
    names = ("tables.safetensors", "dense.safetensors", "users.parquet", "items.parquet", "vocabulary/tab.parquet")
    files = {name: {"bytes": 10, "sha256": items} for name in names} | {names[0]: {"bytes": tables, "sha256": "t"}}
    auc = {"like": {"original": 0.8, "exported": exported, "positives": 300, "within_tolerance": within}}
    metrics = {"auc": auc, "min_positives": 100, "targets": 1000}
    manifest = Manifest(files, dtype, {}, {}, metrics, "0")
    return Export(dim, dtype, Path(), manifest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        (
            [make_export(8, "int8", 30, 0.79), make_export(8, "fp32", 100, 0.79)],
            "float32 export of width 8 differs from the run by 0.01",
        ),
        (
            [make_export(8, "int8", 30, 0.79), make_export(8, "fp32", 100, 0.8, "b")],
            "exports of one dataset differ in users",
        ),
    ],
)
def test_rejects_inconsistent_exports(exports: list[Export], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_exports(exports)
    check_exports([exports[0], make_export(8, "fp32", 100, 0.8)])


def test_goals_use_total_bytes_and_actions_with_enough_positives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text("")
    monkeypatch.setattr(export_size, "_catalog_tables", lambda *_: [None, None])
    for tables, loss, within, met in ((17, 0.0009, True, [True, True]), (18, 0.002, False, [False, False])):
        exports = [make_export(32, "int8", tables, 0.8 - loss, within=within), make_export(32, "fp32", 152, 0.8)]
        exports = [replace(export, folder=tmp_path) for export in exports]
        result = make_report(exports, Settings())
        assert [goal.met for goal in result.goals] == met
        assert result.metrics["int8_auc_loss"] == pytest.approx(loss)
        assert result.metrics["int8_32_percent"] == pytest.approx(100 * (tables + 40) / 192)
    rare = [replace(make_export(32, dtype, 20, 0.1, within=None), folder=tmp_path) for dtype in ("int8", "fp32")]
    assert len(make_report(rare, Settings()).goals) == 1


@pytest.mark.parametrize(
    ("change", "ranks", "reason"),
    [
        ({"dims": []}, 1, "dims must not be empty"),
        ({"dtypes": ["int8"]}, 1, "dtypes must include fp32"),
        ({"steps": 0}, 1, "steps 0 must be at least 1"),
        ({}, 2, "use one rank, not 2"),
    ],
)
def test_rejects_invalid_settings(change: dict, ranks: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(replace(TINY, **change), DistributedContext(0, ranks, ranks, torch.device("cpu")))
