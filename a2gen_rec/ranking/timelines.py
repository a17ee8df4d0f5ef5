"""Most probable action sequences of a generator, with times in seconds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.scoring import TargetPredictions
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.nn.marginals import top_sequences
from a2gen_rec.ranking.types import MAX_SEQUENCES, Timeline


def top_timelines(
    ranker: BaseRanker[Any], predictions: TargetPredictions, targets: Tensor, k: Sequence[int], card: DatasetCard
) -> list[list[tuple[Timeline, float]]]:
    """Return the ``k`` [n] most probable sequences of each target in ``targets`` [n], all distinct, see
    :func:`timelines`. Rankers without a generator return none."""
    if predictions.marginals.prefix_tree:
        return timelines(top_sequences(predictions.marginals, targets, max(k)), k, card)
    encoded = predictions.encoding
    if not ranker.is_generative:
        return [[]] * len(targets)
    return timelines(ranker.decode(replace(encoded, context=encoded.context[targets]), MAX_SEQUENCES), k, card)


def timelines(decoded: DecodedSequences, k: Sequence[int], card: DatasetCard) -> list[list[tuple[Timeline, float]]]:
    """Return the sequences of each target with their probabilities, most probable first; at most ``k`` [n] each."""
    seconds = torch.expm1(decoded.time).clamp(min=0).tolist()
    probabilities = decoded.log_probability.exp().tolist()
    targets = zip(decoded.action.tolist(), seconds, probabilities, k, strict=True)
    return [
        [
            (_timeline(codes, times, card), probability)
            for codes, times, probability in islice(zip(*beams, strict=True), count)
            if probability > 0
        ]
        for *beams, count in targets
    ]


def _timeline(codes: list[int], seconds: list[float], card: DatasetCard) -> Timeline:
    steps = [(card.actions[code], time) for code, time in zip(codes, seconds, strict=True) if code >= 0]
    return [(card.actions[0], 0.0), *((name, time if name in card.timed_actions else None) for name, time in steps)]
