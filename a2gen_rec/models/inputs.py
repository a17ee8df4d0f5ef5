"""Features and numbers of users, items and contexts as one vector per level; all rankers share it."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard, FeatureLevel
from a2gen_rec.models.embedding_tables import module_key

INPUT_LEVELS: tuple[FeatureLevel, ...] = ("user", "item", "context")


class LevelInputs(nn.Module):
    """Inputs of each level: concatenated embeddings of the features, a linear map of the numbers, and one per vector.

    The embedding of a multi-valued feature is the weighted mean of its values' embeddings.

    A number has two inputs, its standardized value and whether it is missing; the value of a missing one is 0.

    Args:
        card: Dataset card.
        features: Level -> names of the features that the ranker uses.
        dim: Width of an embedding, and of the map of all numbers of a level.

    Attributes:
        widths: Level -> width of its inputs.
    """

    def __init__(self, card: DatasetCard, features: Mapping[FeatureLevel, Sequence[str]], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.features = {level: list(features[level]) for level in INPUT_LEVELS}
        self.counts = {level: len(card.numbers_at(level)) for level in INPUT_LEVELS}
        self.numbers = nn.ModuleDict(
            {level: nn.Linear(2 * count, dim, bias=False) for level, count in self.counts.items() if count}
        )
        self.rms = {vector.name: vector.rms for vector in card.vectors}
        self.vectors = nn.ModuleDict(
            {module_key(vector.name): nn.Linear(vector.width + 1, dim, bias=False) for vector in card.vectors}
        )
        self.widths = {level: dim * (len(self.features[level]) + (self.counts[level] > 0)) for level in INPUT_LEVELS}
        self.widths["item"] += dim * len(card.vectors)

    def forward(self, looked_up: Mapping[str, Tensor], batch: WindowBatch, *levels: FeatureLevel) -> Tensor:
        """Return [windows or impressions, d] inputs of the levels, level by level; windows for the user level."""
        parts = []
        for level in levels:
            parts += [_embed(name, looked_up[name], batch) for name in self.features[level]]
            if level in self.numbers:
                parts.append(self.numbers[level](self._numbers(batch, level)))
            if level == "item":
                parts += [self._vector(name, batch) for name in self.rms]
        return torch.cat(parts, dim=-1)

    def columns(self, features: Collection[str]) -> list[int]:
        """Return the positions of features among the embeddings of all levels, in units of the embeddings' width."""
        positions, first = [], 0
        for level in INPUT_LEVELS:
            positions += [first + index for index, name in enumerate(self.features[level]) if name in features]
            first += self.widths[level] // self.dim
        return positions

    def _vector(self, name: str, batch: WindowBatch) -> Tensor:
        """Return [impressions, dim] of the items' vectors and of whether they are missing."""
        layer = self.vectors[module_key(name)]
        values = batch.vectors[name] / self.rms[name]
        missing = torch.isnan(values[:, :1])
        inputs = torch.cat([values.masked_fill(missing, 0), missing.to(values.dtype)], dim=1)
        projected: Tensor = layer(inputs.to(next(layer.parameters()).dtype))
        return projected.index_select(0, batch.vector_index)

    def _numbers(self, batch: WindowBatch, level: FeatureLevel) -> Tensor:
        """Return [windows or impressions, 2 * numbers] values and whether they are missing."""
        if level == "user":
            values = batch.user_numbers
        else:
            item, context = batch.numbers.split([self.counts["item"], self.counts["context"]], dim=1)
            values = item if level == "item" else context
        missing = torch.isnan(values)
        values = torch.cat([values.masked_fill(missing, 0), missing.to(values.dtype)], dim=1)
        return values.to(next(self.numbers.parameters()).dtype)


def _embed(feature: str, rows: Tensor, batch: WindowBatch) -> Tensor:
    """Return the embeddings [windows or impressions, dim] of a feature, given its looked-up rows."""
    if feature not in batch.bags:
        return batch.expand_rows(feature, rows)
    bag = batch.bags[feature]
    index = batch.row_index.get(feature)
    if index is None:
        index = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(index, rows, bag.offsets, mode="sum", per_sample_weights=bag.weights.to(rows.dtype))
