"""The action level of a window model with every sequence padded to the longest: what grouping by length saves."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from a2gen_rec.models.a2gen import DenseRanker
from a2gen_rec.nn.encoder import HierarchicalEncoder
from a2gen_rec.nn.generator import ExplicitGenerator, StepEmbeddings, Steps
from a2gen_rec.ragged import LengthGroups, pad, positions


def pad_actions(ranker: DenseRanker) -> None:
    """Let ``ranker`` pad past action sequences and the targets' steps; its results stay the same."""
    encoder, generator = ranker.encoder, ranker.generator
    if not isinstance(generator, ExplicitGenerator):
        raise ValueError("the implicit generator reads no action sequences")
    encoder.encode_actions = partial(_encode_actions, encoder)  # type: ignore[method-assign]
    generator.forward = partial(_generate, generator)  # type: ignore[method-assign]


class Padded(LengthGroups):
    """All sequences as one group: their length that of the longest."""

    @classmethod
    def of(cls, groups: LengthGroups) -> "Padded":
        return cls(**vars(groups))

    def places(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(sequence, place within it) of every token; shape (sequences, longest)."""
        device = self.inverse.device
        sizes = torch.tensor(self.sizes, dtype=torch.long, device=device).view(-1, 2)
        lengths = torch.repeat_interleave(sizes[:, 0], sizes[:, 1], output_size=len(self.inverse))[self.inverse]
        longest = max((length for length, _ in self.sizes), default=0)
        return *positions(lengths), (len(lengths), max(1, longest))

    def map(
        self, piece: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, context: Tensor, per_token: bool
    ) -> Tensor:
        """As :meth:`LengthGroups.map` per token, of a causal ``piece``: it never looks at the padding, which follows.

        Raises:
            ValueError: not per token.
        """
        if not per_token:
            raise ValueError("a padded sequence has no output of its own")
        row, column, shape = self.places()
        return piece(pad(tokens, row, column, shape), context)[row, column]


def _encode_actions(encoder: HierarchicalEncoder, tokens: Tensor, item: Tensor, groups: LengthGroups) -> Tensor:
    row, column, shape = Padded.of(groups).places()
    real = pad(torch.ones_like(row, dtype=torch.bool), row, column, shape)
    padded = pad(tokens, row, column, shape)
    return encoder.action_level.pooled(padded, item[:, None], real[:, None], form="direct").squeeze(1)


def _generate(
    generator: ExplicitGenerator,
    action: Tensor,
    offset_s: Tensor,
    label: Tensor,
    context: Tensor,
    groups: LengthGroups,
    tables: StepEmbeddings,
) -> tuple[Steps, Steps | None]:
    return ExplicitGenerator.forward(generator, action, offset_s, label, context, Padded.of(groups), tables)
