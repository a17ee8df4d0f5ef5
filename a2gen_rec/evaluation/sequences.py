"""Full action sequences: observed frequency against the frequency expected by the model [ours].

A generator may predict every action's rate correctly but combine actions into unrealistic sequences. The expected
frequency of a sequence is its mean probability over targets. It is known if beam search ends with the sequence and
counted as 0 otherwise, so it is too low by at most the mass outside the beams.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import BaseRanker, TargetEncoding

BEAM_WIDTH = 16
MAX_DECODED_TARGETS = 4096

Codes = tuple[int, ...]
"""Action codes, ``exit`` last."""


class SequenceEvaluator:
    """Accumulator of observed and generated sequences for evenly spaced targets of a split.

    Args:
        ranker: Ranker; baselines without a generator are ignored.
        total: Number of targets on all ranks; about ``MAX_DECODED_TARGETS`` of them are decoded.
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
        """Add a batch; no-op for models that are not generative."""
        if not self.ranker.is_generative:
            return
        first = -self.num_targets % self.stride
        self.num_targets += len(batch.target)
        sampled = torch.arange(len(batch.target), device=batch.target.device)[first :: self.stride]
        if not len(sampled):
            return
        self.num_decoded += len(sampled)
        observed = observed_sequences(batch, in_order=self.ranker.config.use_action_order)[sampled]
        for sequence, count, _ in _distinct(observed, torch.ones(len(observed))):
            self.observed[sequence] += count
        decoded = self.ranker.decode(replace(output, context=output.context[sampled]), BEAM_WIDTH)
        probability = decoded.log_probability.exp()
        for sequence, _, mass in _distinct(decoded.action.flatten(0, 1), probability.flatten()):
            self.expected[sequence] += mass
        self.covered_mass += float(probability.sum())
        self.most_probable |= {sequence for sequence, _, _ in _distinct(decoded.action[:, 0], probability[:, 0])}

    def report(self, card: DatasetCard, k: int) -> dict[str, Any] | None:
        """Return the report over all ranks; None for models that are not generative. Called by all ranks.

        Args:
            card: Dataset card.
            k: Number of sequences in ``most_frequent``.

        Returns:
            ``targets``: Number of decoded targets, one of every ``stride``.
            ``beam_width``: Beams per target.
            ``covered_mass``: Mean total probability of the beams.
            ``distinct``: Number of distinct sequences, ``observed`` and ``generated`` (most probable of a target).
            ``most_frequent``: The ``k`` most frequently observed sequences with ``actions`` and the frequencies
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
        # Break ties by sequence, independent of the ranks.
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
    """Return [targets, max length] action codes of each target up to ``exit``, then -1.

    Args:
        batch: Batch of windows.
        in_order: Keep the order of the log; otherwise sort by code, as models without action order generate.
    """
    target_index = batch.step_target_index
    steps = torch.bincount(target_index, minlength=len(batch.target))
    position = torch.arange(len(target_index), device=target_index.device) - (steps.cumsum(0) - steps)[target_index]
    padding = torch.iinfo(torch.long).max
    codes = target_index.new_full((len(batch.target), int(steps.max()) if len(steps) else 0), padding)
    codes[target_index, position] = batch.step_label
    if not in_order:
        codes = codes.sort(1).values
    return codes.masked_fill(codes == padding, -1)


def _distinct(codes: Tensor, weight: Tensor) -> list[tuple[Codes, int, float]]:
    """Return codes, count and total weight [n] of each distinct sequence in ``codes`` [n, max length]."""
    rows, index, count = np.unique(codes.cpu().numpy(), axis=0, return_inverse=True, return_counts=True)
    mass = np.bincount(index.ravel(), weight.double().cpu().numpy(), len(rows))
    sequences = [tuple(code for code in row if code >= 0) for row in rows.tolist()]
    return list(zip(sequences, count.tolist(), mass.tolist(), strict=True))
