"""Settings of the model and of its losses: A2Gen (arXiv 2604.25834)."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError


@dataclass
class ModelConfig:
    """A2Gen (context-aware attention, hierarchical encoder, action-sequence generator), or a baseline in its place.

    Baselines read the same inputs and have a tower per task: of ``generator``, ``residual``, ``mlp_ratio``,
    ``attention``, the two levels, ``context_query``, ``head_gate`` and the time heads they take nothing, and of
    ``feedback`` no views.

    Attributes:
        name: ``a2gen``; ``mmoe`` or ``ple``, mixtures of experts over attention of the target; ``hstu``, layers of
            gated pointwise attention over the sequence of impressions.
        dim: width of every embedding and hidden vector; a multiple of 4 and of ``heads``.
        heads: attention heads, mixed by the context gate.
        history: most impressions before a target it may attend to; 0 takes the dataset's own bound.
        generator: ``explicit`` (autoregressive over emitted actions), ``implicit`` (refined draft), or a head per
            action in its place, to measure what it adds (``independent``).
        occurrence_tower: beside the generator, tell from a target's context alone whether each action happens [ours]:
            rare actions, of next to no weight among steps, weigh as much as others there. Not of ``independent``.
        residual: what CAM adds to its attention: the context (the source), or the context and the sequence (measured
            better: users' own rates reach the target without passing the attention).
        mlp_ratio: hidden width of the block after each CAM as a multiple of ``dim``; 0 leaves it out.
        attention: item-level attention; ``direct`` builds every target's own attention (slow, the oracle).
        recency_bias: learned per-head bias on the time between a history impression and the target.
        match_bias: learned per-head bias on history impressions that share an item feature with the target.
        feedback: what past impressions tell of how they pleased: nothing (``off``), their level and watch ratio in the
            tokens (``tokens``), those and a positive and a negative view of the history (``views``), or views beside
            the whole history (``whole``). Off where a log records no watch times.
        session: position in the session, gap and level of the impression before join tokens and targets.
        objectives: predict glance, effective view, explicit negative and watch time, as far as the log tells them, in
            one multi-objective module with the labels. Off, labels have a tower of their own and nothing else is.
        shared_experts, own_experts: of that module, and of each level of ``ple``: seen by all tasks, and by each alone.
        experts: of ``mmoe`` and ``hstu``, seen by all tasks.
        layers: of ``hstu``.
        time_head: ``free`` regression, or ``monotone`` increments, ordered by construction.
        time_distribution: ``point`` estimate or ``lognormal`` (location and scale of log1p seconds).
        time_per_action: predict the next step's time given which action it is, not one time for all.
        time_buckets: log-spaced buckets that times enter by.
        max_offset_s: offsets at and above it share the last bucket.
        max_gap_s: gaps between impressions at and above it share the last bucket.
        dropout: rate on the generator's context and inside every feed-forward block.
        tower_ratio: hidden width of the labels' and objectives' towers as a multiple of ``dim``, and of
            ``independent`` heads.
        action_times: read when actions happened inside an impression. Off, all of them count as missing, in the past
            and in what has been emitted, but are predicted as ever; levels of ``feedback`` still tell of watch times.
        action_order: read and generate actions in the order in which they happened. Off, an impression has a set of
            actions and a set of times, an action is emitted in the vocabulary's order, and without its time.
        action_level: what becomes of the actions inside a past impression: CAM over them, their ``mean``, or nothing
            (``off``).
        item_level: what becomes of past impressions: CAM over them, or their ``mean``, without views.
        context_query, head_gate: whether, in every CAM, the context asks, and mixes the heads. Both off leave plain
            attention, and the context beside it.
    """

    name: Literal["a2gen", "mmoe", "ple", "hstu"] = "a2gen"
    dim: int = 32
    num_heads: int = 4
    max_history: int = 0
    generator: Literal["explicit", "implicit", "independent"] = "explicit"
    occurrence_head: bool = True
    residual: Literal["context", "both"] = "both"
    mlp_ratio: float = 2.0
    attention_impl: Literal["factorized", "reference"] = "factorized"
    recency_bias: bool = True
    match_bias: bool = True
    feedback_encoding: Literal["none", "tokens", "dual_view", "dual_view_full"] = "none"
    session_features: bool = False
    predict_objectives: bool = False
    shared_experts: int = 2
    task_experts: int = 1
    num_experts: int = 8
    num_layers: int = 2
    time_head: Literal["unconstrained", "monotonic"] = "unconstrained"
    time_distribution: Literal["point", "lognormal"] = "point"
    time_per_action: bool = True
    time_buckets: int = 64
    max_action_time_s: float = 14_400.0
    max_gap_s: float = 2_592_000.0
    dropout: float = 0.0
    tower_mlp_ratio: float = 2.0
    use_action_times: bool = True
    use_action_order: bool = True
    action_pooling: Literal["attention", "mean", "none"] = "attention"
    item_pooling: Literal["attention", "mean"] = "attention"
    context_in_query: bool = True
    use_head_gate: bool = True

    def __post_init__(self) -> None:
        check_fields("model", self, "at least 1", lambda value: value >= 1, "num_heads", "num_experts", "num_layers")
        if self.dim % 4 or self.dim % self.num_heads or self.dim <= 0:
            raise ConfigError(
                f"model.dim {self.dim} must be a positive multiple of 4 and of model.num_heads {self.num_heads}"
            )
        check_fields("model", self, "at least 4", lambda value: value >= 4, "time_buckets")
        check_fields("model", self, "in [0, 1)", lambda value: 0 <= value < 1, "dropout")
        check_fields("model", self, *NON_NEGATIVE, "max_history", "mlp_ratio", "shared_experts", "task_experts")
        if self.shared_experts + self.task_experts == 0:
            raise ConfigError("model.shared_experts and model.task_experts leave no expert")
        if self.time_head == "monotonic" and not self.use_action_order:
            raise ConfigError(
                "model.time_head 'monotonic' orders times, model.use_action_order false leaves none to order"
            )
        check_fields("model", self, *POSITIVE, "tower_mlp_ratio", "max_action_time_s", "max_gap_s")


@dataclass
class LossConfig:
    """Weights of the loss terms; each term is a mean over its own valid steps of the global batch.

    Attributes:
        time: β, weight of the time error in log1p seconds.
        time_error: ``squared`` (the source's) or ``absolute`` (fits medians); unused by ``lognormal`` heads.
        order: γ, weight of the hinge on times that run backwards.
        order_power: p, power of that hinge.
        auxiliary: weight of the implicit generator's losses on its draft.
        occurrence: weight of the tower of occurrence, whose errors are in units of each action's own entropy.
        label: weight of the impression labels' binary cross-entropy.
        objective: weight of every objective's binary cross-entropy, and of the watch time's error.
        objectives: other weights of single ones, by name (``watch_time`` too): ``--loss.objective_weights.glance 0.5``.
        uncertainty: learn the weights of labels, objectives and watch time instead (homoscedastic uncertainty);
            validation goes on by the weights above.
    """

    action_weight: float = 1.0
    time_weight: float = 1.0
    time_loss: Literal["mse", "mae"] = "mse"
    order_weight: float = 0.1
    order_power: float = 2.0
    draft_weight: float = 0.1
    occurrence_weight: float = 0.1
    label_weight: float = 1.0
    default_objective_weight: float = 1.0
    objective_weights: dict[str, float] = field(default_factory=dict)
    uncertainty_weighting: bool = False

    def __post_init__(self) -> None:
        check_fields(
            "loss",
            self,
            *NON_NEGATIVE,
            "action_weight",
            "time_weight",
            "order_weight",
            "draft_weight",
            "occurrence_weight",
            "label_weight",
            "default_objective_weight",
        )
        for name, weight in self.objective_weights.items():
            if not weight >= 0:
                raise ConfigError(f"loss.objective_weights.{name} {weight} must be at least 0")
        check_fields("loss", self, *POSITIVE, "order_power")
