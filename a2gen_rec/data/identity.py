"""Identity of a dataset: its lineage, and the encoding of every model input.

Shapes do not identify data. With vocabularies of bounded size and given bucket edges, the cards of two logs are equal
while row 17 of a table stands for another video. A run is therefore bound to the lineage of its training data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataIdentity:
    """Identity of a dataset; also recorded by everything that is made of it.

    Attributes:
        lineage: data digests of the increments, from the first to the dataset itself; a single log has one.
        inputs: model input -> digest of its encoding: of value and row for vocabularies, of edges, sizes or other
            parameters for other inputs; ``statistics of FEATURE`` -> digest of their definition.
    """

    lineage: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def data_digest(self) -> str:
        """Digest of the dataset's files; empty if unknown."""
        return self.lineage[-1] if self.lineage else ""

    def continues(self, earlier: "DataIdentity") -> bool:
        """Return whether this is the ``earlier`` data or a later increment of their lineage."""
        return bool(earlier.lineage) and self.lineage[: len(earlier.lineage)] == earlier.lineage

    def difference(self, earlier: "DataIdentity") -> str:
        """Return the first input that differs from the ``earlier`` data, with the reason; empty if none does.

        In a later increment of the same lineage none does: values keep their rows, and new values get free rows.
        """
        if self.continues(earlier) and self.lineage != earlier.lineage:
            return ""
        for name in earlier.inputs | self.inputs:
            if name not in self.inputs:
                return f"{name} is missing"
            if name not in earlier.inputs:
                return f"{name} is an additional input"
            if self.inputs[name] != earlier.inputs[name]:
                return f"{name} encodes values differently"
        return ""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DataIdentity":
        """Build an identity from plain data.

        Raises:
            KeyError, TypeError, AttributeError: an entry is missing or has another type.
        """
        return cls([str(digest) for digest in raw["lineage"]], {name: str(x) for name, x in raw["inputs"].items()})
