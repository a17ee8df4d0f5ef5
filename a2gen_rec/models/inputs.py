"""Features and numbers of users, items and contexts as one vector per level; all rankers share it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.inputs import Number, Vector
from a2gen_rec.data.schema import FeatureLevel, Statistic
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.embedding_tables import is_used_by, module_key

INPUT_LEVELS: tuple[FeatureLevel, ...] = ("user", "item", "context")


@dataclass(frozen=True)
class UsedInputs:
    """Inputs of a dataset that a model reads: all except ``model.excluded_inputs``.

    Attributes:
        features: Level -> names of features.
        numbers: Level -> numbers.
        vectors: Vectors of items.
        statistics: Statistics of item feature values.
        number_columns: Level -> columns of the numbers in a batch.
        statistic_columns: Columns of the statistics in a batch.
    """

    features: dict[FeatureLevel, list[str]]
    numbers: dict[FeatureLevel, list[Number]]
    vectors: list[Vector]
    statistics: list[Statistic]
    number_columns: dict[FeatureLevel, list[int]]
    statistic_columns: list[int]

    @classmethod
    def from_card(cls, card: DatasetCard, config: ModelConfig) -> "UsedInputs":
        """Return the inputs of a model.

        Raises:
            ConfigError: an excluded input does not exist, or no item feature is left.
        """
        excluded = set(config.excluded_inputs)
        names = [*(value.name for value in card.inputs), *(vector.name for vector in card.vectors)]
        if unknown := sorted(excluded.difference(names)):
            raise ConfigError(
                f"model.excluded_inputs: the dataset has no input {unknown[0]!r}, only {', '.join(names)}"
            )
        features = {
            level: [feature.name for feature in card.features_at(level) if is_used_by(config, feature)]
            for level in get_args(FeatureLevel)
        }
        if not features["item"]:
            raise ConfigError("model.excluded_inputs excludes all item features")
        columns = {"user": card.numbers_at("user"), "item": card.numbers_at("item", "context")}
        columns["context"] = columns["item"]  # one matrix in a batch
        number_columns = {
            level: [
                column
                for column, number in enumerate(columns[level])
                if number.level == level and number.name not in excluded
            ]
            for level in INPUT_LEVELS
        }
        statistic_columns = [i for i, statistic in enumerate(card.statistics) if statistic.feature not in excluded]
        return cls(
            features,
            {level: [columns[level][column] for column in number_columns[level]] for level in INPUT_LEVELS},
            [vector for vector in card.vectors if vector.name not in excluded],
            [card.statistics[column] for column in statistic_columns],
            number_columns,
            statistic_columns,
        )

    def read_numbers(self, batch: WindowBatch, level: FeatureLevel) -> Tensor:
        """Return [windows or impressions, numbers] of a level; windows for the user level."""
        values = batch.user_numbers if level == "user" else batch.numbers
        return _select(values, self.number_columns[level])

    def read_statistics(self, batch: WindowBatch) -> Tensor:
        """Return [targets, statistics] of item feature values."""
        return _select(batch.statistics, self.statistic_columns)


class LevelInputs(nn.Module):
    """Inputs of each level: concatenated embeddings of the features, a linear map of the numbers, and one per vector.

    The embedding of a multi-valued feature is the weighted mean of its values' embeddings.

    A number has two inputs, its standardized value and whether it is missing; the value of a missing one is 0.

    Args:
        used: Inputs that the model reads.
        dim: Width of an embedding, and of the map of all numbers of a level.

    Attributes:
        widths: Level -> width of its inputs.
    """

    def __init__(self, used: UsedInputs, dim: int) -> None:
        super().__init__()
        self.used, self.dim = used, dim
        self.features = {level: used.features[level] for level in INPUT_LEVELS}
        self.numbers = nn.ModuleDict(
            {level: nn.Linear(2 * len(numbers), dim, bias=False) for level, numbers in used.numbers.items() if numbers}
        )
        self.rms = {vector.name: vector.rms for vector in used.vectors}
        self.vectors = nn.ModuleDict(
            {module_key(vector.name): nn.Linear(vector.width + 1, dim, bias=False) for vector in used.vectors}
        )
        self.widths = {level: dim * (len(self.features[level]) + (level in self.numbers)) for level in INPUT_LEVELS}
        self.widths["item"] += dim * len(used.vectors)

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
        values = self.used.read_numbers(batch, level)
        missing = torch.isnan(values)
        values = torch.cat([values.masked_fill(missing, 0), missing.to(values.dtype)], dim=1)
        return values.to(next(self.numbers.parameters()).dtype)


def _select(values: Tensor, columns: Sequence[int]) -> Tensor:
    """Return some columns of [n, columns] values, in order; a view if they are contiguous."""
    if not columns:
        return values[:, :0]
    first, last = columns[0], columns[-1]
    return values[:, first : last + 1] if last - first + 1 == len(columns) else values[:, list(columns)]


def _embed(feature: str, rows: Tensor, batch: WindowBatch) -> Tensor:
    """Return the embeddings [windows or impressions, dim] of a feature, given its looked-up rows."""
    if feature not in batch.bags:
        return batch.expand_rows(feature, rows)
    bag = batch.bags[feature]
    index = batch.row_index.get(feature)
    if index is None:
        index = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(index, rows, bag.offsets, mode="sum", per_sample_weights=bag.weights.to(rows.dtype))
