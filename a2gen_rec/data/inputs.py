"""Model inputs without an embedding table; parts of the dataset card."""

import math
from dataclasses import dataclass, replace
from operator import index
from typing import ClassVar, Literal

Level = Literal["user", "item", "context", "session", "outcome"]
Transform = Literal["none", "log1p"]


@dataclass(frozen=True)
class Number:
    """A number that describes a user, an item or the context of an impression.

    Datasets store it standardized: ``(transform(value) - mean) / std``, at most ``numbers.LIMIT`` in magnitude, and NaN
    if missing.

    Attributes:
        name: column name.
        level: entity that the number describes: ``user``, ``item`` or ``context``.
        transform: ``log1p`` of values of at least 0, or ``none``.
        mean: training mean of transformed values.
        std: training standard deviation of transformed values, above 0.
    """

    kind: ClassVar[Literal["number"]] = "number"
    name: str
    level: Level
    transform: Transform
    mean: float
    std: float

    def validated(self) -> "Number":
        """Return the number after a check of its fields: they become SQL.

        Raises:
            ValueError: a field is invalid.
        """
        mean, std = float(self.mean), float(self.std)
        if self.transform not in ("none", "log1p") or not math.isfinite(mean) or not 0 < std < math.inf:
            raise ValueError(f"number {self.name!r}: invalid transform, mean or standard deviation")
        return replace(self, mean=mean, std=std)


@dataclass(frozen=True)
class Vector:
    """A vector that describes an item, such as an embedding of its content; never trained.

    Attributes:
        name: name of the vector.
        width: number of elements.
        rms: root mean square of all elements; models divide by it.
    """

    kind: ClassVar[Literal["vector"]] = "vector"
    level: ClassVar[Level] = "item"
    name: str
    width: int
    rms: float

    def validated(self) -> "Vector":
        """Return the vector after a check of its fields.

        Raises:
            ValueError: a field is invalid.
        """
        width, rms = index(self.width), float(self.rms)
        if width < 1 or not 0 < rms < math.inf:
            raise ValueError(f"vector {self.name!r}: invalid width or root mean square")
        return replace(self, width=width, rms=rms)
