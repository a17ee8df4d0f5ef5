"""What a candidate's score is made of."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["probability", "s"]


@dataclass(frozen=True)
class Contribution:
    """One objective's part in a candidate's score; the score is the sum of its objectives' shares, METHODS §6.

    Attributes:
        objective: its name; higher_is_better: direction in which it is better.
        prediction: in its ``unit``, a probability or seconds.
        transform, weight: of the ensemble for this user and candidate.
    """

    objective: str
    higher_is_better: bool
    prediction: float
    transform: float
    weight: float
    unit: Unit = "probability"

    @property
    def contribution(self) -> float:
        """What it adds to the score: weight · transform, of either sign."""
        return self.weight * self.transform
