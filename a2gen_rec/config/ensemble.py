"""Settings of the ensemble: METHODS §6."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, SEED, check_fields
from a2gen_rec.errors import ConfigError


@dataclass
class EnsembleConfig:
    """UMRE: training targets, optimization and size of the ensemble."""

    loss: Literal["pointwise", "listwise", "pairwise"] = "listwise"
    """Loss against the combined relevance Σ_m ω_m y_m of the behaviors y."""
    weighting: Literal["fixed", "pareto", "min_norm", "pareto_efficient"] = "pareto"
    """Update rule of the behavior weights ω. ``fixed`` keeps them. ``pareto`` follows the behaviors' user AUC on
    validation. ``min_norm`` takes the minimum-norm combination of the losses' gradients. ``pareto_efficient`` does
    so with no ω below ``min_weight``."""
    behavior_weights: dict[str, float] = field(default_factory=dict)
    """Weight ω of each behavior to train and validate for, such as ``--behavior-weights.like 10
    --behavior-weights.follow 1``, normalized to sum to 1. Empty uses all behaviors, weighted by
    ``inverse_rate_exponent``."""
    inverse_rate_exponent: float = 1.0
    """Exponent e of the default weights, ω_m ∝ rate_m^-e. 0 weighs all behaviors equally; 1 gives every behavior
    the same total relevance over its positives."""
    pareto_step_size: float = 1.0
    """Step size of the ``pareto`` updates of ω by user AUC."""
    min_weight: float = 0.02
    """Lower bound of ω before normalization."""
    max_weight: float = 0.9
    """Upper bound of ω before normalization."""
    reweight_interval: int = 10
    """Interval in batches between updates of ω from the losses' gradients."""
    lr: float = 3e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    epochs: int = 20
    """Number of passes over the training lists; the best epoch on validation is kept."""
    patience: int = 6
    """Number of epochs without a better validation NDCG@k before early stopping; 0 disables early stopping."""
    batch_size: int = 256
    """Number of lists per batch."""
    dim: int = 8
    """Width of the user vector and of the objectives' embeddings."""
    hidden_dims: list[int] = field(default_factory=lambda: [8])
    """Hidden widths of the networks that model the transforms' derivatives."""
    quadrature_degree: int = 16
    """Degree of the quadrature that integrates the transforms."""
    max_history_events: int = 20
    """Maximum number of most recent user events that the ensemble reads."""
    session_gap_s: float = 0.0
    """Minimum time in seconds between the starts of two impressions that ends a list; 0 uses the dataset's sessions."""
    top_k: int = 3
    """Cutoff k of the ranking metrics."""
    formula_trials: int = 200
    """Number of random settings tried for the formula baseline."""
    seed: int = 0
    """Random seed of initial parameters and list order."""

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
        non_negative = (
            "inverse_rate_exponent",
            "pareto_step_size",
            "min_weight",
            "weight_decay",
            "patience",
            "max_history_events",
            "session_gap_s",
        )
        check_fields("ensemble", self, *NON_NEGATIVE, *non_negative)
        check_fields("ensemble", self, *SEED, "seed")
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
