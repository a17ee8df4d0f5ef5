"""Score contributions of the ensemble's objectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["probability", "s"]


@dataclass(frozen=True)
class Contribution:
    """Contribution of one objective to a candidate's score; the score is the sum over objectives, METHODS §6.

    Attributes:
        objective: Name of the objective.
        higher_is_better: Whether a higher prediction raises the score.
        prediction: Probability or seconds, see ``unit``.
        transform: Monotonic transform of the prediction for this user and candidate.
        weight: Weight of the objective for this user and candidate.
        unit: Unit of the prediction.
    """

    objective: str
    higher_is_better: bool
    prediction: float
    transform: float
    weight: float
    unit: Unit = "probability"

    @property
    def contribution(self) -> float:
        """Signed contribution to the score: weight · transform."""
        return self.weight * self.transform


def weight_entropy(explanation: Sequence[Contribution]) -> float:
    """Return the entropy of the objectives' weights, divided by that of equal weights.

    It is 0 if one objective has all the weight, and 1 if all have the same.
    """
    entropy = -math.fsum(part.weight * math.log(part.weight) for part in explanation if part.weight > 0)
    return entropy / math.log(max(len(explanation), 2))
