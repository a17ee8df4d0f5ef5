"""Validation of settings, the text of every setting, and their help."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from a2gen_rec.config import (
    Config,
    EnsembleConfig,
    ForkMergeConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PlannerFeature,
    PrepareConfig,
    ShardingConfig,
    SimulateConfig,
    TrainConfig,
    WorkloadConfig,
)
from a2gen_rec.config.model import loss_weights
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.errors import ConfigError, DataError, UserError

INVALID: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {"dim": 30, "num_heads": 2}, "model.dim 30"),
    (ModelConfig, {"dim": 32, "num_heads": 3}, "model.num_heads 3"),
    (ModelConfig, {"dim": 0}, "model.dim 0"),
    (ModelConfig, {"dim": -8, "num_heads": 2}, "model.dim -8"),
    (ModelConfig, {"num_heads": 0}, "model.num_heads 0"),
    (ModelConfig, {"num_heads": -2}, "model.num_heads -2"),
    (ModelConfig, {"time_buckets": 3}, "model.time_buckets 3"),
    (ModelConfig, {"max_history": -1}, "model.max_history -1"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout 1.0"),
    (ModelConfig, {"dropout": -0.1}, "model.dropout -0.1"),
    (ModelConfig, {"dropout": math.nan}, "model.dropout nan"),
    (ModelConfig, {"mlp_ratio": -1.0}, "model.mlp_ratio -1.0"),
    (ModelConfig, {"tower_mlp_ratio": 0.0}, "model.tower_mlp_ratio 0.0"),
    (ModelConfig, {"max_action_time_s": 0.0}, "model.max_action_time_s 0.0"),
    (ModelConfig, {"max_gap_s": -5.0}, "model.max_gap_s -5.0"),
    (ModelConfig, {"shared_experts": -1}, "model.shared_experts -1"),
    (ModelConfig, {"task_experts": -2}, "model.task_experts -2"),
    (LossConfig, {"default_objective_weight": -1.0}, "loss.default_objective_weight -1.0"),
    (LossConfig, {"default_objective_weight": math.nan}, "loss.default_objective_weight nan"),
    (LossConfig, {"objective_weights": {"effective": 1.0, "glance": -0.5}}, "loss.objective_weights.glance -0.5"),
    (LossConfig, {"objective_weights": {"glance": math.nan}}, "loss.objective_weights.glance nan"),
    (LoaderConfig, {"max_impressions_per_batch": 0}, "loader.max_impressions_per_batch 0"),
    (LoaderConfig, {"max_windows_per_batch": -1}, "loader.max_windows_per_batch -1"),
    (LoaderConfig, {"shuffle_buffer_size": 0}, "loader.shuffle_buffer_size 0"),
    (TrainConfig, {"seed": -1}, "train.seed -1"),
    (ShardingConfig, {"compute_kernels": []}, "sharding.compute_kernels"),
    (ShardingConfig, {"cache_load_factor": 0.0}, "sharding.cache_load_factor 0.0"),
    (ShardingConfig, {"cache_load_factor": 1.0}, "sharding.cache_load_factor 1.0"),
    (ShardingConfig, {"storage_reservation": 1.0}, "sharding.storage_reservation 1.0"),
    (ModelConfig, {"embedding_init_scale": -0.1}, "model.embedding_init_scale -0.1"),
    (PlannerFeature, {"level": "user", "rows": 0}, "rows 0"),
    (PlannerFeature, {"level": "user", "rows": 1, "zipf_exponent": -0.1}, "zipf_exponent -0.1"),
    (WorkloadConfig, {"windows_per_batch": -1}, "workload.windows_per_batch -1"),
    (WorkloadConfig, {"impressions_per_batch": 10**18}, "workload.impressions_per_batch 1000000000000000000"),
    (PrepareConfig, {"max_history": -1}, "max_history -1"),
    (PrepareConfig, {"memory_limit_gb": 0.0}, "memory_limit_gb 0.0"),
    (SimulateConfig, {"users": 0}, "users 0"),
    (SimulateConfig, {"seed": -1}, "seed -1"),
    (SimulateConfig, {"like_rate": 0.0}, "like_rate 0.0"),
    (SimulateConfig, {"forward_rate": 0.51}, "forward_rate 0.51"),
    (SimulateConfig, {"glance_rate": 0.7, "long_view_rate": 0.3}, "glance_rate"),
    (SimulateConfig, {"long_view_rate": 0.0}, "long_view_rate"),
    (SimulateConfig, {"personalized_share": 1.5}, "personalized_share 1.5"),
    (SimulateConfig, {"item_quality_std": -0.1}, "item_quality_std -0.1"),
    (SimulateConfig, {"hook_penalty": 11.0}, "hook_penalty 11.0"),
]


@pytest.mark.parametrize(("section", "settings", "expected"), INVALID)
def test_rejects_invalid_settings_by_name(section: type, settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**settings)
    message = str(caught.value)
    assert expected in message
    assert "must" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        (ModelConfig, {"dim": 4, "num_heads": 1, "time_buckets": 4, "mlp_ratio": 0.0, "dropout": 0.0}),
        (ModelConfig, {"dim": 24, "num_heads": 3, "max_history": 1, "dropout": 0.9}),
        (ModelConfig, {"shared_experts": 0, "task_experts": 1}),
        (ModelConfig, {"shared_experts": 1, "task_experts": 0}),
        (
            LossConfig,
            {"default_objective_weight": 0.0, "objective_weights": {"glance": 0.0}, "uncertainty_weighting": True},
        ),
        (LoaderConfig, {"max_impressions_per_batch": 1, "max_windows_per_batch": 1, "shuffle_buffer_size": 1}),
        (TrainConfig, {"seed": 0}),
        (SimulateConfig, {"users": 1, "items": 1, "impressions_per_user": 1}),
    ],
)
def test_accepts_boundary_values(section: type, settings: dict) -> None:
    config = section(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_requires_an_expert() -> None:
    with pytest.raises(ConfigError, match=r"^model\.shared_experts \+ model\.task_experts must be at least 1$"):
        ModelConfig(shared_experts=0, task_experts=0)


def test_monotonic_times_require_action_order() -> None:
    with pytest.raises(ConfigError, match=r"^model\.time_head 'monotonic' requires model\.use_action_order$"):
        ModelConfig(time_head="monotonic", use_action_order=False)


def test_branches_override_loss_weights_only() -> None:
    weights = {name for name in vars(LossConfig()) if name.endswith("_weight")}
    assert set(loss_weights()) == weights
    assert set().union(*ForkMergeConfig().branch_loss_weights) <= weights
    ForkMergeConfig(branch_loss_weights=[dict.fromkeys(weights, 0.5), {"some_objective": 2.0}])
    for name in vars(LossConfig()).keys() - weights:
        with pytest.raises(ConfigError, match=rf"loss\.{name} must be the same in all branches"):
            ForkMergeConfig(branch_loss_weights=[{}, {name: 1.0}])


def test_configs_share_no_sections() -> None:
    left, right = Config(), Config()
    assert left == right
    left.model.dim = 64
    left.sharding.sharding_types.append("column_wise")
    left.loss.objective_weights["glance"] = 0.5
    assert right.model.dim == 32
    assert right == Config()
    assert {field.name for field in dataclasses.fields(Config)} == set(vars(left))


def test_errors_name_the_location() -> None:
    assert ConfigError.exit_code == 2
    assert UserError.exit_code == DataError.exit_code == 1
    assert str(DataError("is bad", file="a.csv", row=0, field="x")) == "a.csv, row 0, field 'x': is bad"
    assert str(DataError("is bad", file="a.csv", field="x")) == "a.csv, field 'x': is bad"
    assert str(DataError("is bad", row=7)) == "row 7: is bad"
    assert str(DataError("is bad")) == "is bad"


def test_configs_of_equal_settings_are_independent() -> None:
    first = config_from_dict({"optim": {"dense_lr": 1}})
    first.optim.dense_lr = 0.5
    first.model.max_history = 3
    assert config_from_dict({"optim": {"dense_lr": 1}}) == Config(optim=OptimConfig(dense_lr=1.0))
    with pytest.raises(ConfigError, match="dense_lr"):
        config_from_dict({"optim": {"dense_lr": True}})


def test_config_from_dict() -> None:
    config = config_from_dict(
        {"model": {"dim": 16, "action_pooling": "none"}, "loss": {"objective_weights": {"glance": 0.5}}}
    )
    assert config == Config(ModelConfig(dim=16, action_pooling="none"), LossConfig(objective_weights={"glance": 0.5}))
    assert config_from_dict({}) == Config()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"modle": {}}, "unknown section 'modle'; choose one of model, loss"),
        ({"model": 3}, "model must be a mapping of settings, not 3"),
        ({"model": {"dmi": 3}}, "'model.dmi'"),
        ({"model": {"dim": "wide"}}, "model.dim"),
        ({"model": {"dim": 30}}, "model.dim 30 must be"),
    ],
)
def test_config_from_dict_rejects_invalid_settings(settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(settings)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ShardingConfig(hbm_gb=85_899_345_920),
            r"sharding.hbm_gb .* from 0 to 2,000 GB \(10\^9 bytes\) per rank",
        ),
        (lambda: ShardingConfig(ddr_gb=262_144), "sharding.ddr_gb .* from 0 to 20,000 GB"),
        (lambda: WorkloadConfig(8, 100, 200, 5), "workload.targets_per_batch 200 must be at most workload.impressions"),
        (lambda: WorkloadConfig(80, 100, 20, 5), "workload.windows_per_batch 80 must be at most workload.targets"),
        (lambda: TrainConfig(seed=2**64), r"train.seed 18446744073709551616 must be from 0 to 2\^32 - 1"),
        (lambda: EnsembleConfig(seed=2**40), "ensemble.seed 1099511627776 must be from 0 to"),
        (
            lambda: OptimConfig(sparse_weight_decay=0.1, sparse_optimizer="sgd"),
            "sparse_weight_decay 0.1 must be 0 with",
        ),
        (lambda: OptimConfig(sparse_weight_decay=0.1, sparse_optimizer="adagrad"), "must be 0 with"),
    ],
)
def test_rejects_numbers_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
