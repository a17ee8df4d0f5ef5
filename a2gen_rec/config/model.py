"""Settings of the model and of its losses: A2Gen (arXiv 2604.25834)."""

from dataclasses import dataclass, field, fields
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError

WEIGHT = {"weight": True}
"""Metadata of the loss settings that weigh one term; ForkMerge branches may override only these."""


@dataclass
class ModelConfig:
    """A2Gen (context-aware attention, hierarchical encoder, action-sequence generator) or a baseline.

    Baselines read the same inputs and have one tower per task. They ignore ``generator``, ``residual``,
    ``mlp_ratio``, ``attention_impl``, ``action_pooling``, ``item_pooling``, ``context_in_query``, ``use_head_gate``
    and the time heads' settings. They support no ``dual_view`` feedback encoding.
    """

    name: Literal["a2gen", "mmoe", "ple", "hstu", "gbdt"] = "a2gen"
    """Model: ``a2gen``, or a baseline. ``mmoe`` and ``ple`` are mixtures of experts over target attention. ``hstu``
    stacks gated pointwise attention layers over the impression sequence. ``gbdt`` is gradient boosted trees on flat
    rows (section ``gbdt``). It reads only ``max_history``, ``statistics``, ``excluded_inputs``, ``session_features``,
    ``predict_objectives`` and whether ``feedback_encoding`` is ``none`` of this section, and supports only
    `a2gen train`, `a2gen evaluate` and `a2gen experiment`."""
    dim: int = 32
    """Width of every embedding and hidden vector; a multiple of 4 and of ``num_heads``."""
    embedding_init_scale: float = 0.05
    """Bound of the uniform distribution that initializes embedding tables, symmetric around 0."""
    num_heads: int = 4
    """Number of attention heads, mixed by the context gate."""
    max_history: int = 0
    """Maximum number of history impressions that a target attends to; 0 uses the dataset's maximum."""
    generator: Literal["explicit", "implicit", "independent_heads"] = "explicit"
    """Action decoder: ``explicit`` is autoregressive over emitted actions, ``implicit`` refines a draft.
    ``independent_heads`` replaces the generator with one head per action, as an ablation."""
    occurrence_head: bool = True
    """Add a head that predicts from the target context whether each action occurs. It gives rare actions the same
    weight as frequent ones. Ignored for ``independent_heads``. [ours]"""
    residual: Literal["context", "both"] = "both"
    """Residual input of CAM: ``context`` (the source), or the context and the sequence. ``both`` measured better: a
    user's own rates reach the target without passing through attention."""
    mlp_ratio: float = 2.0
    """Hidden width of the block after each CAM, as a multiple of ``dim``; 0 removes the block."""
    attention_impl: Literal["factorized", "reference"] = "factorized"
    """Implementation of item-level attention. ``reference`` materializes every target's attention: slow, for tests."""
    recency_bias: bool = True
    """Learn a per-head attention bias from the time between a history impression and the target."""
    match_bias: bool = True
    """Learn a per-head attention bias for history impressions that share an item feature with the target."""
    feedback_encoding: Literal["none", "tokens", "dual_view", "dual_view_full"] = "none"
    """Feedback inputs. ``tokens`` adds feedback level and watch ratio to history tokens. ``dual_view`` also attends
    separately to positively and negatively received impressions. ``dual_view_full`` adds a third view over all of
    them. Disabled for logs without watch times."""
    statistics: bool = True
    """Add the dataset's statistics of item feature values, and statistics of the user's own history, to targets.
    They summarize actions, times and feedback whatever the settings of the sequence are."""
    wide_dim: int = 32
    """Hidden width of the wide part: one small network per outcome on statistics, numbers, vectors, small features and
    the latest impressions, the inputs of ``gbdt``. Predictions are means of both parts. 0 or ``statistics: false``
    removes it. The ``mmoe``, ``ple`` and ``hstu`` baselines have none. [ours]"""
    wide_dropout: float = 0.0
    """Dropout rate of the wide part, except of its times."""
    id_dropout: float = 0.0
    """Share of the looked-up identifiers that training replaces by row 0, "unknown". It applies to user and item
    tables of at least 1,000 rows, and to the vectors only: matches of history and target still use the identifiers.
    It keeps a model from memorizing identifiers and trains row 0, which new users and videos use. [ours]"""
    excluded_inputs: list[str] = field(default_factory=list)
    """Names of features, numbers and vectors of the dataset that the model does not read, to measure what an input is
    worth. Statistics of an excluded feature are excluded as well; its table remains, unread."""
    session_features: bool = False
    """Add session position, gap and level of the previous impression to history tokens and targets."""
    predict_objectives: bool = False
    """Predict glance, effective view, explicit negative and watch time, as available in the log, jointly with labels
    in one multi-objective module. If false, only labels are predicted, by a tower."""
    shared_experts: int = 2
    """Number of experts shared by all tasks, in the multi-objective module and in each level of ``ple``."""
    task_experts: int = 1
    """Number of experts specific to each task, in the multi-objective module and in each level of ``ple``."""
    num_experts: int = 8
    """Number of experts of ``mmoe`` and ``hstu``, shared by all tasks."""
    num_layers: int = 2
    """Number of layers of ``hstu``."""
    time_head: Literal["unconstrained", "monotonic"] = "unconstrained"
    """Time parametrization: ``unconstrained`` regression, or ``monotonic`` increments, ordered by construction."""
    time_distribution: Literal["point", "lognormal"] = "point"
    """Time output: ``point`` estimate, or ``lognormal`` (location and scale of log1p seconds)."""
    time_per_action: bool = True
    """Predict the next step's time conditional on its action; if false, one time for all actions."""
    time_buckets: int = 64
    """Number of log-spaced buckets that encode times as inputs."""
    max_action_time_s: float = 14_400.0
    """Action time in seconds from which all times share the last bucket."""
    max_gap_s: float = 2_592_000.0
    """Gap between impressions in seconds from which all gaps share the last bucket."""
    dropout: float = 0.0
    """Dropout rate of the generator's context, inside every feed-forward block, and of tokens and layers of
    ``hstu``."""
    tower_mlp_ratio: float = 2.0
    """Hidden width of label and objective towers and of ``independent_heads``, as a multiple of ``dim``."""
    use_action_times: bool = True
    """Read action times inside an impression. If false, all times are missing inputs, both in the history and in
    emitted steps. They are still predicted, and feedback levels still use watch times."""
    use_action_order: bool = True
    """Read and generate actions in order of occurrence. If false, an impression has a set of actions and a set of
    times, and actions are emitted in vocabulary order, without their times."""
    action_pooling: Literal["attention", "mean", "none"] = "attention"
    """Pooling of the actions inside a history impression: CAM, their ``mean``, or ``none`` to ignore them."""
    item_pooling: Literal["attention", "mean"] = "attention"
    """Pooling of history impressions: CAM, or their ``mean`` without views."""
    context_in_query: bool = True
    """Include the context in the query of every CAM. With ``use_head_gate`` false as well, CAM becomes standard
    attention next to the context."""
    use_head_gate: bool = True
    """Mix the heads of every CAM by a gate on the context."""

    def __post_init__(self) -> None:
        check_fields("model", self, "at least 1", lambda value: value >= 1, "num_heads", "num_experts", "num_layers")
        if self.dim % 4 or self.dim % self.num_heads or self.dim <= 0:
            raise ConfigError(
                f"model.dim {self.dim} must be a positive multiple of 4 and of model.num_heads {self.num_heads}"
            )
        check_fields("model", self, "at least 4", lambda value: value >= 4, "time_buckets")
        check_fields("model", self, "in [0, 1)", lambda value: 0 <= value < 1, "dropout", "wide_dropout", "id_dropout")
        check_fields("model", self, *NON_NEGATIVE, "embedding_init_scale", "max_history", "mlp_ratio", "wide_dim")
        check_fields("model", self, *NON_NEGATIVE, "shared_experts", "task_experts")
        if self.shared_experts + self.task_experts == 0:
            raise ConfigError("model.shared_experts + model.task_experts must be at least 1")
        if self.time_head == "monotonic" and not self.use_action_order:
            raise ConfigError("model.time_head 'monotonic' requires model.use_action_order")
        check_fields("model", self, *POSITIVE, "tower_mlp_ratio", "max_action_time_s", "max_gap_s")


@dataclass
class LossConfig:
    """Weights of the loss terms; each term is a mean over its valid steps of the global batch."""

    action_weight: float = field(default=1.0, metadata=WEIGHT)
    """Weight of the next action's cross-entropy."""
    time_weight: float = field(default=1.0, metadata=WEIGHT)
    """β, weight of the time error in log1p seconds."""
    time_loss: Literal["mse", "mae"] = "mse"
    """Time error: ``mse`` (the source's) or ``mae`` (fits medians). Ignored for ``lognormal`` heads."""
    order_weight: float = field(default=0.1, metadata=WEIGHT)
    """γ, weight of the hinge penalty on decreasing times."""
    order_power: float = 2.0
    """p, power of that hinge penalty."""
    draft_weight: float = field(default=0.1, metadata=WEIGHT)
    """Weight of the implicit generator's losses on its draft."""
    occurrence_weight: float = field(default=0.1, metadata=WEIGHT)
    """Weight of the occurrence head's loss, in units of each action's entropy."""
    wide_weight: float = field(default=1.0, metadata=WEIGHT)
    """Weight of the wide part's losses: the sum over its outcomes and times."""
    label_weight: float = field(default=1.0, metadata=WEIGHT)
    """Weight of the impression labels' binary cross-entropy."""
    default_objective_weight: float = field(default=1.0, metadata=WEIGHT)
    """Weight of every objective's binary cross-entropy and of the watch time error."""
    objective_weights: dict[str, float] = field(default_factory=dict)
    """Weights of single objectives by name, ``watch_time`` included, such as
    ``--loss.objective-weights.glance 0.5``."""
    uncertainty_weighting: bool = False
    """Learn the weights of labels, objectives and watch time instead (homoscedastic uncertainty). Validation still
    uses the weights above."""

    def __post_init__(self) -> None:
        check_fields("loss", self, *NON_NEGATIVE, *loss_weights())
        for name, weight in self.objective_weights.items():
            if not weight >= 0:
                raise ConfigError(f"loss.objective_weights.{name} {weight} must be at least 0")
        check_fields("loss", self, *POSITIVE, "order_power")


def loss_weights() -> tuple[str, ...]:
    """Return the names of the loss settings that weigh one term."""
    return tuple(item.name for item in fields(LossConfig) if item.metadata.get("weight"))
