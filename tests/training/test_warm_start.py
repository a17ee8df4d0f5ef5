"""Warm start: tables and optimizer states of an earlier run on any ranks and plan, new rows from the start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import build_training_model
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.warm_start import load_earlier
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import make_card, small_config, write_dataset
from tests.helpers.distributed import on_ranks
from tests.training.test_sharded import state_of, steps, tensors

pytestmark = pytest.mark.processes

CARD = make_card()
ROWS = {feature.name: feature.cardinality for feature in CARD.features}
GROWN = {"item_id": 13, "user_id": 1}
"""Table -> additional rows."""
NEW_ROWS = {"item_id": [2, ROWS["item_id"] - 1, ROWS["item_id"] + 3], "author_id": [1]}


def grown_card() -> DatasetCard:
    features = [
        replace(feature, cardinality=feature.cardinality + GROWN.get(feature.name, 0)) for feature in CARD.features
    ]
    return replace(CARD, features=features)


def config_of(sharding: str, optimizer: str) -> Config:
    config = small_config()
    config.sharding.sharding_types = [sharding]  # type: ignore[list-item]
    config.optim.sparse_optimizer = optimizer  # type: ignore[assignment]
    return config


def train(process: DistributedContext, dataset: str, config: Config, out: str) -> None:
    built = build_training_model(CARD, config, process)
    steps(built, process, dataset, config, 0, 3)
    checkpoint.save(out, built, state_of(config, 3), keep_latest_k=0)


def start(process: DistributedContext, config: Config, source: str, initial: str, out: str) -> float:
    """Save the initial and the warm-started model; return the learning rate of the tables."""
    built = build_training_model(grown_card(), config, process)
    checkpoint.save(initial, built, state_of(config, 0), keep_latest_k=0)
    new_rows = {table: torch.tensor(rows) for table, rows in NEW_ROWS.items()}
    load_earlier(RunDir(source).checkpoint(3), built, new_rows)
    checkpoint.save(out, built, state_of(config, 0), keep_latest_k=0)
    return float(built.optimizer.param_groups[0]["peak_lr"])


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        ("rowwise_adagrad", (1, "table_wise"), (2, "row_wise")),
        ("rowwise_adagrad", (2, "row_wise"), (2, "table_wise")),
        ("adagrad", (2, "row_wise"), (1, "row_wise")),
    ],
)
def test_rows_keep_vectors_and_moments(
    optimizer: str, before: tuple[int, str], after: tuple[int, str], tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path / "data", CARD)
    run, initial, warm = tmp_path / "run", tmp_path / "initial", tmp_path / "warm"
    on_ranks(before[0], tmp_path, train, str(dataset), config_of(before[1], optimizer), str(run))
    config = config_of(after[1], optimizer)
    config.optim.sparse_lr = 0.0125
    rates = on_ranks(after[0], tmp_path, start, config, str(run), str(initial), str(warm))
    assert rates == [pytest.approx(0.0125)] * after[0], "learning rates are those of the new run"
    trained, new, loaded = tensors(run, 3, tmp_path), tensors(initial, 0, tmp_path), tensors(warm, 0, tmp_path)
    assert trained.keys() == new.keys() == loaded.keys()
    moments = set()
    for name, value in loaded.items():
        table = next((table for table in ROWS if f"{module_key(table)}" in name), "")
        kept = torch.ones(len(value), dtype=torch.bool) if value.dim() else torch.tensor(True)
        if table:
            kept[NEW_ROWS.get(table, [])] = False
            kept[ROWS[table] :] = False
            assert len(value) == ROWS[table] + GROWN.get(table, 0)
            assert torch.equal(value[~kept], new[name][~kept]), name
            if "optimizer" in name:
                moments.add(table)
                assert trained[name].any(), name
                assert not value[~kept].any(), name
            kept_rows = kept[: ROWS[table]]
            assert torch.equal(value[: ROWS[table]][kept_rows], trained[name][kept_rows]), name
        elif "param_groups" not in name:
            assert torch.equal(value, trained[name]), name
    assert moments >= {"user_id", "item_id", "author_id"}


def start_is_refused(process: DistributedContext, config: Config, source: str) -> str:
    built = build_training_model(grown_card(), config, process)
    with pytest.raises(UserError) as error:
        load_earlier(RunDir(source).checkpoint(3), built, {})
    return str(error.value)


def test_tables_sharded_by_columns_do_not_grow(tmp_path: Path) -> None:
    """Their optimizer has a state per row and shard, in one tensor."""
    dataset = write_dataset(tmp_path / "data", CARD)
    config = config_of("column_wise", "rowwise_adagrad")
    config.model.dim = 32
    on_ranks(2, tmp_path, train, str(dataset), config, str(tmp_path / "run"))
    messages = on_ranks(2, tmp_path, start_is_refused, config, str(tmp_path / "run"))
    for message in messages:
        assert "table user_id has grown from" in message or "table item_id has grown from" in message
        assert "train the first run with sharding.sharding_types [row_wise, table_wise]" in message
