"""Rows of exported tables are sorted by raw value and keep their embeddings."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from a2gen_rec.artifact.entity_index import EntityIndex
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.schema import Feature
from a2gen_rec.errors import DataError
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.runs.export import export_run
from a2gen_rec.runs.export_files import full_state_dict
from a2gen_rec.runs.row_order import export_permutation, renumber_rows
from a2gen_rec.training.loaded_run import load_run
from tests.helpers.cards import make_card
from tests.helpers.logs import Log, hashed_log, simulated_log

pytestmark = pytest.mark.training

ITEMS = pa.table({"item": ["a", "b", "c", "d", "e"], "item_id": [3, 0, 1, 0, 2], "author_id": [5, 6, 7, 8, 1]})


def make_item_card(kind: str) -> DatasetCard:
    return replace(make_card(), features=[Feature("item_id", "item", kind, 6)])  # type: ignore[arg-type]


def test_rows_with_a_value_come_first_in_order(tmp_path: Path) -> None:
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    permutation = export_permutation(Dataset(str(tmp_path), make_item_card("vocabulary")))
    assert {name: rows.tolist() for name, rows in permutation.items()} == {"item_id": [0, 3, 1, 2, 4, 5]}
    expected = {"item": ["a", "c", "e", "b", "d"], "item_id": [1, 2, 3, 0, 0], "author_id": [5, 7, 1, 6, 8]}
    assert renumber_rows(ITEMS, permutation, "item_id").to_pydict() == expected
    assert export_permutation(Dataset(str(tmp_path), make_item_card("hash"))) == {}
    author = {"author_id": np.array([0, 8, 7, 6, 5, 4, 3, 2, 1])}
    expected = ITEMS.to_pydict() | {"author_id": [4, 3, 2, 1, 8]}
    assert renumber_rows(ITEMS, author, "item_id").to_pydict() == expected


def test_vocabulary_rows_are_sorted_by_value(tmp_path: Path) -> None:
    (tmp_path / "vocabulary").mkdir()
    known = pa.table({"value": ["c", "a", "b"], "row": [1, 2, 3], "count": [5, 4, 3]})
    pq.write_table(known, tmp_path / "vocabulary" / "author_id.parquet")
    card = replace(make_card(), features=[Feature("author_id", "item", "vocabulary", 4)])
    assert export_permutation(Dataset(str(tmp_path), card))["author_id"].tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("rows", "permutation"), [([2, 1, 2], [0, 2, 1, 3, 4, 5]), ([0, 0], [0, 1, 2, 3, 4, 5]), ([], None)]
)
def test_permutation_is_complete(tmp_path: Path, rows: list[int], permutation: list[int] | None) -> None:
    pq.write_table(pa.table({"item_id": pa.array(rows, pa.int64())}), tmp_path / "items.parquet")
    (row_order,) = export_permutation(Dataset(str(tmp_path), make_item_card("vocabulary"))).values()
    assert row_order.tolist() == (permutation or list(range(6)))


@pytest.mark.parametrize("column", [{"item_id": [6]}, {"item_id": [None]}, {"item_id": ["1"]}, {"item": ["a"]}])
def test_rejects_an_entity_table_without_rows(tmp_path: Path, column: dict[str, list[object]]) -> None:
    pq.write_table(pa.table(column), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items.parquet.*item_id"):
        export_permutation(Dataset(str(tmp_path), make_item_card("vocabulary")))


@pytest.fixture(scope="module", params=[simulated_log, hashed_log])
def exported_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Path]:
    folder = tmp_path_factory.mktemp("rows")
    log = request.param(folder)
    export_run(log.run, str(folder / "model"), "fp32")
    return log, folder / "model"


def trained_tables(log: Log) -> tuple[DatasetCard, dict[str, torch.Tensor]]:
    with load_run(log.run) as loaded:
        tables = {
            name.removeprefix(f"embeddings.embeddings.{module_key('')}").removesuffix(".weight"): value.float()
            for name, value in full_state_dict(loaded.model.model).items()
        }
        return loaded.card, tables


def test_exported_tables_are_permuted_dataset_tables(exported_run: tuple[Log, Path]) -> None:
    card, trained = trained_tables(exported_run[0])
    permuted = set()
    for name, table in load_file(exported_run[1] / "tables.safetensors").items():
        feature = name.removesuffix("/values")
        assert torch.equal(table[0], trained[feature][0]), feature
        assert sorted(map(tuple, table.tolist())) == sorted(map(tuple, trained[feature].tolist())), feature
        permuted |= set() if torch.equal(table, trained[feature]) else {feature}
    vocabularies = {feature.name for feature in card.features if feature.kind == "vocabulary"}
    assert permuted <= vocabularies
    assert len(permuted) > len(vocabularies) / 2


def test_raw_values_keep_their_embeddings(exported_run: tuple[Log, Path]) -> None:
    log, model = exported_run
    card, trained = trained_tables(log)
    tables = load_file(model / "tables.safetensors")
    kind = {feature.name: feature.kind for feature in card.features}
    bags = {feature.name for feature in card.features if feature.multi_valued}

    def same(feature: str, exported: list[int], original: list[int]) -> None:
        assert torch.equal(tables[f"{feature}/values"][exported], trained[feature][original]), feature

    for file in sorted((model / "vocabulary").iterdir()):
        exported, original = (pq.read_table(f"{folder}/vocabulary/{file.name}") for folder in (model, log.data))
        rows = dict(zip(original["value"].to_pylist(), original["row"].to_pylist(), strict=True))
        assert exported["value"].to_pylist() == sorted(rows)
        assert exported["row"].to_pylist() == list(range(1, len(rows) + 1))
        same(file.stem, exported["row"].to_pylist(), [rows[value] for value in exported["value"].to_pylist()])
    for level in ("user", "item"):
        exported, original = (pq.read_table(f"{folder}/{level}s.parquet").to_pydict() for folder in (model, log.data))
        assert sorted(exported[level]) == original[level]
        row_of = {name: number for number, name in enumerate(original[level])}
        for feature in exported.keys() & kind.keys():
            rows = [exported[feature], [original[feature][row_of[name]] for name in exported[level]]]
            same(feature, *([list(chain.from_iterable(lists)) for lists in rows] if feature in bags else rows))
        rows = exported[f"{level}_id"]
        if kind[f"{level}_id"] == "vocabulary":
            known = sum(row > 0 for row in rows)
            assert rows == [*range(1, known + 1), *[0] * (len(rows) - known)]
            assert exported[level][:known] == sorted(exported[level][:known])
        else:
            assert rows == original[f"{level}_id"]


def test_duration_buckets_follow_from_durations(exported_run: tuple[Log, Path]) -> None:
    log, model = exported_run
    catalogue, items = Ranker.load(str(model))._items, pq.read_table(f"{log.data}/items.parquet").to_pydict()
    (feature,) = {"duration_s", "length"} & items.keys()
    assert feature not in pq.read_schema(model / "items.parquet").names
    assert catalogue.items([*items["item"], "?"]).rows[feature].tolist() == [*items[feature], 0]
    card = DatasetCard.load(log.data)
    (spec,) = (other for other in card.features if other.name == feature)
    assert catalogue.rows[feature].dtype == np.int32
    known = EntityIndex.read(
        f"{log.data}/items.parquet", "item", card.features_at("item")
    )  # with a stored bucket, as in format 1
    assert known.items(items["item"]).rows[feature].tolist() == items[feature]
    edges = np.array([*spec.boundaries, np.nextafter(spec.boundaries[0], 0)])
    pq.write_table(
        pa.table({"item": ["a"] * 0, "raw_duration_s": pa.array([], pa.float64())}), model.parent / "no.parquet"
    )
    pq.write_table(pa.table({"item": list(map(str, edges)), "raw_duration_s": edges}), model.parent / "edges.parquet")
    for file, rows in (("no", [0]), ("edges", [*range(2, len(edges) + 1), 1, 0])):
        read = EntityIndex.read(f"{model.parent}/{file}.parquet", "item", [spec], spec.name)
        assert read.rows[feature].tolist() == rows


def test_fp32_export_reproduces_the_metrics_of_the_run(exported_run: tuple[Log, Path]) -> None:
    metrics = json.loads((exported_run[1] / "manifest.json").read_text())["metrics"]
    assert metrics["loss"]["exported"] == pytest.approx(metrics["loss"]["original"], rel=1e-6)
    measured = [auc for auc in metrics["auc"].values() if auc["original"] is not None]
    assert measured
    assert all(auc["exported"] == pytest.approx(auc["original"], abs=1e-6) for auc in measured)
