"""Lookups of a rank: the formula against exact sums, random draws and the loader's batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from a2gen_rec.config import PlannerFeature, WorkloadConfig
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.schema import SplitSummary
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.sharding.planner import PlanningProblem, make_plan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import expected_unique, workload_from_dataset, workload_from_features
from tests.helpers.cards import full_tables, make_card, small_config, write_dataset

FEATURES = {"user_id": PlannerFeature("user", 1000), "item_id": PlannerFeature("item", 5000, zipf_exponent=1.0)}
COUNTS = WorkloadConfig(windows_per_batch=10, impressions_per_batch=300, targets_per_batch=40, num_actions=5)


def reference(draws: float, rows: int, zipf_exponent: float) -> float:
    weight = np.arange(1, rows + 1, dtype=np.float64) ** -zipf_exponent
    with np.errstate(divide="ignore"):
        return float(-np.expm1(draws * np.log1p(-weight / weight.sum())).sum())


@pytest.mark.parametrize("zipf_exponent", [0.0, 0.7, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("rows", [1, 7, 100_000, 100_001, 3_000_000])
@pytest.mark.parametrize("draws", [1.0, 50.0, 200_000.0])
def test_expected_unique_equals_the_exact_sum(draws: float, rows: int, zipf_exponent: float) -> None:
    result = expected_unique(draws, rows, zipf_exponent)
    assert result == pytest.approx(reference(draws, rows, zipf_exponent), rel=1e-6)
    assert result <= min(draws, rows) * (1 + 1e-9)


def test_expected_unique_of_ten_billion_rows() -> None:
    draws, rows = 30_000, 10**10
    assert expected_unique(draws, rows) == pytest.approx(draws - draws**2 / 2 / rows, rel=1e-6)
    assert expected_unique(draws, rows, 0.8) < draws
    assert expected_unique(draws, rows, 1.2) < expected_unique(draws, rows, 1.0) < expected_unique(draws, rows, 0.8)


def test_expected_unique_equals_the_mean_of_random_draws() -> None:
    rng = np.random.default_rng(0)
    weight = np.arange(1, 501, dtype=np.float64) ** -0.9
    counts = [len(np.unique(rng.choice(500, 200, p=weight / weight.sum()))) for _ in range(400)]
    assert np.mean(counts) == pytest.approx(expected_unique(200, 500, 0.9), rel=0.01)


def test_planned_features_are_looked_up_by_level() -> None:
    config = small_config()
    workload = workload_from_features(FEATURES, COUNTS, config)
    lookups = {table.name: table.lookups for table in workload.tables}
    assert lookups["user_id"] == pytest.approx(expected_unique(10, 1000))
    assert lookups["item_id"] == pytest.approx(expected_unique(300, 5000, 1.0))
    assert lookups["action"] == 5
    assert lookups["time_bucket"] == lookups["gap_bucket"] == config.model.time_buckets
    config.loader.deduplicate_ids = False
    assert {table.name: table.lookups for table in workload_from_features(FEATURES, COUNTS, config).tables}[
        "item_id"
    ] == 300


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({}, []),
        ({"predict_objectives": True}, []),
        ({"session_features": True}, ["session_position", "session_gap", "previous_feedback"]),
        ({"feedback_encoding": "tokens"}, ["feedback", "watch_ratio"]),
        (
            {"session_features": True, "feedback_encoding": "dual_view"},
            ["session_position", "session_gap", "previous_feedback", "feedback", "watch_ratio"],
        ),
    ],
)
def test_plans_session_and_outcome_tables_that_the_model_uses(switches: dict, names: list[str]) -> None:
    """Planned features include all of them with the rows of ``prepare``; a dataset has the tables of its card."""
    config, card = small_config(**switches), make_card()
    planned, prepared = workload_from_features(FEATURES, COUNTS, config), workload_from_dataset(card, config)
    always = ["action", "time_bucket", "gap_bucket"]
    assert [table.name for table in planned.tables] == ["user_id", "item_id", *always, *names]
    assert {table.name: table.rows for table in prepared.tables} == EmbeddingTables.from_card(card, config.model).rows
    assert [table.name for table in prepared.tables][-len(always + names) :] == always + names
    rows = {"session_position": 10, "session_gap": 14, "previous_feedback": 6, "feedback": 6, "watch_ratio": 15}
    for table in planned.tables[5:]:
        assert table.rows == table.ids == table.lookups == rows[table.name]
        assert not table.dedup


@pytest.mark.parametrize(
    "name", ["session_gap", "action", "Time_Bucket", "", "a.b", "a/b", "..", "label_click", "ITEM_ID"]
)
def test_rejects_names_that_prepare_rejects(name: str) -> None:
    with pytest.raises(DataError, match=r"reserved name|name is empty|invalid name"):
        workload_from_features(FEATURES | {name: PlannerFeature("item", 9)}, COUNTS, small_config())


def test_plans_features_named_like_module_attributes() -> None:
    names = ["type", "training", "forward", "to", "keys", "items"]
    features = FEATURES | {name: PlannerFeature("item", 9) for name in names}
    workload = workload_from_features(features, COUNTS, small_config())
    cluster = Cluster("laptop", "cpu", 2, 2, ddr_gb=8.0, ddr_gbps=40.0, intra_host_gbps=20.0, inter_host_gbps=1.0)
    plan = make_plan(PlanningProblem(workload, cluster, small_config()))
    assert [name for name in plan.chosen if name in names] == names


@pytest.mark.parametrize("switches", [{}, {"session_features": True, "feedback_encoding": "dual_view"}])
def test_workload_from_dataset_matches_the_loader(switches: dict, tmp_path: Path) -> None:
    card, config = make_card(), small_config(**switches)
    config.loader.max_impressions_per_batch, config.loader.shuffle_buffer_size = 64, 4096
    dataset = str(write_dataset(tmp_path / "data", card))
    batches = list(WindowDataset(Dataset(dataset, card), "train", config.loader, full_tables(card, config)))
    full = [batch for batch in batches if int(batch.lengths.sum()) >= 50]
    train = {
        "windows": sum(len(batch.lengths) for batch in batches),
        "targets": sum(len(batch.target) for batch in batches),
    }
    splits = {"train": SplitSummary(first_ms=0, last_ms=0, positives={}, feedback={}, **train)}
    workload = workload_from_dataset(replace(card, splits=splits), config)
    for table in workload.tables:
        mean = np.mean([len(batch.sparse[table.name].values()) for batch in full])
        # Windows of this dataset have 5.5 impressions; the plan assumes the full history and targets.
        assert mean * 0.5 <= table.lookups <= mean * 1.6, table.name
    assert workload.impressions_per_batch == 64


def test_changes_numbers_of_rows() -> None:
    workload = workload_from_features(FEATURES, COUNTS, small_config())
    smaller = workload.with_rows({"item_id": 50})
    assert [table.rows for table in smaller.tables][:2] == [1000, 50]
    assert smaller.tables[1].lookups == pytest.approx(expected_unique(300, 50, 1.0))
    with pytest.raises(ConfigError, match="unknown table 'item'; choose one of user_id, item_id"):
        workload.with_rows({"item": 50})


def test_rejects_an_incomplete_description() -> None:
    with pytest.raises(ConfigError, match=r"workload\.targets_per_batch is required"):
        workload_from_features(FEATURES, replace(COUNTS, targets_per_batch=0), small_config())
    with pytest.raises(ConfigError, match="no tables to plan"):
        workload_from_features({}, COUNTS, small_config())
