"""Rows of exported tables follow the names, and are still the dataset's rows of these names."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import Log, hashed_log, simulated_log
from safetensors.torch import load_file
from support import make_card

from a2gen_rec.data.schema import DatasetCard, Feature
from a2gen_rec.errors import DataError
from a2gen_rec.serving.ranker import Ranker
from a2gen_rec.training.export import export
from a2gen_rec.training.export_files import whole_state
from a2gen_rec.training.export_rows import reordered, row_order
from a2gen_rec.training.run import open_run

ITEMS = pa.table({"item": ["a", "b", "c", "d", "e"], "item_id": [3, 0, 1, 0, 2], "author_id": [5, 6, 7, 8, 1]})


def card_of(kind: str) -> DatasetCard:
    return replace(make_card(), features=[Feature("item_id", "item", kind, 6)])  # type: ignore[arg-type]


def test_names_with_a_row_count_it_up_and_the_others_follow(tmp_path: Path) -> None:
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    (order,) = row_order(str(tmp_path), card_of("vocabulary")).values()
    assert order.tolist() == [0, 3, 1, 2, 4, 5]
    expected = {"item": ["a", "c", "e", "b", "d"], "item_id": [1, 2, 3, 0, 0], "author_id": [5, 7, 1, 6, 8]}
    assert reordered(ITEMS, "item_id", order).to_pydict() == expected
    assert row_order(str(tmp_path), card_of("hash")) == {}


@pytest.mark.parametrize(("rows", "order"), [([2, 1, 2], [0, 2, 1, 3, 4, 5]), ([0, 0], [0, 1, 2, 3, 4, 5]), ([], None)])
def test_every_row_has_one_place(tmp_path: Path, rows: list[int], order: list[int] | None) -> None:
    pq.write_table(pa.table({"item_id": pa.array(rows, pa.int64())}), tmp_path / "items.parquet")
    (found,) = row_order(str(tmp_path), card_of("vocabulary")).values()
    assert found.tolist() == (order or list(range(6)))


def test_rows_beyond_the_table_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [6]}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items.parquet.*item_id"):
        row_order(str(tmp_path), card_of("vocabulary"))


@pytest.fixture(scope="module", params=[simulated_log, hashed_log])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Path]:
    folder = tmp_path_factory.mktemp("rows")
    log = request.param(folder)
    export(log.run, str(folder / "model"), "fp32")
    return log, folder / "model"


def test_a_name_s_row_is_the_dataset_s_row_of_that_name(world: tuple[Log, Path]) -> None:
    log, model = world
    tables = load_file(model / "tables.safetensors")
    with open_run(log.run) as opened:
        trained = {
            name.removeprefix("embeddings.embeddings.").removesuffix(".weight"): value.float()
            for name, value in whole_state(opened.built.model).items()
        }
        kind = {feature.name: feature.kind for feature in opened.card.features}
    for level in ("user", "item"):
        mine, theirs = (pq.read_table(f"{folder}/{level}s.parquet").to_pydict() for folder in (model, log.data))
        assert sorted(mine[level]) == theirs[level]
        for feature in mine.keys() & kind.keys():
            table, row = tables[f"{feature}/values"], dict(zip(theirs[level], theirs[feature], strict=True))
            expected = trained[feature][[row[name] for name in mine[level]]]
            assert torch.equal(table[mine[feature]], expected), feature
            assert torch.equal(table[0], trained[feature][0]), feature
            assert sorted(map(tuple, table.tolist())) == sorted(map(tuple, trained[feature].tolist())), feature
        rows = np.array(mine[f"{level}_id"])
        known = int((rows > 0).sum())
        if kind[f"{level}_id"] == "vocabulary":
            assert rows.tolist() == [*range(1, known + 1), *[0] * (len(rows) - known)]
            assert mine[level][:known] == sorted(mine[level][:known])
            assert rows[:known].tolist() != [row[name] for name in mine[level][:known]], "nothing was reordered"
        else:
            assert mine[f"{level}_id"] == theirs[f"{level}_id"]


def test_what_is_measured_of_exact_tables_is_the_run_s_own(world: tuple[Log, Path]) -> None:
    metrics = json.loads((world[1] / "manifest.json").read_text())["metrics"]
    assert metrics["loss"]["exported"] == pytest.approx(metrics["loss"]["original"], rel=1e-6)
    told = [auc for auc in metrics["auc"].values() if auc["original"] is not None]
    assert told
    assert all(auc["exported"] == pytest.approx(auc["original"], abs=1e-6) for auc in told)


def test_some_users_and_items_are_known_ones(world: tuple[Log, Path]) -> None:
    ranker = Ranker.load(str(world[1]))
    assert ranker._items.items(ranker.some_items(5)).rows["item_id"].all()
    assert all(map(ranker.knows_user, ranker.some_users(5)))
