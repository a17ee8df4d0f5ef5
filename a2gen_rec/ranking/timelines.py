"""The action sequences that a generator finds likeliest, in seconds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.a2gen import A2GenEncoding, A2GenRanker
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.scoring import TargetPredictions
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.nn.marginals import top_sequences
from a2gen_rec.ranking.types import Timeline

MAX_SEQUENCES = 8
"""That can be told of a candidate."""


def top_timelines(
    ranker: BaseRanker[Any], judged: TargetPredictions, best: Tensor, k: Sequence[int], card: DatasetCard
) -> list[list[tuple[Timeline, float]]]:
    """The likeliest sequences of each target in ``best`` [n], all distinct, see :func:`timelines`; none from a ranker
    that generates none."""
    if judged.marginals.prefix_tree:
        return timelines(top_sequences(judged.marginals, best, max(k)), k, card)
    encoded = judged.encoding
    if not isinstance(ranker, A2GenRanker) or not isinstance(encoded, A2GenEncoding):
        return [[]] * len(best)
    return timelines(ranker.decode(replace(encoded, context=encoded.context[best]), MAX_SEQUENCES), k, card)


def timelines(decoded: DecodedSequences, most: Sequence[int], card: DatasetCard) -> list[list[tuple[Timeline, float]]]:
    """Sequences of every candidate and their probabilities, the most probable first; ``most`` [n] of each."""
    seconds = torch.expm1(decoded.time).clamp(min=0).tolist()
    chances = decoded.log_probability.exp().tolist()
    candidates = zip(decoded.action.tolist(), seconds, chances, most, strict=True)
    return [
        [
            (_timeline(codes, times, card), chance)
            for codes, times, chance in islice(zip(*beams, strict=True), count)
            if chance > 0
        ]
        for *beams, count in candidates
    ]


def _timeline(codes: list[int], seconds: list[float], card: DatasetCard) -> Timeline:
    steps = [(card.actions[code], time) for code, time in zip(codes, seconds, strict=True) if code >= 0]
    return [(card.actions[0], 0.0), *((name, time if name in card.timed_actions else None) for name, time in steps)]
