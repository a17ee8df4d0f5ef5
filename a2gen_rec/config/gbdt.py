"""Settings of the gradient boosted trees of ``model.name: gbdt``."""

from dataclasses import dataclass

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields


@dataclass
class GBDTConfig:
    """Gradient boosted trees (LightGBM) on one flat row of features and statistics per target.

    One binary classifier per action, label and objective, and one L1 regression of log1p seconds per timed action.
    ``train.monitor`` is the metric of early stopping of the classifiers, ``train.seed`` the random seed.
    """

    num_leaves: int = 31
    """Maximum number of leaves of a tree."""
    learning_rate: float = 0.03
    """Shrinkage of every tree."""
    max_trees: int = 1_000
    """Maximum number of trees per outcome."""
    patience: int = 40
    """Number of trees without improvement on validation before early stopping."""
    min_child_samples: int = 100
    """Minimum number of impressions in a leaf."""
    feature_fraction: float = 0.5
    """Fraction of the columns that each tree may use."""
    bagging_fraction: float = 0.8
    """Fraction of the impressions that each tree is fitted to."""
    lambda_l2: float = 10.0
    """L2 regularization of the leaf values."""
    max_cardinality: int = 1_000
    """Maximum number of table rows of a feature that becomes a column. Larger identifiers enter through their
    statistics only."""
    min_positives: int = 50
    """Minimum number of training impressions with an outcome, and without it. Outcomes with fewer are predicted by
    their training rate or median time."""
    max_matrix_gb: float = 8.0
    """Maximum size in GB of the matrix of training rows; a larger one is an error."""
    threads: int = 0
    """Number of threads; 0 uses the default of OpenMP, which reads ``OMP_NUM_THREADS``."""

    def __post_init__(self) -> None:
        check_fields("gbdt", self, "at least 2", lambda value: value >= 2, "num_leaves")
        names = ("learning_rate", "max_trees", "patience", "min_child_samples", "min_positives", "max_matrix_gb")
        check_fields("gbdt", self, *POSITIVE, *names)
        check_fields("gbdt", self, "in (0, 1]", lambda value: 0 < value <= 1, "feature_fraction", "bagging_fraction")
        check_fields("gbdt", self, *NON_NEGATIVE, "lambda_l2", "max_cardinality", "threads")
