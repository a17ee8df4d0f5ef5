"""The training loop: fit, validate, checkpoint, stop early, resume exactly."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config, LossConfig, TrainConfig
from a2gen_rec.data.batch import WindowBatch, count_names
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.data.synced_batches import SynchronizedBatches
from a2gen_rec.errors import UserError
from a2gen_rec.evaluation.evaluate import action_metrics, evaluation_batches
from a2gen_rec.evaluation.predict import predict
from a2gen_rec.losses.loss import term_means, term_names, total_loss, validate_objective_weights
from a2gen_rec.models.base import TargetEncoding
from a2gen_rec.models.embedding_tables import full_tables
from a2gen_rec.training import checkpoint
from a2gen_rec.training.adatask import TaskPipeline
from a2gen_rec.training.build import build_training_model, set_lr_scale
from a2gen_rec.training.logger import TrainingLogger
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, all_reduce_sum, sync_errors

CONFIG_FILE = "config.yaml"


class Trainer:
    """Trains one run, in this process as one of its ranks.

    Args:
        data: the dataset's folder; run: the run's folder, new or begun.
        config: the resolved configuration.
        begin: checkpoint to go on from; by default the run's last one.
        loss: weights to train under, where they are not those that validation goes by.
        what: told before training.

    Attributes:
        stopped: whether a signal ended the training.

    Raises:
        UserError: the run's folder is not writable or holds another model; the data break their contract.
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
    ) -> None:
        self.config, self.data, self.run, self.process, self.what = config, data, run, process, log_prefix
        self.stopped = False
        with sync_errors():
            self.card = _card(data, config)
            self.dataset = Dataset(data, self.card)
            self.stream = WindowDataset(
                self.dataset,
                "train",
                config.loader,
                full_tables(self.card, config.model),
                process.rank,
                process.world_size,
                seed=config.train.seed,
            )
            found = resume_from or checkpoint.latest(run)
            self.state = self._initial_state() if found is None else checkpoint.TrainState.read(found)
            if found is not None:
                checkpoint.check_compatible(self.state, asdict(config), self.card.to_dict(), run)
        self.state.data, self.state.card = data, self.card.to_dict()
        self.built = build_training_model(self.card, config, process)
        self.tasks = self.built.model.ranker.objective_tasks
        if loss is not None:
            validate_objective_weights(loss, self.tasks)
            self.built.model_parallel.module.loss.config = loss
        self.bf16 = _bf16(config, process)
        if found is not None:
            checkpoint.load(found, self.built)
        self.position = LoaderState.reshard(self.state.loader_states, process.world_size)[process.rank]
        if len(self.state.loader_states) != process.world_size:
            self.state.windows = self.stream.windows_consumed(self.position)

    def fit(self, until: int | None = None) -> dict[str, float]:
        """Train until the epochs are done, steps run out, validation stops improving, or a signal asks to stop.

        Args:
            until: epochs to be done, if less than the configuration's.

        Returns:
            the last validation's metrics; empty when none was made.
        """
        config, resumed_at = self.config.train, self.state.step
        epochs = config.epochs if until is None else min(until, config.epochs)
        pipeline = self._pipeline()
        with (
            _stop_signals() as asked,
            TrainingLogger(
                self.run, self.process.is_main, config.epochs, self.stream.windows, resumed_at, self.what
            ) as progress,
        ):
            if until is None and is_finished(self.state, config):
                progress.info(f"{self.run} is complete; raise train.epochs or train.max_steps, or name another run")
            while self.position.epoch < epochs and not self._done():
                batches = self._batches(asked)
                try:
                    self._epoch(pipeline, batches, progress)
                finally:
                    batches.close()
                if batches.stopped:
                    self.stopped = True
                    self.save()
                    progress.info(f"asked to stop: saved step {self.state.step}")
                    break
                if batches.exhausted:
                    self._next_epoch()
                    if not config.validation_interval:
                        self._validate(pipeline, progress)
                    self.save()
            if self._done() and checkpoint.latest(self.run) != checkpoint.checkpoint_path(self.run, self.state.step):
                self._validate(pipeline, progress)
                self.save()
        return self.state.metrics

    def _epoch(self, pipeline: TrainPipelineSparseDist, batches: SynchronizedBatches, progress: TrainingLogger) -> None:
        """Step until the batches end: the epoch is over, steps ran out, or a stop was agreed."""
        config = self.config.train
        self.built.model_parallel.train()
        while True:
            set_lr_scale(self.built.optimizer, self._learning_rate())
            began, waited = time.perf_counter(), batches.wait_s
            try:
                sums, _ = pipeline.progress(batches)
            except StopIteration:
                return
            taken = batches.issued.popleft()
            self.position = taken.position
            self.state.step += 1
            self.state.windows += taken.windows
            progress.step(sums, taken.counts, taken.windows, time.perf_counter() - began, batches.wait_s - waited)
            step = self.state.step
            if config.log_interval and step % config.log_interval == 0:
                self._log(progress)
            if config.validation_interval and step % config.validation_interval == 0:
                self._validate(pipeline, progress)
                self.save()
            elif config.checkpoint_interval and step % config.checkpoint_interval == 0:
                self.save()
            if self._done():
                batches.limit = 0

    def _pipeline(self) -> TrainPipelineSparseDist:
        built = self.built
        parts = (built.model_parallel, built.optimizer, self.process.device)
        if built.adatask is None:
            return TrainPipelineSparseDist(*parts, custom_model_fwd=self._forward)
        return TaskPipeline(built.adatask, *parts, custom_model_fwd=self._forward)

    def _forward(self, batch: WindowBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, TargetEncoding]]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
            return self.built.model_parallel(batch)

    def _batches(self, asked: list[int]) -> SynchronizedBatches:
        limit = self.config.train.max_steps
        loader = WindowDataLoader(
            self.stream, self.config.loader.prefetch, pin_memory=self.process.device.type == "cuda"
        )
        return SynchronizedBatches(
            loader.iter_epoch(self.position),
            lambda: self.stream.empty_batch,
            self.position,
            len(count_names(self.card)),
            stop=lambda: bool(asked),
            limit=limit - self.state.step if limit else None,
        )

    def _learning_rate(self) -> float:
        """Linear warm-up by steps, then decay by the share of the training done."""
        optim, train = self.config.optim, self.config.train
        step = self.state.step
        if step < optim.warmup_steps:
            return (step + 1) / optim.warmup_steps
        if optim.lr_decay == "none":
            return 1.0
        done = (self.position.epoch + self.state.windows / self.stream.windows) / train.epochs
        if train.max_steps:
            done = max(done, step / train.max_steps)
        done = min(done, 1.0)
        falling = 1 - done if optim.lr_decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling

    def _validate(self, pipeline: TrainPipelineSparseDist, progress: TrainingLogger) -> None:
        pipeline.detach()
        metrics = self.validate()
        pipeline.attach()
        self.record_validation(metrics, progress)

    def validate(self) -> dict[str, float]:
        """Metrics on validation, on all ranks."""
        batches = evaluation_batches(self.dataset, "valid", self.config, self.process, with_oracle=False)
        predictions, sums = predict(
            self.built.model_parallel,
            self.built.model.ranker,
            batches,
            self.card,
            self.config.evaluate.max_unexplored_mass,
        )
        metrics = {}
        if self.process.is_main:
            terms = term_means(sums.loss, sums.counts, sums.is_generative)
            metrics["loss"] = float(total_loss(terms, self.config.loss, self.tasks))
            metrics |= self._metric_names(terms)
            scores = action_metrics(predictions, predictions.probability, self.card)
            aucs = {f"auc/{name}": row["auc"] for name, row in scores.items() if row["auc"] is not None}
            metrics |= aucs | {"auc": sum(aucs.values()) / max(len(aucs), 1)}
        return all_gather_object(metrics)[0]

    def monitored_value(self, metrics: dict[str, float]) -> float:
        """What early stopping and the best checkpoint go by; lower is better."""
        return metrics["loss"] if self.config.train.monitor == "loss" else -metrics["auc"]

    def record_validation(self, metrics: dict[str, float], progress: TrainingLogger) -> None:
        """Note the metrics of the step that the state is at."""
        state, value = self.state, self.monitored_value(metrics)
        state.metrics = metrics
        if state.best is None or value < state.best:
            state.best, state.best_step, state.validations_since_best = value, state.step, 0
        else:
            state.validations_since_best += 1
        progress.log_validation(metrics, state.step, state.best_step == state.step)

    def _log(self, progress: TrainingLogger) -> None:
        sums, counts = progress.pop_means()
        all_reduce_sum(sums)
        terms = term_means(sums, counts, self.built.model.ranker.is_generative)
        loss = float(total_loss(terms, self.config.loss, self.tasks))
        if not math.isfinite(loss):
            raise UserError(
                f"{self.run}: the loss is {loss} at step {self.state.step}; lower optim.dense_lr or optim.sparse_lr, "
                f"or look into the data"
            )
        progress.log(
            self.state.step,
            {"loss": loss, **self._metric_names(terms)},
            self._learning_rate(),
        )

    def _metric_names(self, terms: torch.Tensor) -> dict[str, float]:
        names = term_names(self.tasks)
        return {f"loss/{name}": value for name, value in zip(names, terms.tolist(), strict=True)}

    def save(self) -> None:
        """Write a checkpoint. All ranks call it."""
        self.state.loader_states = all_gather_object(self.position)
        self.state.config = asdict(self.config)
        checkpoint.save(self.run, self.built, self.state, self.config.train.keep_latest_k)

    def _next_epoch(self) -> None:
        self.position = LoaderState(epoch=self.position.epoch + 1, world_size=self.process.world_size)
        self.state.windows = 0

    def _done(self) -> bool:
        return _should_stop(self.state, self.config.train)

    def _initial_state(self) -> checkpoint.TrainState:
        world = self.process.world_size
        return checkpoint.TrainState(
            step=0,
            windows=0,
            loader_states=[LoaderState(world_size=world)] * world,
            best=None,
            best_step=None,
            validations_since_best=0,
            config=asdict(self.config),
            data=self.data,
            card=self.card.to_dict(),
        )


def is_finished(state: checkpoint.TrainState, config: TrainConfig) -> bool:
    """Return whether training is complete: by epochs, by steps, or because validation stopped improving."""
    return all(position.epoch >= config.epochs for position in state.loader_states) or _should_stop(state, config)


def _should_stop(state: checkpoint.TrainState, config: TrainConfig) -> bool:
    tired = bool(config.patience) and state.validations_since_best >= config.patience
    return tired or bool(config.max_steps and state.step >= config.max_steps)


def _card(data: str, config: Config) -> DatasetCard:
    """The dataset's card, if the configuration can be trained on it."""
    card = DatasetCard.load(data)
    if config.model.max_history > card.max_history:
        raise UserError(
            f"{data}: its windows carry {card.max_history} impressions of history, model.max_history asks for "
            f"{config.model.max_history}; prepare it with --history {config.model.max_history}"
        )
    if not card.splits["valid"].targets:
        raise UserError(f"{data}: its validation split is empty; prepare it with one")
    return card


def _bf16(config: Config, process: DistributedContext) -> bool:
    precision = config.train.precision
    return precision == "bf16" or (precision == "auto" and process.device.type == "cuda")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals (Ctrl-C, SIGTERM) received so far; a second one of a kind has its usual effect."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
