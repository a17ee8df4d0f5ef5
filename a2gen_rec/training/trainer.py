"""Training loop with validation, checkpoints, early stopping and exact resumption."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config, LossConfig, TrainConfig
from a2gen_rec.data.batch import WindowBatch, count_names
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.synced_batches import SynchronizedBatches
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.evaluate import action_metrics, evaluation_batches
from a2gen_rec.evaluation.objective_metrics import objective_metrics
from a2gen_rec.evaluation.predict import EvaluationSums, Predictions, outcome_columns, predict
from a2gen_rec.losses.loss import term_means, term_names, total_loss, validate_objective_weights
from a2gen_rec.models.base import TargetEncoding
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.sharding.planner import precision_warning
from a2gen_rec.training import checkpoint
from a2gen_rec.training.adatask import TaskPipeline
from a2gen_rec.training.build import build_training_model, set_lr_scale
from a2gen_rec.training.logger import TrainingLogger
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import RunLock
from a2gen_rec.training.warm_start import WarmStart, check_same_start, open_replay
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, all_reduce_sum, sync_errors
from a2gen_rec.utils.signals import stop_requests


class Trainer:
    """Trainer of one run; this process is one of its ranks.

    Args:
        config: Resolved configuration.
        data: Dataset directory.
        run: Run directory, new or to be resumed.
        process: Process group and device of this rank.
        resume_from: Checkpoint to start from; by default the run's latest.
        loss: Loss weights for training; validation always uses ``config.loss``.
        log_prefix: Text before the first log line.
        lock: Lock of the run, checked at every checkpoint; on rank 0.
        init_from: Earlier run whose best checkpoint a new run starts from; empty for none.

    Attributes:
        stopped: Whether a signal stopped training.
        warm_start: Checkpoint of the earlier run, in a run without checkpoints; None without an earlier run.

    Raises:
        UserError: The run directory is not writable or has a checkpoint of another model, the dataset violates its
            contract, or the earlier run has another model or lineage.
    """

    def __init__(
        self,
        config: Config,
        data: str,
        run: str,
        process: DistributedContext,
        resume_from: str | None = None,
        loss: LossConfig | None = None,
        log_prefix: str = "",
        lock: RunLock | None = None,
        init_from: str = "",
    ) -> None:
        self.config, self.data, self.run, self.process, self.log_prefix = config, data, run, process, log_prefix
        self.lock, self.stopped = lock, False
        self.warm_start: WarmStart | None = None
        with sync_errors():
            self.card = load_card(data, config)
            self.dataset = Dataset(data, self.card)
            start = resume_from or RunDir(run).latest_checkpoint()
            self.state = self._initial_state() if start is None else checkpoint.TrainState.read(start)
            if start is not None:
                if init_from:
                    check_same_start(self.state.initialized_from, init_from, run)
                checkpoint.check_compatible(self.state, asdict(config), self.card, data, run)
                if self.card.identity != self.state.dataset_card(start).identity:  # metrics of other impressions
                    self.state.best = self.state.best_step = None
                    self.state.validations_since_best = 0
            elif init_from:
                self.warm_start = WarmStart.open(init_from, config, self.dataset)
                self.state.initialized_from = self.warm_start.earlier
            if config.train.replay_share and self.state.initialized_from is None:
                raise ConfigError(f"train.replay_share {config.train.replay_share} requires --init-from")
            self.train_windows = self._open_train_windows()
        self.state.data, self.state.card = data, self.card.to_dict()
        self.training_model = build_training_model(self.card, config, process)
        self.tasks = self.training_model.model.ranker.objective_tasks
        if loss is not None:
            validate_objective_weights(loss, self.tasks)
            self.training_model.model_parallel.module.loss.config = loss
        self.bf16 = _use_bf16(config, process)
        if start is not None:
            checkpoint.load(start, self.training_model)
        elif self.warm_start is not None:
            self.warm_start.load(self.training_model)
        self.loader_state = LoaderState.reshard(self.state.loader_states, process.world_size)[process.rank]
        if len(self.state.loader_states) != process.world_size:
            self.state.windows = self.train_windows.windows_consumed(self.loader_state)

    def fit(self, until_epoch: int | None = None) -> dict[str, float]:
        """Train until the last epoch or step, early stopping, or a stop signal.

        Args:
            until_epoch: Number of epochs after which to stop; by default ``config.train.epochs``.

        Returns:
            Metrics of the last validation; empty if there was none.
        """
        config, resumed_at = self.config.train, self.state.step
        epochs = config.epochs if until_epoch is None else min(until_epoch, config.epochs)
        pipeline = self._pipeline()
        with (
            stop_requests() as received_signals,
            TrainingLogger(
                self.run,
                self.process.is_main,
                config.epochs,
                self.train_windows.num_windows,
                resumed_at,
                self.log_prefix,
            ) as progress,
        ):
            if not resumed_at and (warning := precision_warning(self.process.device.type, self.config.sharding.dtype)):
                progress.info(f"warning: {warning}")
            if not self.has_validation:
                progress.info("no validation split; the latest checkpoint will be the best")
            if until_epoch is None and is_finished(self.state, config):
                progress.info("training is already complete; increase epochs or max_steps to continue")
            while self.loader_state.epoch < epochs and not self._done():
                batches = self._batches(received_signals)
                try:
                    self._epoch(pipeline, batches, progress)
                finally:
                    batches.close()
                if batches.stopped:
                    self.stopped = True
                    self.save()
                    progress.info(f"stop requested; checkpoint saved at step {self.state.step}")
                    break
                if batches.exhausted:
                    self._next_epoch()
                    if not config.validation_interval:
                        self._validate(pipeline, progress)
                    self.save()
            run_dir = RunDir(self.run)
            if self._done() and run_dir.latest_checkpoint() != run_dir.checkpoint(self.state.step):
                self._validate(pipeline, progress)
                self.save()
        return self.state.metrics

    def _epoch(self, pipeline: TrainPipelineSparseDist, batches: SynchronizedBatches, progress: TrainingLogger) -> None:
        """Run optimizer steps until the batches end: end of the epoch, last step, or a stop requested on any rank."""
        config = self.config.train
        self.training_model.model_parallel.train()
        while True:
            set_lr_scale(self.training_model.optimizer, self._learning_rate())
            started, wait_before = time.perf_counter(), batches.wait_s
            try:
                sums, _ = pipeline.progress(batches)
            except StopIteration:
                return
            batch = batches.issued.popleft()
            self.loader_state = batch.loader_state
            self.state.step += 1
            self.state.windows += batch.num_windows
            seconds, wait_s = time.perf_counter() - started, batches.wait_s - wait_before
            self.state.seconds += seconds
            progress.step(sums, batch.counts, batch.num_windows, seconds, wait_s)
            step = self.state.step
            if config.log_interval and step % config.log_interval == 0:
                self._log(progress)
            if config.validation_interval and step % config.validation_interval == 0:
                self._validate(pipeline, progress)
                self.save()
            elif config.checkpoint_interval and step % config.checkpoint_interval == 0:
                self.save()
            if self._done():
                batches.max_batches = 0

    def _pipeline(self) -> TrainPipelineSparseDist:
        built = self.training_model
        parts = (built.model_parallel, built.optimizer, self.process.device)
        if built.adatask is None:
            return TrainPipelineSparseDist(*parts, custom_model_fwd=self._forward)
        return TaskPipeline(built.adatask, *parts, custom_model_fwd=self._forward)

    def _forward(self, batch: WindowBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, TargetEncoding]]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
            return self.training_model.model_parallel(batch)

    def _batches(self, received_signals: list[int]) -> SynchronizedBatches:
        limit = self.config.train.max_steps
        loader = WindowDataLoader(
            self.train_windows, self.config.loader.prefetch, pin_memory=self.process.device.type == "cuda"
        )
        return SynchronizedBatches(
            loader.iter_epoch(self.loader_state),
            lambda: self.train_windows.empty_batch,
            self.loader_state,
            len(count_names(self.card)),
            should_stop=lambda: bool(received_signals),
            max_batches=limit - self.state.step if limit else None,
        )

    def _learning_rate(self) -> float:
        """Return the learning-rate scale: linear warm-up by steps, then decay by the completed fraction of training.

        A run that starts from an earlier one has its optimizer states, and no warm-up.
        """
        optim, train = self.config.optim, self.config.train
        step = self.state.step
        if step < optim.warmup_steps and self.state.initialized_from is None:
            return (step + 1) / optim.warmup_steps
        if optim.lr_decay == "none":
            return 1.0
        completed = (self.loader_state.epoch + self.state.windows / self.train_windows.num_windows) / train.epochs
        if train.max_steps:
            completed = max(completed, step / train.max_steps)
        completed = min(completed, 1.0)
        decay = 1 - completed if optim.lr_decay == "linear" else (1 + math.cos(math.pi * completed)) / 2
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * decay

    def _validate(self, pipeline: TrainPipelineSparseDist, progress: TrainingLogger) -> None:
        if not self.has_validation:
            return
        pipeline.detach()
        metrics = self.validate()
        pipeline.attach()
        self.record_validation(metrics, progress)

    @property
    def has_validation(self) -> bool:
        """Whether the dataset has a validation split. Without one, the latest checkpoint is the best."""
        return self.card.splits["valid"].targets > 0

    def validate(self) -> dict[str, float]:
        """Return :func:`validation_metrics`, on all ranks."""
        batches = evaluation_batches(self.dataset, "valid", self.config, self.process, with_oracle=False)
        predictions, sums = predict(
            self.training_model.model_parallel,
            self.training_model.model.ranker,
            batches,
            self.card,
            self.config.evaluate.max_unexplored_mass,
        )
        metrics = {}
        if self.process.is_main:
            metrics = validation_metrics(predictions, sums, self.card, self.config, self.tasks)
        return all_gather_object(metrics)[0]

    def monitored_value(self, metrics: dict[str, float]) -> float:
        """Return the value that early stopping and the best checkpoint use; lower is better.

        Without any AUC (no outcome has both classes), it is the loss whatever ``train.monitor`` is.
        """
        return -metrics["auc"] if self.config.train.monitor == "auc" and "auc" in metrics else metrics["loss"]

    def record_validation(self, metrics: dict[str, float], progress: TrainingLogger) -> None:
        """Record validation metrics of the current step."""
        state, value = self.state, self.monitored_value(metrics)
        state.metrics = metrics
        if state.best is None or value < state.best:
            state.best, state.best_step, state.validations_since_best = value, state.step, 0
        else:
            state.validations_since_best += 1
        progress.log_validation(metrics, state.step, state.best_step == state.step)

    def _log(self, progress: TrainingLogger) -> None:
        sums, counts = progress.interval_sums()
        all_reduce_sum(sums)
        terms = term_means(sums, counts, self.training_model.model.ranker.is_generative)
        loss = float(total_loss(terms, self.config.loss, self.tasks))
        if not math.isfinite(loss):
            raise UserError(
                f"{self.run}: loss is {loss} at step {self.state.step}; lower optim.dense_lr or optim.sparse_lr, "
                f"or check the data"
            )
        progress.log(
            self.state.step,
            {"loss": loss, **_loss_terms(terms, self.tasks)},
            self._learning_rate(),
        )

    def save(self) -> None:
        """Write a checkpoint. Called by all ranks."""
        self.state.loader_states = all_gather_object(self.loader_state)
        self.state.config = asdict(self.config)
        checkpoint.save(self.run, self.training_model, self.state, self.config.train.keep_latest_k, self.lock)

    def _next_epoch(self) -> None:
        self.loader_state = LoaderState(epoch=self.loader_state.epoch + 1, world_size=self.process.world_size)
        self.state.windows = 0

    def _done(self) -> bool:
        return _should_stop(self.state, self.config.train)

    def _open_train_windows(self) -> WindowDataset:
        config, earlier, share = self.config, self.state.initialized_from, self.config.train.replay_share
        return WindowDataset(
            self.dataset,
            "train",
            config.loader,
            EmbeddingTables.from_card(self.card, config.model).full_tables,
            self.process.rank,
            self.process.world_size,
            seed=config.train.seed,
            replay=open_replay(earlier, self.dataset) if earlier and share else None,
            replay_share=share,
        )

    def _initial_state(self) -> checkpoint.TrainState:
        world_size = self.process.world_size
        return checkpoint.TrainState(
            step=0,
            windows=0,
            loader_states=[LoaderState(world_size=world_size)] * world_size,
            best=None,
            best_step=None,
            validations_since_best=0,
            config=asdict(self.config),
            data=self.data,
            card=self.card.to_dict(),
        )


def validation_metrics(
    predictions: Predictions, sums: EvaluationSums, card: DatasetCard, config: Config, tasks: Sequence[str]
) -> dict[str, float]:
    """Return ``loss``, its terms, ``auc`` and the AUC of every outcome.

    ``auc`` is the mean over actions and labels, or over predicted objectives if the log has neither. It is missing
    if none of them has both classes.
    """
    terms = term_means(sums.loss, sums.counts, sums.is_generative)
    metrics = {"loss": float(total_loss(terms, config.loss, tasks)), **_loss_terms(terms, tasks)}
    scores = action_metrics(predictions, predictions.probability, card)
    if not scores:
        scores = objective_metrics(predictions, outcome_columns(card), card)["objectives"]
    aucs = {f"auc/{name}": row["auc"] for name, row in scores.items() if row["auc"] is not None}
    return metrics | aucs | ({"auc": sum(aucs.values()) / len(aucs)} if aucs else {})


def _loss_terms(terms: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    return {f"loss/{name}": value for name, value in zip(term_names(tasks), terms.tolist(), strict=True)}


def is_finished(state: checkpoint.TrainState, config: TrainConfig) -> bool:
    """Return whether training is complete: last epoch on all ranks, last step, or early stopping."""
    return all(loader.epoch >= config.epochs for loader in state.loader_states) or _should_stop(state, config)


def _should_stop(state: checkpoint.TrainState, config: TrainConfig) -> bool:
    out_of_patience = bool(config.patience) and state.validations_since_best >= config.patience
    return out_of_patience or bool(config.max_steps and state.step >= config.max_steps)


def load_card(data: str, config: Config) -> DatasetCard:
    """Return the dataset card if the dataset suits the configuration."""
    card = DatasetCard.load(data)
    if config.model.max_history > card.max_history:
        raise UserError(
            f"{data}: dataset has max_history={card.max_history}, model needs {config.model.max_history}; "
            f"rerun prepare with --max-history {config.model.max_history}"
        )
    return card


def _use_bf16(config: Config, process: DistributedContext) -> bool:
    precision = config.train.precision
    return precision == "bf16" or (precision == "auto" and process.device.type == "cuda")
