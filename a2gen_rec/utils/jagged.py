"""Index structures for ragged data, built once on the host and carried with the batch.

Sequences of one length form a dense tensor without padding. Sorting sequences by length therefore turns ragged
work into a few dense pieces whose cost follows the number of real tokens, and the sizes of the pieces are known
on the host, so that no accelerator has to be asked for them. Lengths that few sequences have share a piece with the
next longer ones, padded: a piece of its own would cost more in calls than it saves in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthBuckets:
    """Sequences ordered by length, in groups padded to their longest.

    Attributes:
        order: [sequences] sequence at each sorted place; ``inverse`` undoes it.
        lengths: [sequences] length at each sorted place.
        token_order: [slots] token at each place of the groups, a sequence's last one at its padding;
            ``token_inverse``: [tokens] the slot of each.
        sizes: (padded length, number of sequences, whether any is padded) of every group, ascending by length; empty
            sequences are a group of their own.
    """

    order: Tensor
    inverse: Tensor
    lengths: Tensor
    token_order: Tensor
    token_inverse: Tensor
    sizes: tuple[tuple[int, int, bool], ...]

    @classmethod
    def from_lengths(cls, lengths: Tensor, bucket_overhead: int = 0) -> "LengthBuckets":
        """Group sequences given their lengths [sequences] (int64, on the host).

        Args:
            group_cost: padding tokens that a group may save; 0 pads none, a large number pads all to the longest.
        """
        if not len(lengths):
            return cls(lengths, lengths, lengths, lengths, lengths, ())
        order = torch.argsort(lengths, stable=True)
        sorted_lengths = lengths[order]
        values, counts = torch.unique_consecutive(sorted_lengths, return_counts=True)
        sizes = _optimal_buckets(values.tolist(), counts.tolist(), bucket_overhead)
        padded = torch.tensor([length for length, count, _ in sizes for _ in range(count)], dtype=torch.long)
        sequence, place = jagged_positions(padded)
        starts = (torch.cumsum(lengths, 0) - lengths)[order]
        last = sorted_lengths[sequence] - 1
        token_order = starts[sequence] + torch.minimum(place, last)
        real = place <= last
        token_inverse = torch.empty(int(lengths.sum()), dtype=torch.long)
        token_inverse[token_order[real]] = real.nonzero().squeeze(1)
        return cls(order, _inverse(order), sorted_lengths, token_order, token_inverse, sizes)

    def apply(
        self, fn: Callable[[Tensor, Tensor, Tensor | None], Tensor], tokens: Tensor, context: Tensor, per_token: bool
    ) -> Tensor:
        """Apply ``piece`` to every group.

        Args:
            piece: ([m, length, d], [m, d_context], [m, length] bool of real tokens or None where all are) ->
                [m, length, d_out] if ``per_token`` else [m, d_out].
            tokens: [tokens, d], sequences one after another.
            context: [sequences, d_context].

        Returns:
            [tokens, d_out] or [sequences, d_out] in the callers' order. Empty sequences give zeros.
        """
        tokens, context = tokens[self.token_order], context[self.order]
        outputs, first_token, first = [], 0, 0
        for length, count, padded in self.sizes:
            if length:
                part = tokens[first_token : first_token + length * count].view(count, length, *tokens.shape[1:])
                real = None
                if padded:
                    place = torch.arange(length, device=tokens.device)
                    real = place < self.lengths[first : first + count, None]
                output = fn(part, context[first : first + count], real)
                outputs.append(output.flatten(0, 1) if per_token else output)
            first_token, first = first_token + length * count, first + count
        empty = self.sizes[0][1] if self.sizes and self.sizes[0][0] == 0 else 0
        if not outputs:
            # Nothing to work on: run the piece on no rows, so that shapes and gradients stay defined.
            output = fn(tokens.new_zeros(0, 1, *tokens.shape[1:]), context[:0], None)
            outputs.append(output.flatten(0, 1) if per_token else output)
        if empty and not per_token:
            outputs.insert(0, outputs[0].new_zeros(empty, *outputs[0].shape[1:]))
        return torch.cat(outputs)[self.token_inverse if per_token else self.inverse]

    def to(self, device: torch.device, non_blocking: bool = False) -> "LengthBuckets":
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.order, self.inverse, self.lengths, self.token_order, self.token_inverse):
            part.record_stream(stream)

    def pin_memory(self) -> "LengthBuckets":
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LengthBuckets":
        return LengthBuckets(
            change(self.order),
            change(self.inverse),
            change(self.lengths),
            change(self.token_order),
            change(self.token_inverse),
            self.sizes,
        )


def _optimal_buckets(lengths: list[int], counts: list[int], group_cost: int) -> tuple[tuple[int, int, bool], ...]:
    """The groups of least cost, given distinct ascending lengths and how many sequences have each."""
    empty = 1 if lengths[:1] == [0] else 0
    # best[j]: cost of the lengths before j, and where the last of their groups begins.
    best = [(0, 0)] * (empty + 1)
    for end in range(empty + 1, len(lengths) + 1):
        costs = [best[begin][0] + group_cost + lengths[end - 1] * sum(counts[begin:end]) for begin in range(empty, end)]
        cheapest = min(costs)
        best.append((cheapest, empty + costs.index(cheapest)))
    groups, end = [], len(lengths)
    while end > empty:
        begin = best[end][1]
        groups.append((lengths[end - 1], sum(counts[begin:end]), end - begin > 1))
        end = begin
    return (*((0, counts[0], False) for _ in range(empty)), *reversed(groups))


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation)))


def jagged_to_padded_dense(
    values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], fill: int = 0
) -> Tensor:
    """Lay flat rows [n, *d] out as [*shape, *d] at (row, column), which ascend and differ; the rest is ``fill``."""
    if len(values) == shape[0] * shape[1]:  # there is no rest
        return values.unflatten(0, shape)
    return values.new_full((*shape, *values.shape[1:]), fill).index_put((row, column), values)


def padded_dense_to_jagged(padded: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """What :func:`pad` was given, [n, *d]."""
    if len(row) == padded.shape[0] * padded.shape[1]:
        return padded.flatten(0, 1)
    return padded[row, column]


def jagged_positions(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence, place within it) of every token, given lengths [sequences]. Both [tokens], int64."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    return sequence, torch.arange(len(sequence), device=lengths.device) - starts[sequence]
