"""Index structures for ragged data, built once on the host and carried with the batch.

Sequences of one length form a dense tensor without padding. Sorting sequences by length therefore turns ragged
work into a few dense pieces whose cost follows the number of real tokens, and the sizes of the pieces are known
on the host, so that no accelerator has to be asked for them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthGroups:
    """Sequences ordered by length.

    Attributes:
        order: [sequences] sequence at each sorted place; ``inverse`` undoes it.
        token_order: [tokens] token at each sorted place; ``token_inverse`` undoes it.
        sizes: (length, number of sequences) of every group, ascending by length, empty sequences included.
    """

    order: Tensor
    inverse: Tensor
    token_order: Tensor
    token_inverse: Tensor
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> "LengthGroups":
        """Group sequences given their lengths [sequences] (int64, on the host)."""
        order = torch.argsort(lengths, stable=True)
        sorted_lengths = lengths[order]
        starts = torch.cumsum(lengths, 0) - lengths
        sorted_starts = torch.cumsum(sorted_lengths, 0) - sorted_lengths
        tokens = int(lengths.sum())
        shift = torch.repeat_interleave(starts[order] - sorted_starts, sorted_lengths, output_size=tokens)
        token_order = torch.arange(tokens) + shift
        values, counts = torch.unique_consecutive(sorted_lengths, return_counts=True)
        return cls(
            order=order,
            inverse=_inverse(order),
            token_order=token_order,
            token_inverse=_inverse(token_order),
            sizes=tuple(zip(values.tolist(), counts.tolist(), strict=True)),
        )

    def map(
        self, piece: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, context: Tensor, per_token: bool
    ) -> Tensor:
        """Apply ``piece`` to every group of equally long sequences.

        Args:
            piece: ([m, length, d], [m, d_context]) -> [m, length, d_out] if ``per_token`` else [m, d_out].
            tokens: [tokens, d], sequences one after another.
            context: [sequences, d_context].

        Returns:
            [tokens, d_out] or [sequences, d_out] in the callers' order. Empty sequences give zeros.
        """
        tokens, context = tokens[self.token_order], context[self.order]
        outputs, first_token, first = [], 0, 0
        for length, count in self.sizes:
            if length:
                part = tokens[first_token : first_token + length * count].view(count, length, *tokens.shape[1:])
                output = piece(part, context[first : first + count])
                outputs.append(output.flatten(0, 1) if per_token else output)
            first_token, first = first_token + length * count, first + count
        empty = self.sizes[0][1] if self.sizes and self.sizes[0][0] == 0 else 0
        if not outputs:
            # Nothing to work on: run the piece on no rows, so that shapes and gradients stay defined.
            output = piece(tokens.new_zeros(0, 1, *tokens.shape[1:]), context[:0])
            outputs.append(output.flatten(0, 1) if per_token else output)
        if empty and not per_token:
            outputs.insert(0, outputs[0].new_zeros(empty, *outputs[0].shape[1:]))
        return torch.cat(outputs)[self.token_inverse if per_token else self.inverse]

    def to(self, device: torch.device, non_blocking: bool = False) -> "LengthGroups":
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.order, self.inverse, self.token_order, self.token_inverse):
            part.record_stream(stream)

    def pin_memory(self) -> "LengthGroups":
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LengthGroups":
        return LengthGroups(
            change(self.order),
            change(self.inverse),
            change(self.token_order),
            change(self.token_inverse),
            self.sizes,
        )


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation)))


def pad(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Tensor:
    """Lay flat rows [n, *d] out as [*shape, *d] at (row, column); the rest is zero."""
    return values.new_zeros(*shape, *values.shape[1:]).index_put((row, column), values)


def positions(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence, place within it) of every token, given lengths [sequences]. Both [tokens], int64."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    return sequence, torch.arange(len(sequence), device=lengths.device) - starts[sequence]
