"""Settings of training, batches and evaluation; with the model's, everything that a run depends on."""

from dataclasses import dataclass, field, fields
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, SEED, check_fields
from a2gen_rec.config.gbdt import GBDTConfig
from a2gen_rec.config.model import LossConfig, ModelConfig, loss_weights
from a2gen_rec.config.sharding import ShardingConfig
from a2gen_rec.errors import ConfigError


@dataclass
class LoaderConfig:
    """Batching of windows on each rank."""

    max_impressions_per_batch: int = 4096
    """Maximum number of impressions in a batch, padding included: windows × longest window."""
    max_windows_per_batch: int = 512
    """Maximum number of user windows in a batch."""
    shuffle_buffer_size: int = 16384
    """Number of windows that are read and shuffled together."""
    deduplicate_ids: bool = True
    """Look up every distinct id of a batch once."""
    bucket_overhead_tokens: int = 512
    """Cost in tokens of one more length bucket of action sequences. Lengths share a padded bucket unless a separate
    one saves more padding than this."""
    prefetch: bool = True
    """Build batches in a background thread during the training step."""

    def __post_init__(self) -> None:
        names = ("max_impressions_per_batch", "max_windows_per_batch", "shuffle_buffer_size")
        check_fields("loader", self, *POSITIVE, *names)
        check_fields("loader", self, *NON_NEGATIVE, "bucket_overhead_tokens")


@dataclass
class OptimConfig:
    """Optimizers: fused into the backward pass for embedding tables, a separate one for dense parameters."""

    dense_optimizer: Literal["adam", "adamw"] = "adamw"
    """Optimizer of the dense parameters."""
    dense_lr: float = 2e-3
    """Peak learning rate of the dense optimizer."""
    weight_decay: float = 1e-4
    """Weight decay of the dense optimizer."""
    sparse_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    """Optimizer of the embedding tables."""
    sparse_lr: float = 0.05
    """Peak learning rate of the embedding tables."""
    sparse_weight_decay: float = 0.0
    """Decoupled weight decay of the embedding rows that a step looks up: they shrink by the factor 1 − learning rate ×
    decay. Only for ``rowwise_adagrad``."""
    warmup_steps: int = 50
    """Number of steps of linear learning-rate warm-up; none with ``--init-from``, which continues optimizer states."""
    lr_decay: Literal["none", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up, over ``train.epochs``."""
    min_lr_ratio: float = 0.05
    """Final learning rate as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Maximum norm of the dense gradients; 0 disables clipping."""
    multitask: Literal["joint", "adatask"] = "joint"
    """Multi-task optimization. ``joint`` steps by the sum of the tasks' gradients. ``adatask`` keeps separate
    optimizer states per task, dense and sparse, and sums the tasks' steps. It needs one backward pass per task, clips
    gradients per task, and requires a model with a tower per task: ``mmoe``, ``ple`` or ``hstu``. Sharding plans
    count the row states of one task only."""

    def __post_init__(self) -> None:
        check_fields("optim", self, *POSITIVE, "dense_lr", "sparse_lr")
        check_fields("optim", self, "in [0, 1]", lambda value: 0 <= value <= 1, "min_lr_ratio")
        names = ("weight_decay", "sparse_weight_decay", "warmup_steps", "max_grad_norm")
        check_fields("optim", self, *NON_NEGATIVE, *names)
        if self.sparse_weight_decay and self.sparse_optimizer != "rowwise_adagrad":
            raise ConfigError(
                f"optim.sparse_weight_decay {self.sparse_weight_decay} must be 0 with optim.sparse_optimizer "
                f"{self.sparse_optimizer}, which does not implement it"
            )
        if self.multitask == "adatask":
            # L2 decay is a gradient that belongs to no task. AdamW's decay is not a gradient.
            if self.dense_optimizer == "adam" and self.weight_decay:
                raise ConfigError(
                    "optim.multitask adatask: optim.dense_optimizer must be adamw, or optim.weight_decay 0"
                )
            if self.sparse_weight_decay:
                raise ConfigError("optim.multitask adatask: optim.sparse_weight_decay must be 0")


@dataclass
class ForkMergeConfig:
    """ForkMerge (NeurIPS 2023): branches trained with different loss weights and merged by validation metrics."""

    merge_interval_epochs: int = 0
    """Number of epochs between merges of the branches; 0 disables ForkMerge."""
    branch_loss_weights: list[dict[str, float]] = field(
        default_factory=lambda: [
            {},
            {"time_weight": 0.0},
            {"action_weight": 0.0, "label_weight": 0.0, "default_objective_weight": 0.0},
        ]
    )
    """Loss weights of each branch, by setting of ``loss`` or by objective; missing ones are those of ``loss``. By
    default: all weights unchanged, without times, and times only."""

    def __post_init__(self) -> None:
        check_fields("train.forkmerge", self, *NON_NEGATIVE, "merge_interval_epochs")
        if len(self.branch_loss_weights) < 2:
            raise ConfigError("train.forkmerge.branch_loss_weights must be two or more")
        shared = {item.name for item in fields(LossConfig)} - set(loss_weights())
        for branch in self.branch_loss_weights:
            for name, weight in branch.items():
                if name in shared:
                    raise ConfigError(
                        f"train.forkmerge.branch_loss_weights: loss.{name} must be the same in all branches"
                    )
                if not weight >= 0:
                    raise ConfigError(f"train.forkmerge.branch_loss_weights: {name} {weight} must be at least 0")


@dataclass
class TrainConfig:
    """The training run."""

    epochs: int = 3
    """Number of passes over the training windows."""
    max_steps: int = 0
    """Maximum number of steps; 0 for no limit."""
    validation_interval: int = 0
    """Validation interval in steps; 0 validates once per epoch."""
    patience: int = 2
    """Number of validations without improvement before early stopping; 0 disables early stopping."""
    monitor: Literal["loss", "auc"] = "loss"
    """Validation metric that selects the best checkpoint and triggers early stopping. ``auc`` is the mean over actions
    and labels, or over objectives for logs without either; the loss is used if none has positives and negatives."""
    checkpoint_interval: int = 0
    """Checkpointing interval in steps; 0 saves once per epoch."""
    keep_latest_k: int = 2
    """Number of latest checkpoints kept in addition to the best one; 0 keeps all."""
    seed: int = 0
    """Random seed of initial parameters, dropout and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; ``auto`` uses a GPU if available."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numerical precision: ``bf16`` is autocast on GPU; ``auto`` uses bf16 on GPU and fp32 on CPU."""
    log_interval: int = 20
    """Logging interval in steps, on the console and in TensorBoard."""
    forkmerge: ForkMergeConfig = field(default_factory=ForkMergeConfig)
    """ForkMerge branches. With them, early stopping, ``keep_latest_k`` and the best checkpoint apply to merged
    parameters."""
    replay_share: float = 0.0
    """With ``--init-from``: windows of the earlier run's dataset that each epoch reads first, against forgetting, as a
    share of the training windows."""

    def __post_init__(self) -> None:
        check_fields("train", self, *POSITIVE, "epochs")
        names = ("max_steps", "validation_interval", "patience", "checkpoint_interval", "keep_latest_k")
        check_fields("train", self, *NON_NEGATIVE, *names, "log_interval", "replay_share")
        check_fields("train", self, *SEED, "seed")


@dataclass
class EvaluateConfig:
    """Evaluation of predictions."""

    max_unexplored_mass: float = 0.03
    """Maximum total probability of pruned action sequences, which are extrapolated. It bounds the error of every
    reported action probability; the mean error is far smaller."""
    item_rate_prior_weight: float = 20.0
    """Prior weight of the item-rate baseline, in pseudo-impressions at the base rate."""
    num_top_sequences: int = 0
    """Number of most frequent action sequences to compare with the generated ones; 0 for none."""

    def __post_init__(self) -> None:
        check_fields("evaluate", self, "in [0, 1)", lambda value: 0 <= value < 1, "max_unexplored_mass")
        check_fields("evaluate", self, *POSITIVE, "item_rate_prior_weight")
        check_fields("evaluate", self, *NON_NEGATIVE, "num_top_sequences")


@dataclass
class Config:
    """All settings that a training run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Settings of the model."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Batching."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """Options of the sharding planner."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training run."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation of predictions."""
    gbdt: GBDTConfig = field(default_factory=GBDTConfig)
    """Gradient boosted trees of ``model.name: gbdt``; other models ignore them."""

    def __post_init__(self) -> None:
        if self.model.name == "gbdt" and self.train.forkmerge.merge_interval_epochs:
            raise ConfigError("train.forkmerge.merge_interval_epochs: ForkMerge cannot train model.name gbdt")
        if self.train.forkmerge.merge_interval_epochs and self.loss.uncertainty_weighting:
            raise ConfigError(
                "train.forkmerge.merge_interval_epochs: ForkMerge cannot be combined with loss.uncertainty_weighting: "
                "branches differ in the loss weights it would learn"
            )
        if self.model.id_dropout and not self.loader.deduplicate_ids:
            raise ConfigError("model.id_dropout: loader.deduplicate_ids must be on; it looks up row 0 in every batch")
        if self.optim.multitask == "adatask":
            if self.model.name in ("a2gen", "gbdt"):
                raise ConfigError(
                    f"optim.multitask adatask: model.name must be one with a tower per task, not {self.model.name}"
                )
            if self.loss.uncertainty_weighting:
                raise ConfigError(
                    "optim.multitask adatask: loss.uncertainty_weighting must be off, tasks are balanced by their steps"
                )
