"""Factory of the models that a configuration names."""

from typing import Any

import torch

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.a2gen import A2GenRanker
from a2gen_rec.models.base import BaseRanker, RankingModel
from a2gen_rec.models.baselines.experts import MMoERanker, PLERanker
from a2gen_rec.models.baselines.hstu import HSTURanker
from a2gen_rec.models.independent import IndependentHeadsRanker

RANKERS: dict[str, type[BaseRanker[Any]]] = {
    "a2gen": A2GenRanker,
    "mmoe": MMoERanker,
    "ple": PLERanker,
    "hstu": HSTURanker,
}


def build_model(card: DatasetCard, config: Config, device: torch.device | None = None) -> RankingModel:
    """Return the tables and the ranker of ``config.model.name``; ``device`` is that of the tables."""
    return RankingModel(card, config, ranker_class(config.model), device)


def ranker_class(config: ModelConfig) -> type[BaseRanker[Any]]:
    """Return the class of the configured ranker, the model without its tables.

    Raises:
        ConfigError: The model has no tables.
    """
    if config.name not in RANKERS:
        raise ConfigError(f"model.name {config.name} has no embedding tables; use `a2gen train` and `a2gen evaluate`")
    ranker = RANKERS[config.name]
    return IndependentHeadsRanker if ranker is A2GenRanker and config.generator == "independent_heads" else ranker
