"""Every setting, as typed dataclasses: the one place where defaults live.

A YAML file holds the fields of :class:`Config`; ``--model.dim 64`` on the command line overrides one of them.
Units are in the names (``_s`` seconds, ``_ms`` milliseconds) or the comments. Sections are those of the
methods' sources: A2Gen (arXiv 2604.25834) for ``model`` and ``loss``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.errors import ConfigError

_POSITIVE: tuple[str, Callable[[float], bool]] = ("positive", lambda value: value > 0)
_NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("at least 0", lambda value: value >= 0)


def _require(section: str, values: object, rule: str, holds: Callable[[float], bool], *names: str) -> None:
    """Raise a ConfigError for the first of the settings that breaks the rule (NaN breaks every one)."""
    for name in names:
        if not holds(getattr(values, name)):
            raise ConfigError(f"{section}.{name} {getattr(values, name)} must be {rule}")


@dataclass
class ModelConfig:
    """A2Gen: context-aware attention, hierarchical encoder, action-sequence generator.

    Attributes:
        dim: width of every embedding and hidden vector; a multiple of 4 and of ``heads``.
        heads: attention heads, mixed by the context gate.
        history: most impressions before a target it may attend to; 0 takes the dataset's own bound.
        generator: ``explicit`` (autoregressive over emitted actions) or ``implicit`` (refined draft).
        residual: what CAM adds to its attention: the context (the source), or the context and the sequence (measured
            better: users' own rates reach the target without passing the attention).
        mlp_ratio: hidden width of the block after each CAM as a multiple of ``dim``; 0 leaves it out.
        attention: item-level attention; ``direct`` builds every target's own attention (slow, the oracle).
        recency_bias: learned per-head bias on the time between a history impression and the target.
        match_bias: learned per-head bias on history impressions that share an item feature with the target.
        time_head: ``free`` regression, or ``monotone`` increments, ordered by construction.
        time_distribution: ``point`` estimate or ``lognormal`` (location and scale of log1p seconds).
        time_per_action: predict the next step's time given which action it is, not one time for all.
        time_buckets: log-spaced buckets that times enter by.
        max_offset_s: offsets at and above it share the last bucket.
        max_gap_s: gaps between impressions at and above it share the last bucket.
        dropout: rate on the generator's context and inside every feed-forward block.
        tower_ratio: hidden width of the label towers as a multiple of ``dim``.
    """

    dim: int = 32
    heads: int = 4
    history: int = 0
    generator: Literal["explicit", "implicit"] = "explicit"
    residual: Literal["context", "both"] = "both"
    mlp_ratio: float = 2.0
    attention: Literal["factorised", "direct"] = "factorised"
    recency_bias: bool = True
    match_bias: bool = True
    time_head: Literal["free", "monotone"] = "free"
    time_distribution: Literal["point", "lognormal"] = "point"
    time_per_action: bool = True
    time_buckets: int = 64
    max_offset_s: float = 14_400.0
    max_gap_s: float = 2_592_000.0
    dropout: float = 0.0
    tower_ratio: float = 2.0

    def __post_init__(self) -> None:
        _require("model", self, "at least 1", lambda value: value >= 1, "heads")
        if self.dim % 4 or self.dim % self.heads or self.dim <= 0:
            raise ConfigError(f"model.dim {self.dim} must be a positive multiple of 4 and of model.heads {self.heads}")
        _require("model", self, "at least 4", lambda value: value >= 4, "time_buckets")
        _require("model", self, "in [0, 1)", lambda value: 0 <= value < 1, "dropout")
        _require("model", self, *_NOT_NEGATIVE, "history", "mlp_ratio")
        _require("model", self, *_POSITIVE, "tower_ratio", "max_offset_s", "max_gap_s")


@dataclass
class LossConfig:
    """Weights of the loss terms; each term is a mean over its own valid steps of the global batch.

    Attributes:
        time: β, weight of the time error in log1p seconds.
        time_error: ``squared`` (the source's) or ``absolute`` (fits medians); unused by ``lognormal`` heads.
        order: γ, weight of the hinge on times that run backwards.
        order_power: p, power of that hinge.
        auxiliary: weight of the implicit generator's losses on its draft.
        label: weight of the impression labels' binary cross-entropy.
    """

    action: float = 1.0
    time: float = 1.0
    time_error: Literal["squared", "absolute"] = "squared"
    order: float = 0.1
    order_power: float = 2.0
    auxiliary: float = 0.1
    label: float = 1.0

    def __post_init__(self) -> None:
        _require("loss", self, *_NOT_NEGATIVE, "action", "time", "order", "auxiliary", "label")
        _require("loss", self, *_POSITIVE, "order_power")


@dataclass
class LoaderConfig:
    """How windows become batches, on each rank.

    Attributes:
        max_impressions: bound on a batch's impressions, counted as they are padded: windows × the longest.
        max_windows: bound on a batch's user windows.
        buffer_windows: windows read and shuffled together.
        dedup: look every distinct id of a batch up once.
        group_cost: action sequences of neighbouring lengths share a padded group unless one more saves so many tokens.
        background: build batches in a thread of their own, beside the training step.
    """

    max_impressions: int = 4096
    max_windows: int = 512
    buffer_windows: int = 16384
    dedup: bool = True
    group_cost: int = 512
    background: bool = True

    def __post_init__(self) -> None:
        _require("loader", self, *_POSITIVE, "max_impressions", "max_windows", "buffer_windows")
        _require("loader", self, *_NOT_NEGATIVE, "group_cost")


@dataclass
class OptimConfig:
    """Optimizers: fused into the backward pass for tables, separate for the dense part.

    Attributes:
        warmup_steps: steps of linear learning-rate warm-up.
        decay: shape of the learning rate after warm-up, over ``train.epochs``.
        final_share: learning rate at the end, as a share of the peak.
        clip_norm: bound on the norm of the dense gradients; 0 leaves them alone.
    """

    dense: Literal["adam", "adamw"] = "adamw"
    dense_lr: float = 2e-3
    weight_decay: float = 1e-4
    tables: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    tables_lr: float = 0.05
    tables_weight_decay: float = 0.0
    warmup_steps: int = 50
    decay: Literal["none", "linear", "cosine"] = "cosine"
    final_share: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _require("optim", self, *_POSITIVE, "dense_lr", "tables_lr")
        _require("optim", self, "in [0, 1]", lambda value: 0 <= value <= 1, "final_share")
        names = ("weight_decay", "tables_weight_decay", "warmup_steps", "clip_norm")
        _require("optim", self, *_NOT_NEGATIVE, *names)


@dataclass
class ShardingConfig:
    """What the planner may do, and on what hardware.

    Attributes:
        plan: file of a plan to follow (``a2gen plan --save``); empty makes one.
        types: sharding types the planner may choose from.
        kernels: where a table may live: ``fused`` in the device's memory, ``fused_uvm`` in the host's,
            ``fused_uvm_caching`` in the host's with a cache on the device. CPU has ``fused`` only.
        cache_load_factor: share of a cached table's rows that its cache holds.
        dtype: of the tables' weights; looked-up rows and optimizer states are fp32 in any case.
        hbm_gb, ddr_gb: memory per rank in GB (10^9 bytes); 0 takes the device's own, or the topology's.
        reserve: share of memory kept for the dense part and activations.
        init_scale: embeddings start uniform in ± this.
    """

    plan: str = ""
    types: list[Literal["table_wise", "row_wise", "column_wise"]] = field(
        default_factory=lambda: ["table_wise", "row_wise"]
    )
    kernels: list[Literal["fused", "fused_uvm_caching", "fused_uvm"]] = field(default_factory=lambda: ["fused"])
    cache_load_factor: float = 0.2
    dtype: Literal["fp32", "fp16"] = "fp32"
    hbm_gb: float = 0.0
    ddr_gb: float = 0.0
    reserve: float = 0.2
    init_scale: float = 0.05

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("sharding.types must name at least one sharding type")
        if not self.kernels:
            raise ConfigError("sharding.kernels must name at least one kernel")
        _require("sharding", self, "in (0, 1)", lambda value: 0 < value < 1, "cache_load_factor")
        _require("sharding", self, *_NOT_NEGATIVE, "hbm_gb", "ddr_gb", "init_scale")
        _require("sharding", self, "in [0, 1)", lambda value: 0 <= value < 1, "reserve")


@dataclass
class PlannedFeature:
    """A feature of data that are not there yet (``a2gen plan`` without ``--data``).

    Attributes:
        level: one id per ``user`` window, or per impression (``item``, ``context``).
        rows: of its table, row 0 ("unknown") included.
        zipf: exponent of how often its ids occur; 0 is uniform, which gives the most distinct ids there can be.
    """

    level: Literal["user", "item", "context"]
    rows: int
    zipf: float = 0.0

    def __post_init__(self) -> None:
        _require("feature", self, *_POSITIVE, "rows")
        _require("feature", self, "in [0, 4]", lambda value: 0 <= value <= 4, "zipf")


@dataclass
class WorkloadConfig:
    """What one rank's batch holds, for ``a2gen plan`` without ``--data``; with data, the loader's bounds tell.

    Attributes:
        windows, impressions, targets: expected in a batch; impressions are history and targets together.
        actions: size of the action vocabulary, ``start`` and ``exit`` included.
    """

    windows: int = 0
    impressions: int = 0
    targets: int = 0
    actions: int = 0

    def __post_init__(self) -> None:
        _require("workload", self, *_NOT_NEGATIVE, "windows", "impressions", "targets", "actions")


@dataclass
class TrainConfig:
    """The training run.

    Attributes:
        epochs: passes over the training windows.
        max_steps: stop after so many steps; 0 for no bound.
        validate_every: steps between validations; 0 validates once per epoch.
        patience: validations without improvement before stopping; 0 never stops early.
        monitor: what early stopping and the best checkpoint go by, on validation.
        checkpoint_every: steps between checkpoints; 0 checkpoints once per epoch.
        keep: last checkpoints kept beside the best one; 0 keeps all.
        precision: ``bf16`` is autocast on GPU; ``auto`` takes bf16 on GPU and fp32 on CPU.
        log_every: steps between log and TensorBoard entries.
    """

    epochs: int = 3
    max_steps: int = 0
    validate_every: int = 0
    patience: int = 2
    monitor: Literal["loss", "auc"] = "loss"
    checkpoint_every: int = 0
    keep: int = 2
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = 20

    def __post_init__(self) -> None:
        _require("train", self, *_POSITIVE, "epochs")
        names = ("max_steps", "validate_every", "patience", "checkpoint_every", "keep", "seed", "log_every")
        _require("train", self, *_NOT_NEGATIVE, *names)


@dataclass
class EvaluateConfig:
    """How predictions are read off the model.

    Attributes:
        max_error: most that an action's probability may be too low, for sequences that were not followed to their end.
        smoothing: pseudo-impressions at the base rate in the item-rate reference row.
    """

    max_error: float = 1e-3
    smoothing: float = 20.0

    def __post_init__(self) -> None:
        _require("evaluate", self, "in [0, 1)", lambda value: 0 <= value < 1, "max_error")
        _require("evaluate", self, *_POSITIVE, "smoothing")


@dataclass
class Config:
    """Everything one training run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class SimulateConfig:
    """A short-video world with known truth (``a2gen simulate``).

    Effects are shifts of log-odds. Base log-odds are fitted so that the rates come out as asked.

    Attributes:
        users, items: size of the world.
        groups: user groups; each has favourite topics its members tend to share.
        impressions_per_user: mean; users differ.
        days: span of the log.
        chunk_users: users per impression file, rounded up to whole thousands; changes no row.
        <action>_rate, long_view_rate: share of impressions with it.
        glance_rate: share of impressions left within the first three seconds.
        popularity: Zipf exponent of how often items are shown.
        interest_share: share of the ``for_you`` tab's exposures that follow the user's interests.
        interest: weight of the match between a user's interests and a segment's topic.
        habit: spread of the users' own inclination to each action, and of their patience.
        quality: spread of the videos' quality.
        highlight: how much more a highlight on a topic the user cares about invites actions and holds them.
        liked_highlight: a like inside a highlight raises later follows and collects by this.
        loyalty: following before liking lowers leaving afterwards by this.
        hook: weight of a mismatch in the first three seconds.
    """

    users: int = 2_000
    items: int = 1_000
    authors: int = 200
    topics: int = 12
    groups: int = 8
    impressions_per_user: int = 100
    days: int = 14
    seed: int = 0
    chunk_users: int = 2_000
    like_rate: float = 0.10
    comment_rate: float = 0.03
    follow_rate: float = 0.03
    collect_rate: float = 0.035
    forward_rate: float = 0.02
    long_view_rate: float = 0.38
    glance_rate: float = 0.28
    popularity: float = 0.8
    interest_share: float = 0.7
    interest: float = 1.0
    habit: float = 1.0
    quality: float = 0.3
    highlight: float = 1.0
    liked_highlight: float = 1.5
    loyalty: float = 1.5
    hook: float = 1.2

    def __post_init__(self) -> None:
        sizes = ("users", "items", "authors", "topics", "groups", "impressions_per_user", "days", "chunk_users")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")
        for name in ("like_rate", "comment_rate", "follow_rate", "collect_rate", "forward_rate"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0 and at most 0.5")
        if not 0 < self.glance_rate < 1 - self.long_view_rate < 1:
            raise ConfigError("glance_rate and long_view_rate must be above 0 and sum to less than 1")
        if not 0 <= self.interest_share <= 1:
            raise ConfigError(f"interest_share {self.interest_share} must be in [0, 1]")
        for name in ("popularity", "interest", "habit", "quality", "highlight"):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [0, 10]")
        for name in ("liked_highlight", "loyalty", "hook"):
            if not -10 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [-10, 10]")


@dataclass
class PrepareConfig:
    """Raw log to dataset (``a2gen prepare``). A zero or empty value takes the source's own choice.

    Attributes:
        history: most impressions before a target that its window carries.
        max_targets: most targets of one window.
        min_count: values rarer than this in the training data share row 0 of their table.
        valid_from, test_from: split boundaries, as ISO date-times in the log's own time zone, milliseconds, or
            ``-2d``: the begin of the log's last day but one.
        valid_share, test_share: splits by share of impressions, where no boundary is given.
        partitions: files per split; windows are spread over them by a hash of the user.
        memory_gb: bound on DuckDB's memory; beyond it, it spills to disk.
        threads: DuckDB's threads; 0 takes all cores.
    """

    history: int = 100
    max_targets: int = 64
    min_count: int = 0
    valid_from: str = ""
    test_from: str = ""
    valid_share: float = 0.0
    test_share: float = 0.0
    partitions: int = 16
    memory_gb: float = 2.0
    threads: int = 0
