"""The sizes of exports are those of their folders, and exports that cannot be right are not reported."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import export_size
import pyarrow.parquet as pq
import pytest
import torch
from export_size import Export, Settings, check, measure, report

from a2gen_rec.artifact.manifest import Manifest
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext

ALONE = DistributedContext(0, 1, 1, torch.device("cpu"))
TINY = Settings(items=300, users=60, impressions_per_user=40, dims=[8], dtypes=["int8", "fp32"], steps=2)


def test_sizes_are_those_of_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = SimpleNamespace(TemporaryDirectory=lambda prefix: nullcontext(str(tmp_path)))
    monkeypatch.setattr(export_size, "tempfile", scratch)
    found = measure(TINY, ALONE)
    sizes, catalogue, columns, costs = found.tables
    whole = {}
    for row in sizes.rows:
        told = dict(zip(sizes.columns, row, strict=True))
        folder = tmp_path / f"model-8-{told['tables as']}"
        bytes_of = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*.*")}
        whole[told["tables as"]] = sum(bytes_of.values())
        assert told["whole MiB"] == pytest.approx(sum(bytes_of.values()) / 2**20)
        assert told["tables MiB"] == pytest.approx(bytes_of["tables.safetensors"] / 2**20)
        assert told["items MiB"] == pytest.approx(bytes_of["items.parquet"] / 2**20)
        parts = ("tables", "dense", "vocabularies", "users", "items", "rest")
        assert sum(told[f"{part} MiB"] for part in parts) == pytest.approx(told["whole MiB"])  # type: ignore[misc]
    assert found.figures["int8_8_percent"] == pytest.approx(100 * whole["int8"] / whole["fp32"])
    items = pq.read_table(tmp_path / "model-8-int8" / "items.parquet")
    assert catalogue.rows[0][1:4] == [300, len(items), sum(row > 0 for row in items["item_id"].to_pylist())]
    assert [row[1] for row in columns.rows if row[0] == "items"] == items.column_names
    assert 0 < sum(row[2] for row in columns.rows if row[0] == "items") < catalogue.rows[0][4]  # type: ignore[misc,operator]
    assert len(costs.rows) == 6
    assert all(len(row) == len(costs.columns) for row in costs.rows)
    assert not found.targets  # neither such tables, nor enough that happened


def made(dim: int, dtype: str, tables: int, exported: float, items: str = "a", within: bool | None = True) -> Export:
    names = ("tables.safetensors", "dense.safetensors", "users.parquet", "items.parquet", "vocabulary/tab.parquet")
    files = {name: {"bytes": 10, "sha256": items} for name in names} | {names[0]: {"bytes": tables, "sha256": "t"}}
    auc = {"like": {"original": 0.8, "exported": exported, "positives": 300, "within_tolerance": within}}
    metrics = {"auc": auc, "min_positives": 100, "targets": 1000}
    manifest = Manifest(files, dtype, {}, {}, metrics, "0")
    return Export(dim, dtype, Path(), manifest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ([made(8, "int8", 30, 0.79), made(8, "fp32", 100, 0.79)], "float32 at width 8 is off by 0.01"),
        ([made(8, "int8", 30, 0.79), made(8, "fp32", 100, 0.8, "b")], "exports of one dataset differ in users"),
    ],
)
def test_exports_that_cannot_be_right(exports: list[Export], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check(exports)
    check([exports[0], made(8, "fp32", 100, 0.8)])


def test_targets_are_of_whole_folders_and_of_what_can_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("")
    monkeypatch.setattr(export_size, "_catalogue", lambda *_: [None, None])
    for tables, lost, within, met in ((17, 0.0009, True, [True, True]), (18, 0.002, False, [False, False])):
        exports = [made(32, "int8", tables, 0.8 - lost, within=within), made(32, "fp32", 152, 0.8)]
        exports = [replace(each, folder=tmp_path) for each in exports]
        found = report(exports, Settings())
        assert [target.met for target in found.targets] == met
        assert found.figures["int8_auc_lost"] == pytest.approx(lost)
        assert found.figures["int8_32_percent"] == pytest.approx(100 * (tables + 40) / 192)
    rare = [replace(made(32, each, 20, 0.1, within=None), folder=tmp_path) for each in ("int8", "fp32")]
    assert len(report(rare, Settings()).targets) == 1


@pytest.mark.parametrize(
    ("change", "ranks", "reason"),
    [
        ({"dims": []}, 1, "width of tables"),
        ({"dtypes": ["int8"]}, 1, "fp32 in dtypes"),
        ({"steps": 0}, 1, "steps 0 must be at least 1"),
        ({}, 2, "one rank, not 2"),
    ],
)
def test_impossible_settings(change: dict, ranks: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(replace(TINY, **change), DistributedContext(0, ranks, ranks, torch.device("cpu")))
