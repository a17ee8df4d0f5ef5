"""Settings of the ensemble: METHODS §6."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError


@dataclass
class EnsembleConfig:
    """UMRE: what it is trained for, how, and its size.

    Attributes:
        loss: against the combined relevance Σ_m ω_m y_m of the behaviours y.
        strategy: where the ω go. They stay (``fixed``), follow the behaviours' user AUC on validation (``pareto``), or
            the losses' gradients: the shortest mixture (``min_norm``), no ω below ``least_weight``
            (``pareto_efficient``).
        behaviours: behaviour -> ω to train and validate for, such as --behaviours.like 10 --behaviours.follow 1,
            made to sum to 1; empty takes all, weighed by balance.
        balance: with no weights given, ω_m ∝ rate_m^-balance; 0 weighs all alike, 1 gives every behaviour the same
            relevance to share out over its positives.
        eta: how strongly ω follows the user AUC.
        least_weight: lower bound on ω before it is made to sum to 1.
        greatest_weight: upper bound on ω before it is made to sum to 1.
        reweigh_every: batches between two looks at the losses' gradients.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        epochs: passes over the training lists; the best on validation is kept.
        patience: epochs without a better validation NDCG@k before stopping; 0 never stops early.
        batch_lists: lists per batch.
        dim: width of the user vector and the objectives' embeddings.
        hidden: widths of the layers of the transforms' rates of change.
        degree: of the quadrature of the transforms.
        events: most recent events of a user that the ensemble reads.
        gap_s: seconds between the begins of two impressions beyond which a list ends; 0 takes the dataset's sessions.
        k: candidates at the top that metrics look at.
        formula_trials: random settings tried for the formula baseline.
        seed: of initial parameters and of the order of lists.
    """

    loss: Literal["pointwise", "listwise", "pairwise"] = "listwise"
    weighting: Literal["fixed", "pareto", "min_norm", "pareto_efficient"] = "pareto"
    behavior_weights: dict[str, float] = field(default_factory=dict)
    inverse_rate_exponent: float = 1.0
    pareto_step_size: float = 1.0
    min_weight: float = 0.02
    max_weight: float = 0.9
    reweight_interval: int = 10
    lr: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 20
    patience: int = 6
    batch_size: int = 256
    dim: int = 8
    hidden_dims: list[int] = field(default_factory=lambda: [8])
    quadrature_degree: int = 32
    max_history_events: int = 20
    session_gap_s: float = 0.0
    top_k: int = 3
    formula_trials: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "reweight_interval",
            "lr",
            "epochs",
            "batch_size",
            "dim",
            "quadrature_degree",
            "top_k",
            "formula_trials",
        )
        check_fields("ensemble", self, *POSITIVE, *positive)
        not_negative = (
            "inverse_rate_exponent",
            "pareto_step_size",
            "min_weight",
            "weight_decay",
            "patience",
            "max_history_events",
            "session_gap_s",
            "seed",
        )
        check_fields("ensemble", self, *NON_NEGATIVE, *not_negative)
        if not self.min_weight < self.max_weight <= 1:
            raise ConfigError(
                f"ensemble.max_weight {self.max_weight} must be above ensemble.min_weight "
                f"{self.min_weight} and at most 1"
            )
        if not self.hidden_dims or any(width < 1 for width in self.hidden_dims):
            raise ConfigError(f"ensemble.hidden_dims {self.hidden_dims} must be one or more positive widths")
        for name, weight in self.behavior_weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"ensemble.behavior_weights.{name} {weight} must be positive and finite")
