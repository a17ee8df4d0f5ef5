"""Index structures for jagged data, built once on the host and carried with the batch.

Sequences of equal length form a dense tensor without padding. Sorting sequences by length therefore turns jagged
work into a few dense buckets whose cost follows the number of real tokens. Bucket sizes are known on the host, so no
accelerator has to be synchronized. Rare lengths share a padded bucket with the next longer ones: a separate bucket
would cost more in calls than it saves in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthBuckets:
    """Sequences sorted by length, in buckets padded to their longest sequence.

    Attributes:
        order: [sequences] sequence index at each sorted position.
        inverse: [sequences] sorted position of each sequence.
        lengths: [sequences] length at each sorted position.
        token_order: [slots] token index at each slot of the buckets; padding repeats a sequence's last token.
        token_inverse: [tokens] slot of each token.
        sizes: (padded length, number of sequences, whether any is padded) of every bucket, ascending by length; empty
            sequences form a separate bucket.
    """

    order: Tensor
    inverse: Tensor
    lengths: Tensor
    token_order: Tensor
    token_inverse: Tensor
    sizes: tuple[tuple[int, int, bool], ...]

    @classmethod
    def from_lengths(cls, lengths: Tensor, bucket_overhead: int = 0) -> "LengthBuckets":
        """Bucket sequences by their lengths.

        Args:
            lengths: [sequences] int64, on the host.
            bucket_overhead: Cost of one more bucket in padding tokens; 0 pads none, a large number pads all sequences
                to the longest.
        """
        if not len(lengths):
            return cls(lengths, lengths, lengths, lengths, lengths, ())
        order = torch.argsort(lengths, stable=True)
        sorted_lengths = lengths[order]
        values, counts = torch.unique_consecutive(sorted_lengths, return_counts=True)
        sizes = _optimal_buckets(values.tolist(), counts.tolist(), bucket_overhead)
        padded = torch.tensor([length for length, count, _ in sizes for _ in range(count)], dtype=torch.long)
        sequence, position = jagged_positions(padded)
        starts = (torch.cumsum(lengths, 0) - lengths)[order]
        last = sorted_lengths[sequence] - 1
        token_order = starts[sequence] + torch.minimum(position, last)
        is_real = position <= last
        token_inverse = torch.empty(int(lengths.sum()), dtype=torch.long)
        token_inverse[token_order[is_real]] = is_real.nonzero().squeeze(1)
        return cls(order, _inverse(order), sorted_lengths, token_order, token_inverse, sizes)

    def apply(
        self, fn: Callable[[Tensor, Tensor, Tensor | None], Tensor], tokens: Tensor, context: Tensor, per_token: bool
    ) -> Tensor:
        """Apply ``fn`` to every bucket.

        Args:
            fn: ([m, length, d], [m, d_context], [m, length] bool mask of real tokens or None if all are real) ->
                [m, length, d_out] if ``per_token`` else [m, d_out].
            tokens: [tokens, d], concatenated sequences.
            context: [sequences, d_context].
            per_token: Whether ``fn`` returns one output per token, not per sequence.

        Returns:
            [tokens, d_out] or [sequences, d_out] in the original order. Empty sequences give zeros.
        """
        tokens, context = tokens[self.token_order], context[self.order]
        outputs, first_token, first = [], 0, 0
        for length, count, padded in self.sizes:
            if length:
                part = tokens[first_token : first_token + length * count].view(count, length, *tokens.shape[1:])
                mask = None
                if padded:
                    position = torch.arange(length, device=tokens.device)
                    mask = position < self.lengths[first : first + count, None]
                output = fn(part, context[first : first + count], mask)
                outputs.append(output.flatten(0, 1) if per_token else output)
            first_token, first = first_token + length * count, first + count
        empty = self.sizes[0][1] if self.sizes and self.sizes[0][0] == 0 else 0
        if not outputs:
            # No tokens: run fn on zero rows, so that shapes and gradients stay defined.
            output = fn(tokens.new_zeros(0, 1, *tokens.shape[1:]), context[:0], None)
            outputs.append(output.flatten(0, 1) if per_token else output)
        if empty and not per_token:
            outputs.insert(0, outputs[0].new_zeros(empty, *outputs[0].shape[1:]))
        return torch.cat(outputs)[self.token_inverse if per_token else self.inverse]

    def to(self, device: torch.device, non_blocking: bool = False) -> "LengthBuckets":
        return self._map_tensors(lambda part: part.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.order, self.inverse, self.lengths, self.token_order, self.token_inverse):
            part.record_stream(stream)

    def pin_memory(self) -> "LengthBuckets":
        return self._map_tensors(lambda part: part.pin_memory())

    def _map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "LengthBuckets":
        return LengthBuckets(
            fn(self.order),
            fn(self.inverse),
            fn(self.lengths),
            fn(self.token_order),
            fn(self.token_inverse),
            self.sizes,
        )


def _optimal_buckets(lengths: list[int], counts: list[int], bucket_overhead: int) -> tuple[tuple[int, int, bool], ...]:
    """Return the buckets of minimum cost, given distinct ascending lengths and the number of sequences of each."""
    empty = 1 if lengths[:1] == [0] else 0
    # best[j]: cost of the lengths before j, and the start of their last bucket.
    best = [(0, 0)] * (empty + 1)
    for end in range(empty + 1, len(lengths) + 1):
        costs = [
            best[start][0] + bucket_overhead + lengths[end - 1] * sum(counts[start:end]) for start in range(empty, end)
        ]
        cheapest = min(costs)
        best.append((cheapest, empty + costs.index(cheapest)))
    buckets, end = [], len(lengths)
    while end > empty:
        start = best[end][1]
        buckets.append((lengths[end - 1], sum(counts[start:end]), end - start > 1))
        end = start
    return (*((0, counts[0], False) for _ in range(empty)), *reversed(buckets))


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation)))


def jagged_to_padded_dense(
    values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], fill: int = 0
) -> Tensor:
    """Scatter rows [n, *d] to [*shape, *d] at (row, column), ascending and distinct; other entries are ``fill``."""
    if len(values) == shape[0] * shape[1]:  # no other entries
        return values.unflatten(0, shape)
    return values.new_full((*shape, *values.shape[1:]), fill).index_put((row, column), values)


def padded_dense_to_jagged(padded: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the rows [n, *d] at (row, column): the inverse of :func:`jagged_to_padded_dense`."""
    if len(row) == padded.shape[0] * padded.shape[1]:
        return padded.flatten(0, 1)
    return padded[row, column]


def jagged_positions(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sequence index, position in it) of every token, both [tokens] int64, given lengths [sequences]."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    return sequence, torch.arange(len(sequence), device=lengths.device) - starts[sequence]
