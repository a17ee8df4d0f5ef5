"""Whole action sequences: how often each happens, against how often the model expects it [ours].

A generator may have every action's rate right and still put them together as no user does. What it expects of a
sequence is the mean, over targets, of the probability it gives to exactly that one: known where beam search ends with
it, else counted as 0, and so too low by at most what the beams leave out.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.losses.targets import step_target_index
from a2gen_rec.models.a2gen import A2GenEncoding, A2GenRanker
from a2gen_rec.models.base import BaseRanker, TargetEncoding

BEAM_WIDTH = 16
MAX_DECODED_TARGETS = 4096

Codes = tuple[int, ...]
"""Codes of actions, ``exit`` last."""


class SequenceEvaluator:
    """Collects observed and generated sequences of a split's targets, evenly spaced ones where there are many.

    Args:
        total: targets of the split on all ranks, of which about ``TARGETS`` are decoded.
    """

    def __init__(self, ranker: BaseRanker[Any], total: int) -> None:
        self.ranker = ranker
        self.stride = max(1, round(total / MAX_DECODED_TARGETS))
        self.num_targets = self.num_decoded = 0
        self.observed: Counter[Codes] = Counter()
        self.most_probable: set[Codes] = set()
        self.expected: defaultdict[Codes, float] = defaultdict(float)
        self.covered_mass = 0.0

    def add(self, output: TargetEncoding, batch: WindowBatch) -> None:
        """Take note of a batch; of models that generate nothing there is nothing to note."""
        if not isinstance(self.ranker, A2GenRanker) or not isinstance(output, A2GenEncoding):
            return
        first = -self.num_targets % self.stride
        self.num_targets += len(batch.target)
        chosen = torch.arange(len(batch.target), device=batch.target.device)[first :: self.stride]
        if not len(chosen):
            return
        self.num_decoded += len(chosen)
        happened = observed_sequences(batch, in_order=self.ranker.config.use_action_order)[chosen]
        for sequence, count, _ in _distinct(happened, torch.ones(len(happened))):
            self.observed[sequence] += count
        decoded = self.ranker.decode(replace(output, context=output.context[chosen]), BEAM_WIDTH)
        probability = decoded.log_probability.exp()
        for sequence, _, mass in _distinct(decoded.action.flatten(0, 1), probability.flatten()):
            self.expected[sequence] += mass
        self.covered_mass += float(probability.sum())
        self.most_probable |= {sequence for sequence, _, _ in _distinct(decoded.action[:, 0], probability[:, 0])}

    def report(self, card: DatasetCard, k: int) -> dict[str, Any] | None:
        """What all ranks have seen; None of models that generate nothing. All ranks call it.

        Returns:
            ``targets`` that were decoded, one of every ``every``, with ``beams`` that cover so much of the probability
            on average (``covered``); how many sequences are ``distinct``: ``observed``, and ``generated`` as a target's
            likeliest; ``most_frequent``: the ``most`` most often observed ones, ``actions`` and their frequencies
            ``observed`` and ``expected``.
        """
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            parts, (self.num_decoded, self.observed, dict(self.expected), self.covered_mass, self.most_probable)
        )
        targets = sum(part[0] for part in parts)
        if not targets:
            return None
        observed: Counter[Codes] = sum((part[1] for part in parts), Counter())
        # Ties in one order, whatever the ranks.
        first = sorted(observed, key=lambda sequence: (-observed[sequence], sequence))[:k]
        return {
            "targets": targets,
            "stride": self.stride,
            "beam_width": BEAM_WIDTH,
            "covered_mass": sum(part[3] for part in parts) / targets,
            "distinct": {"observed": len(observed), "generated": len(set().union(*(part[4] for part in parts)))},
            "most_frequent": [
                {
                    "actions": [card.actions[code] for code in sequence],
                    "observed": observed[sequence] / targets,
                    "expected": sum(part[2].get(sequence, 0.0) for part in parts) / targets,
                }
                for sequence in first
            ],
        }


def observed_sequences(batch: WindowBatch, in_order: bool = True) -> Tensor:
    """[targets, longest] codes of what happened in each target up to ``exit``, -1 beyond it.

    Args:
        in_order: as the log has them, else in the order of the vocabulary, which a model without order generates.
    """
    owner = step_target_index(batch)
    steps = torch.bincount(owner, minlength=len(batch.target))
    place = torch.arange(len(owner), device=owner.device) - (steps.cumsum(0) - steps)[owner]
    last = torch.iinfo(torch.long).max
    codes = owner.new_full((len(batch.target), int(steps.max()) if len(steps) else 0), last)
    codes[owner, place] = batch.step_label
    if not in_order:
        codes = codes.sort(1).values
    return codes.masked_fill(codes == last, -1)


def _distinct(codes: Tensor, weight: Tensor) -> list[tuple[Codes, int, float]]:
    """Each of the sequences [n, longest] once: its codes, how often it is there, and the sum of its weights [n]."""
    rows, place, count = np.unique(codes.cpu().numpy(), axis=0, return_inverse=True, return_counts=True)
    mass = np.bincount(place.ravel(), weight.double().cpu().numpy(), len(rows))
    sequences = [tuple(code for code in row if code >= 0) for row in rows.tolist()]
    return list(zip(sequences, count.tolist(), mass.tolist(), strict=True))
