"""Planned bytes are allocated bytes, and a saved plan trains as the planner's own: on 2 ranks, with the real model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_accuracy import table_bytes
from torchrec.distributed.types import ShardingPlan

from a2gen_rec.config import Config
from a2gen_rec.data.batch import collate
from a2gen_rec.data.parquet_reader import read_columns, row_groups
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.sharding.planner import PlanningProblem, plan
from a2gen_rec.sharding.report_builder import describe_plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_dataset
from a2gen_rec.training.build import EMBEDDINGS_FQN, build_training_model
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import make_card, small_config, whole, write_dataset
from tests.helpers.distributed import on_ranks

KINDS = {"user_id": "row_wise", "item_id": "column_wise", "author_id": "table_wise", "tab": "column_wise"}


def large_card() -> DatasetCard:
    card = make_card()
    rows = {"user_id": 30_001, "item_id": 40_000, "author_id": 9_000, "tab": 5_000}
    features = [replace(feature, cardinality=rows.get(feature.name, 4)) for feature in card.features]
    return replace(card, features=features)


def config_of(optimizer: str, dtype: str) -> Config:
    config = small_config(dim=32, heads=2)
    config.optim.sparse_optimizer, config.sharding.dtype = optimizer, dtype  # type: ignore[assignment]
    config.loader.max_impressions_per_batch = 64
    return config


def problem_of(card: DatasetCard, config: Config, process: DistributedContext) -> PlanningProblem:
    return PlanningProblem(
        workload_from_dataset(card, config),
        Cluster.from_local_process(process.device, process.world_size, process.local_world_size, config.sharding),
        config,
    )


def bytes_of_rank(process: DistributedContext, config: Config) -> tuple[int, int, int]:
    """Planned weights and states, planned in all, allocated."""
    card = large_card()
    asked = problem_of(card, config, process)
    plans = {}
    for kind in ("row_wise", "column_wise", "table_wise"):
        sharding = replace(config.sharding, sharding_types=[kind])  # type: ignore[list-item]
        plans[kind] = plan(replace(asked, config=replace(config, sharding=sharding)))
    chosen = {name: plans[KINDS.get(name, "table_wise")].chosen[name] for name in plans["row_wise"].chosen}
    found = replace(plans["row_wise"], chosen=chosen)
    report = describe_plan(asked, found)
    placement = SavedPlan.from_plan(found, asked).to_torchrec(process.device, process.local_world_size)
    built = build_training_model(card, config, process, ShardingPlan({EMBEDDINGS_FQN: placement}))
    shards = [shard for table in report.tables for shard in table.shards if shard.rank == process.rank]
    held = sum(shard.weights + shard.optimizer for shard in shards)
    return held, report.ranks[process.rank].ddr, table_bytes(built.model_parallel)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("rowwise_adagrad", "fp32"), ("rowwise_adagrad", "fp16"), ("adagrad", "fp16"), ("sgd", "fp32")],
)
def test_ranks_allocate_what_was_planned(optimizer: str, dtype: str, tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, bytes_of_rank, config_of(optimizer, dtype))
    assert ranks[0][0] != ranks[1][0], "a plan that is the same everywhere would hide a rank's mistake"
    for held, planned, allocated in ranks:
        assert allocated == pytest.approx(held, rel=0.001)
        assert allocated == pytest.approx(planned, rel=0.1)


def losses(process: DistributedContext, dataset: str, config: Config) -> tuple[list[float], str]:
    """Losses of a few steps, and the plan that was followed."""
    card = DatasetCard.load(dataset)
    built = build_training_model(card, config, process)
    columns = read_columns(row_groups(sorted(str(file) for file in Path(dataset, "train").iterdir())), card)
    found = []
    for step in range(8):
        rows = np.random.default_rng(step).permutation(len(columns))[:16]
        batch = collate(columns, rows[process.rank :: process.world_size], whole(card, config))
        built.optimizer.zero_grad()
        loss, _ = built.model_parallel(batch)
        loss.backward()
        built.optimizer.step()
        found.append(float(loss.detach()))
    return found, str(built.plan)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("dataset") / "data", make_card()))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_saved_plan_trains_as_the_planners_own(dtype: str, dataset: str, tmp_path: Path) -> None:
    config = config_of("rowwise_adagrad", dtype)
    config.sharding.sharding_types = ["table_wise"]
    own = on_ranks(2, tmp_path, losses, dataset, config)
    asked = problem_of(DatasetCard.load(dataset), config, DistributedContext(0, 2, 2, torch.device("cpu")))
    file = str(tmp_path / "plan.yaml")
    SavedPlan.from_plan(plan(asked), asked).save(file)
    followed = replace(config, sharding=replace(config.sharding, plan_file=file, sharding_types=["row_wise"]))
    assert on_ranks(2, tmp_path, losses, dataset, followed) == own
    assert (
        on_ranks(2, tmp_path, losses, dataset, replace(followed, sharding=replace(followed.sharding, plan_file="")))
        != own
    )
    assert own[0][0][-1] < own[0][0][0], "it must learn something, or nothing is compared"


def refusal(process: DistributedContext, dataset: str, config: Config) -> str:
    with pytest.raises(UserError) as caught:
        build_training_model(DatasetCard.load(dataset), config, process)
    return str(caught.value)


def test_all_ranks_refuse_a_plan_for_others(dataset: str, tmp_path: Path) -> None:
    config = config_of("rowwise_adagrad", "fp32")
    asked = problem_of(DatasetCard.load(dataset), config, DistributedContext(0, 4, 4, torch.device("cpu")))
    config.sharding.plan_file = str(tmp_path / "plan.yaml")
    SavedPlan.from_plan(plan(asked), asked).save(config.sharding.plan_file)
    messages = on_ranks(2, tmp_path, refusal, dataset, config)
    assert messages[0] == messages[1]
    assert "plan.yaml: this plan has 4 ranks, here it is 2" in messages[0]


def test_all_ranks_are_told_what_does_not_fit(dataset: str, tmp_path: Path) -> None:
    config = config_of("rowwise_adagrad", "fp32")
    config.sharding.ddr_gb = 1e-6
    first, second = on_ranks(2, tmp_path, refusal, dataset, config)
    assert first == second
    assert first.startswith("the embedding tables do not fit on 2 rank(s): with their optimizer states they are ")
