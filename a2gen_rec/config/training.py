"""Settings of the training run, its batches and its evaluation; with the model's, all that a run depends on."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.config.model import LossConfig, ModelConfig
from a2gen_rec.config.sharding import ShardingConfig
from a2gen_rec.errors import ConfigError

_NO_WEIGHTS = ("time_error", "order_power", "objectives", "uncertainty")  # of the loss's settings


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

    max_impressions_per_batch: int = 4096
    max_windows_per_batch: int = 512
    shuffle_buffer_size: int = 16384
    deduplicate_ids: bool = True
    bucket_overhead_tokens: int = 512
    prefetch: bool = True

    def __post_init__(self) -> None:
        check_fields(
            "loader", self, *POSITIVE, "max_impressions_per_batch", "max_windows_per_batch", "shuffle_buffer_size"
        )
        check_fields("loader", self, *NON_NEGATIVE, "bucket_overhead_tokens")


@dataclass
class OptimConfig:
    """Optimizers: fused into the backward pass for tables, separate for the dense part.

    Attributes:
        warmup_steps: steps of linear learning-rate warm-up.
        decay: shape of the learning rate after warm-up, over ``train.epochs``.
        final_share: learning rate at the end, as a share of the peak.
        clip_norm: bound on the norm of the dense gradients; 0 leaves them alone.
        tasks: ``joint`` steps by the sum of the tasks' gradients; ``adatask`` sums steps of each task by moments of its
            own, dense and of rows, with a backward pass per task: a task is a tower of ``mmoe``, ``ple`` or ``hstu``.
            Bounds norms per task. Sharding plans count the rows' moments of one task only.
    """

    dense_optimizer: Literal["adam", "adamw"] = "adamw"
    dense_lr: float = 2e-3
    weight_decay: float = 1e-4
    sparse_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    sparse_lr: float = 0.05
    sparse_weight_decay: float = 0.0
    warmup_steps: int = 50
    lr_decay: Literal["none", "linear", "cosine"] = "cosine"
    min_lr_ratio: float = 0.05
    max_grad_norm: float = 1.0
    multitask: Literal["joint", "adatask"] = "joint"

    def __post_init__(self) -> None:
        check_fields("optim", self, *POSITIVE, "dense_lr", "sparse_lr")
        check_fields("optim", self, "in [0, 1]", lambda value: 0 <= value <= 1, "min_lr_ratio")
        names = ("weight_decay", "sparse_weight_decay", "warmup_steps", "max_grad_norm")
        check_fields("optim", self, *NON_NEGATIVE, *names)
        if self.multitask == "adatask":
            # L2 decay is a gradient that belongs to no task; that of AdamW is no gradient.
            if self.dense_optimizer == "adam" and self.weight_decay:
                raise ConfigError(
                    "optim.multitask adatask: optim.dense_optimizer must be adamw, or optim.weight_decay 0"
                )
            if self.sparse_weight_decay:
                raise ConfigError("optim.multitask adatask: optim.sparse_weight_decay must be 0")


@dataclass
class ForkMergeConfig:
    """ForkMerge (NeurIPS 2023): branches trained under other loss weights, merged by what validation says.

    Attributes:
        every: epochs that branches are trained for before they are merged; 0 does without branches.
        branches: for each, weights in place of those of ``loss``, by the names of its settings or of objectives.
            By default, one has the weights as they are, one leaves the times out and one has nothing else.
    """

    merge_interval_epochs: int = 0
    branch_loss_weights: list[dict[str, float]] = field(
        default_factory=lambda: [{}, {"time": 0.0}, {"action": 0.0, "label": 0.0, "objective": 0.0}]
    )

    def __post_init__(self) -> None:
        check_fields("train.forkmerge", self, *NON_NEGATIVE, "merge_interval_epochs")
        if len(self.branch_loss_weights) < 2:
            raise ConfigError("train.forkmerge.branch_loss_weights must be two or more")
        for branch in self.branch_loss_weights:
            for name, weight in branch.items():
                if name in _NO_WEIGHTS:
                    raise ConfigError(
                        f"train.forkmerge.branch_loss_weights: loss.{name} must be the same in all branches"
                    )
                if not weight >= 0:
                    raise ConfigError(f"train.forkmerge.branch_loss_weights: {name} {weight} must be at least 0")


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
        forkmerge: branches under other loss weights, and when they are merged: then early stopping, ``keep`` and the
            best checkpoint are of merged parameters.
    """

    epochs: int = 3
    max_steps: int = 0
    validation_interval: int = 0
    patience: int = 2
    monitor: Literal["loss", "auc"] = "loss"
    checkpoint_interval: int = 0
    keep_latest_k: int = 2
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_interval: int = 20
    forkmerge: ForkMergeConfig = field(default_factory=ForkMergeConfig)

    def __post_init__(self) -> None:
        check_fields("train", self, *POSITIVE, "epochs")
        names = (
            "max_steps",
            "validation_interval",
            "patience",
            "checkpoint_interval",
            "keep_latest_k",
            "seed",
            "log_interval",
        )
        check_fields("train", self, *NON_NEGATIVE, *names)


@dataclass
class EvaluateConfig:
    """How predictions are read off the model.

    Attributes:
        max_error: most that an action's probability, as the generator's sequences tell it, may be off, for those that
            are not followed to their end, but taken to go on as others do. In the mean it is off by far less.
        smoothing: pseudo-impressions at the base rate in the item-rate reference row.
        sequences: most frequent action sequences to compare with the generated ones; 0 for none.
    """

    max_unexplored_mass: float = 0.03
    item_rate_prior_weight: float = 20.0
    num_top_sequences: int = 0

    def __post_init__(self) -> None:
        check_fields("evaluate", self, "in [0, 1)", lambda value: 0 <= value < 1, "max_unexplored_mass")
        check_fields("evaluate", self, *POSITIVE, "item_rate_prior_weight")
        check_fields("evaluate", self, *NON_NEGATIVE, "num_top_sequences")


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

    def __post_init__(self) -> None:
        if self.train.forkmerge.merge_interval_epochs and self.loss.uncertainty_weighting:
            raise ConfigError(
                "train.forkmerge.merge_interval_epochs: loss.uncertainty_weighting must be off, it learns what branches differ in"
            )
        if self.optim.multitask == "adatask":
            if self.model.name == "a2gen":
                raise ConfigError("optim.multitask adatask: model.name must be one with a tower per task, not a2gen")
            if self.loss.uncertainty_weighting:
                raise ConfigError(
                    "optim.multitask adatask: loss.uncertainty_weighting must be off, tasks are balanced by their steps"
                )
