"""The ranker that a configuration names."""

from typing import Any

import torch

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.a2gen import DenseRanker
from a2gen_rec.models.base import Ranker, RankingModel
from a2gen_rec.models.baselines.experts import MMoERanker, PLERanker
from a2gen_rec.models.baselines.hstu import HSTURanker
from a2gen_rec.models.independent import IndependentRanker

RANKERS: dict[str, type[Ranker[Any]]] = {"a2gen": DenseRanker, "mmoe": MMoERanker, "ple": PLERanker, "hstu": HSTURanker}


def ranking_model(card: DatasetCard, config: Config, device: torch.device | None = None) -> RankingModel:
    """Tables and ranker of ``config.model.name``, with the arguments of :class:`RankingModel`."""
    return RankingModel(card, config, ranker_kind(config.model), device)


def ranker_kind(config: ModelConfig) -> type[Ranker[Any]]:
    """What the configuration names: all of the model but its tables."""
    kind = RANKERS[config.name]
    return IndependentRanker if kind is DenseRanker and config.generator == "independent" else kind
