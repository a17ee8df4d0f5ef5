"""The action sequences that a generator finds likeliest, in seconds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.a2gen import A2GenEncoded, DenseRanker
from a2gen_rec.models.base import Ranker
from a2gen_rec.models.scoring import Judged
from a2gen_rec.nn.decoding import Decoded
from a2gen_rec.nn.marginals import likeliest
from a2gen_rec.ranking.types import Timeline

MOST_SEQUENCES = 8
"""That can be told of a candidate."""


def likely_timelines(
    ranker: Ranker[Any], judged: Judged, best: Tensor, most: Sequence[int], card: DatasetCard
) -> list[list[tuple[Timeline, float]]]:
    """The likeliest sequences of each target in ``best`` [n], all distinct, see :func:`timelines`; none from a ranker
    that generates none."""
    if judged.what.tree:
        return timelines(likeliest(judged.what, best, max(most)), most, card)
    encoded = judged.encoded
    if not isinstance(ranker, DenseRanker) or not isinstance(encoded, A2GenEncoded):
        return [[]] * len(best)
    return timelines(ranker.decode(replace(encoded, context=encoded.context[best]), MOST_SEQUENCES), most, card)


def timelines(decoded: Decoded, most: Sequence[int], card: DatasetCard) -> list[list[tuple[Timeline, float]]]:
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
    return [(card.actions[0], 0.0), *((name, time if name in card.timed else None) for name, time in steps)]
