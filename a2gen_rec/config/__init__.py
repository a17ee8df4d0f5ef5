"""Typed dataclasses of all settings and their defaults.

A YAML file holds the fields of :class:`Config`; ``--model.dim 64`` on the command line overrides one of them. Every
field is documented by the string below it. Units are in the names (``_s`` seconds, ``_ms`` milliseconds) or there.
"""

from a2gen_rec.config.backtest import BacktestConfig
from a2gen_rec.config.data import PrepareConfig, SimulateConfig
from a2gen_rec.config.ensemble import EnsembleConfig
from a2gen_rec.config.gbdt import GBDTConfig
from a2gen_rec.config.model import LossConfig, ModelConfig
from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.config.sharding import PlannerFeature, ShardingConfig, WorkloadConfig
from a2gen_rec.config.training import Config, EvaluateConfig, ForkMergeConfig, LoaderConfig, OptimConfig, TrainConfig

__all__ = [
    "BacktestConfig",
    "Config",
    "EnsembleConfig",
    "EvaluateConfig",
    "ForkMergeConfig",
    "GBDTConfig",
    "LoaderConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PlannerFeature",
    "PrepareConfig",
    "ServeConfig",
    "ShardingConfig",
    "SimulateConfig",
    "TrainConfig",
    "WorkloadConfig",
]
