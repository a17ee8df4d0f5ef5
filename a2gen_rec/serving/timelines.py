"""The action sequences that a generator finds likeliest, in seconds."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.a2gen import A2GenEncoded, DenseRanker
from a2gen_rec.models.ranker import Encoded, Ranker
from a2gen_rec.nn.decoding import Decoded
from a2gen_rec.serving.types import Timeline

BEAMS = 8


def likely_timelines(
    ranker: Ranker[Any], encoded: Encoded, best: Tensor, card: DatasetCard
) -> list[tuple[Timeline, float]]:
    """Timeline and its probability of each target in ``best`` [n]; empty and NaN from a ranker that generates none."""
    if not isinstance(ranker, DenseRanker) or not isinstance(encoded, A2GenEncoded):
        return [([], math.nan)] * len(best)
    return timelines(ranker.decode(replace(encoded, context=encoded.context[best]), BEAMS), card)


def timelines(decoded: Decoded, card: DatasetCard) -> list[tuple[Timeline, float]]:
    """The most probable sequence of every candidate, and its probability."""
    seconds = torch.expm1(decoded.time[:, 0]).clamp(min=0).tolist()
    chance = decoded.log_probability[:, 0].exp().tolist()
    start: tuple[str, float | None] = (card.actions[0], 0.0)
    found = []
    for codes, times, probability in zip(decoded.action[:, 0].tolist(), seconds, chance, strict=True):
        steps = [(card.actions[code], time) for code, time in zip(codes, times, strict=True) if code >= 0]
        found.append(([start, *((name, time if name in card.timed else None) for name, time in steps)], probability))
    return found
