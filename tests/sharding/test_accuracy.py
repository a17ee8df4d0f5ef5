"""Planned bytes equal allocated bytes, and a saved plan trains like the original: on 2 ranks, with the full model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_accuracy import table_bytes
from torchrec.distributed.types import ShardingPlan

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import UserError
from a2gen_rec.sharding.planner import PlanningProblem, make_plan
from a2gen_rec.sharding.report_builder import describe_plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_dataset
from a2gen_rec.training.build import EMBEDDINGS_FQN, build_training_model
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import full_tables, make_card, small_config, write_dataset
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.processes

KINDS = {"user_id": "row_wise", "item_id": "column_wise", "author_id": "table_wise", "tab": "column_wise"}


def large_card() -> DatasetCard:
    card = make_card()
    rows = {"user_id": 30_001, "item_id": 40_000, "author_id": 9_000, "tab": 5_000}
    features = [replace(feature, cardinality=rows.get(feature.name, 4)) for feature in card.features]
    return replace(card, features=features)


def make_config(optimizer: str, dtype: str) -> Config:
    config = small_config(dim=32, num_heads=2)
    config.optim.sparse_optimizer, config.sharding.dtype = optimizer, dtype  # type: ignore[assignment]
    config.loader.max_impressions_per_batch = 64
    return config


def make_problem(card: DatasetCard, config: Config, process: DistributedContext) -> PlanningProblem:
    return PlanningProblem(
        workload_from_dataset(card, config),
        Cluster.from_local_process(process.device, process.world_size, process.local_world_size, config.sharding),
        config,
    )


def rank_bytes(process: DistributedContext, config: Config) -> tuple[int, int, int]:
    """Return planned bytes of weights and states, all planned bytes, and allocated bytes."""
    card = large_card()
    case = make_problem(card, config, process)
    plans = {}
    for kind in ("row_wise", "column_wise", "table_wise"):
        sharding = replace(config.sharding, sharding_types=[kind])  # type: ignore[list-item]
        plans[kind] = make_plan(replace(case, config=replace(config, sharding=sharding)))
    chosen = {name: plans[KINDS.get(name, "table_wise")].chosen[name] for name in plans["row_wise"].chosen}
    plan = replace(plans["row_wise"], chosen=chosen)
    report = describe_plan(case, plan)
    placement = SavedPlan.from_plan(plan, case).to_torchrec(process.device, process.local_world_size)
    built = build_training_model(card, config, process, ShardingPlan({EMBEDDINGS_FQN: placement}))
    shards = [shard for table in report.tables for shard in table.shards if shard.rank == process.rank]
    permanent = sum(shard.weights + shard.optimizer for shard in shards)
    return permanent, report.ranks[process.rank].ddr, table_bytes(built.model_parallel)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("rowwise_adagrad", "fp32"), ("rowwise_adagrad", "fp16"), ("adagrad", "fp16"), ("sgd", "fp32")],
)
def test_allocated_bytes_equal_planned_bytes(optimizer: str, dtype: str, tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, rank_bytes, make_config(optimizer, dtype))
    assert ranks[0][0] != ranks[1][0], "equal bytes on both ranks would hide an error of one rank"
    for permanent, planned, allocated in ranks:
        assert allocated == pytest.approx(permanent, rel=0.001)
        assert allocated == pytest.approx(planned, rel=0.1)


def losses(process: DistributedContext, dataset: str, config: Config) -> tuple[list[float], str]:
    """Return the losses of a few steps, and the applied plan."""
    card = DatasetCard.load(dataset)
    built = build_training_model(card, config, process)
    columns = read_columns(read_row_groups(sorted(str(file) for file in Path(dataset, "train").iterdir())), card)
    step_losses = []
    for step in range(8):
        rows = np.random.default_rng(step).permutation(len(columns))[:16]
        batch = collate(columns, rows[process.rank :: process.world_size], full_tables(card, config))
        built.optimizer.zero_grad()
        loss, _ = built.model_parallel(batch)
        loss.backward()
        built.optimizer.step()
        step_losses.append(float(loss.detach()))
    return step_losses, str(built.plan)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("dataset") / "data", make_card()))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_saved_plan_trains_like_the_original(dtype: str, dataset: str, tmp_path: Path) -> None:
    config = make_config("rowwise_adagrad", dtype)
    config.sharding.sharding_types = ["table_wise"]
    expected = on_ranks(2, tmp_path, losses, dataset, config)
    case = make_problem(DatasetCard.load(dataset), config, DistributedContext(0, 2, 2, torch.device("cpu")))
    file = str(tmp_path / "plan.yaml")
    SavedPlan.from_plan(make_plan(case), case).save(file)
    from_file = replace(config, sharding=replace(config.sharding, plan_file=file, sharding_types=["row_wise"]))
    assert on_ranks(2, tmp_path, losses, dataset, from_file) == expected
    assert (
        on_ranks(2, tmp_path, losses, dataset, replace(from_file, sharding=replace(from_file.sharding, plan_file="")))
        != expected
    )
    assert expected[0][0][-1] < expected[0][0][0], "without learning, the comparison would be empty"


def error_message(process: DistributedContext, dataset: str, config: Config) -> str:
    with pytest.raises(UserError) as caught:
        build_training_model(DatasetCard.load(dataset), config, process)
    return str(caught.value)


def test_all_ranks_reject_a_plan_for_another_world_size(dataset: str, tmp_path: Path) -> None:
    config = make_config("rowwise_adagrad", "fp32")
    case = make_problem(DatasetCard.load(dataset), config, DistributedContext(0, 4, 4, torch.device("cpu")))
    config.sharding.plan_file = str(tmp_path / "plan.yaml")
    SavedPlan.from_plan(make_plan(case), case).save(config.sharding.plan_file)
    messages = on_ranks(2, tmp_path, error_message, dataset, config)
    assert messages[0] == messages[1]
    assert "plan.yaml: plan was made for 4 ranks, this job has 2" in messages[0]


def test_all_ranks_report_tables_that_do_not_fit(dataset: str, tmp_path: Path) -> None:
    config = make_config("rowwise_adagrad", "fp32")
    config.sharding.ddr_gb = 1e-6
    first, second = on_ranks(2, tmp_path, error_message, dataset, config)
    assert first == second
    assert first.startswith("the embedding tables do not fit on 2 rank(s): with optimizer states they need ")
