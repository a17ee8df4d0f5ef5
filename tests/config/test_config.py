"""Settings that cannot work are refused by name, and the defaults can."""

import dataclasses
import math
from typing import Any

import pytest

from a2gen_rec.config import (
    Config,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    PlannerFeature,
    ShardingConfig,
    SimulateConfig,
    TrainConfig,
    WorkloadConfig,
)
from a2gen_rec.config.parse import config_from_dict
from a2gen_rec.errors import ConfigError, DataError, UserError

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {"dim": 30, "num_heads": 2}, "model.dim 30"),
    (ModelConfig, {"dim": 32, "num_heads": 3}, "model.num_heads 3"),
    (ModelConfig, {"dim": 0}, "model.dim 0"),
    (ModelConfig, {"dim": -8, "num_heads": 2}, "model.dim -8"),
    (ModelConfig, {"num_heads": 0}, "model.num_heads 0"),
    (ModelConfig, {"num_heads": -2}, "model.num_heads -2"),
    (ModelConfig, {"time_buckets": 3}, "model.time_buckets 3"),
    (ModelConfig, {"history": -1}, "model.max_history -1"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout 1.0"),
    (ModelConfig, {"dropout": -0.1}, "model.dropout -0.1"),
    (ModelConfig, {"dropout": math.nan}, "model.dropout nan"),
    (ModelConfig, {"mlp_ratio": -1.0}, "model.mlp_ratio -1.0"),
    (ModelConfig, {"tower_mlp_ratio": 0.0}, "model.tower_mlp_ratio 0.0"),
    (ModelConfig, {"max_action_time_s": 0.0}, "model.max_action_time_s 0.0"),
    (ModelConfig, {"max_gap_s": -5.0}, "model.max_gap_s -5.0"),
    (ModelConfig, {"shared_experts": -1}, "model.shared_experts -1"),
    (ModelConfig, {"task_experts": -2}, "model.task_experts -2"),
    (LossConfig, {"objective": -1.0}, "loss.default_objective_weight -1.0"),
    (LossConfig, {"objective": math.nan}, "loss.default_objective_weight nan"),
    (LossConfig, {"objectives": {"effective": 1.0, "glance": -0.5}}, "loss.objective_weights.glance -0.5"),
    (LossConfig, {"objectives": {"glance": math.nan}}, "loss.objective_weights.glance nan"),
    (LoaderConfig, {"max_impressions": 0}, "loader.max_impressions_per_batch 0"),
    (LoaderConfig, {"max_windows": -1}, "loader.max_windows_per_batch -1"),
    (LoaderConfig, {"buffer_windows": 0}, "loader.shuffle_buffer_size 0"),
    (TrainConfig, {"seed": -1}, "train.seed -1"),
    (ShardingConfig, {"kernels": []}, "sharding.compute_kernels"),
    (ShardingConfig, {"cache_load_factor": 0.0}, "sharding.cache_load_factor 0.0"),
    (ShardingConfig, {"cache_load_factor": 1.0}, "sharding.cache_load_factor 1.0"),
    (ShardingConfig, {"reserve": 1.0}, "sharding.storage_reservation 1.0"),
    (PlannerFeature, {"level": "user", "rows": 0}, "rows 0"),
    (PlannerFeature, {"level": "user", "rows": 1, "zipf": -0.1}, "zipf -0.1"),
    (WorkloadConfig, {"windows": -1}, "workload.windows_per_batch -1"),
    (SimulateConfig, {"users": 0}, "users 0"),
    (SimulateConfig, {"seed": -1}, "seed -1"),
    (SimulateConfig, {"like_rate": 0.0}, "like_rate 0.0"),
    (SimulateConfig, {"forward_rate": 0.51}, "forward_rate 0.51"),
    (SimulateConfig, {"glance_rate": 0.7, "long_view_rate": 0.3}, "glance_rate"),
    (SimulateConfig, {"long_view_rate": 0.0}, "long_view_rate"),
    (SimulateConfig, {"interest_share": 1.5}, "interest_share 1.5"),
    (SimulateConfig, {"quality": -0.1}, "quality -0.1"),
    (SimulateConfig, {"hook": 11.0}, "hook 11.0"),
]


@pytest.mark.parametrize(("section", "settings", "named"), REFUSED)
def test_what_cannot_work_is_named(section: type, settings: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**settings)
    message = str(caught.value)
    assert named in message
    assert "must" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        (ModelConfig, {"dim": 4, "num_heads": 1, "time_buckets": 4, "mlp_ratio": 0.0, "dropout": 0.0}),
        (ModelConfig, {"dim": 24, "num_heads": 3, "history": 1, "dropout": 0.9}),
        (ModelConfig, {"shared_experts": 0, "task_experts": 1}),
        (ModelConfig, {"shared_experts": 1, "task_experts": 0}),
        (LossConfig, {"objective": 0.0, "objectives": {"glance": 0.0}, "uncertainty_weighting": True}),
        (LoaderConfig, {"max_impressions": 1, "max_windows": 1, "buffer_windows": 1}),
        (TrainConfig, {"seed": 0}),
        (SimulateConfig, {"users": 1, "items": 1, "impressions_per_user": 1}),
    ],
)
def test_what_lies_on_the_border_is_taken(section: type, settings: dict) -> None:
    made = section(**settings)
    assert all(getattr(made, name) == value for name, value in settings.items())


def test_objectives_need_an_expert() -> None:
    with pytest.raises(ConfigError, match=r"^model\.shared_experts and model\.own_experts leave no expert$"):
        ModelConfig(shared_experts=0, task_experts=0)


def test_without_order_no_times_are_put_in_order() -> None:
    with pytest.raises(ConfigError, match=r"^model\.time_head 'monotonic' .*model\.action_order false"):
        ModelConfig(time_head="monotonic", use_action_order=False)


def test_sections_are_not_shared_between_configurations() -> None:
    left, right = Config(), Config()
    assert left == right
    left.model.dim = 64
    left.sharding.sharding_types.append("column_wise")
    left.loss.objective_weights["glance"] = 0.5
    assert right.model.dim == 32
    assert right == Config()
    assert {field.name for field in dataclasses.fields(Config)} == set(vars(left))


def test_errors_tell_where() -> None:
    assert ConfigError.exit_code == 2
    assert UserError.exit_code == DataError.exit_code == 1
    assert str(DataError("is bad", file="a.csv", row=0, field="x")) == "a.csv, row 0, field 'x': is bad"
    assert str(DataError("is bad", file="a.csv", field="x")) == "a.csv, field 'x': is bad"
    assert str(DataError("is bad", row=7)) == "row 7: is bad"
    assert str(DataError("is bad")) == "is bad"


def test_plain_settings_become_a_configuration() -> None:
    made = config_from_dict({"model": {"dim": 16, "action_pooling": "none"}, "loss": {"objectives": {"glance": 0.5}}})
    assert made == Config(ModelConfig(dim=16, action_pooling="off"), LossConfig(objective_weights={"glance": 0.5}))
    assert config_from_dict({}) == Config()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modle": {}}, "no section 'modle'; there are model, loss"),
        ({"model": 3}, "model must hold settings, not 3"),
        ({"model": {"dmi": 3}}, "'dmi'"),
        ({"model": {"dim": "wide"}}, "model.dim"),
        ({"model": {"dim": 30}}, "model.dim 30 must be"),
    ],
)
def test_plain_settings_that_cannot_be_used(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(settings)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
