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
from a2gen_rec.data.loader import Position, WindowLoader, WindowStream
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.data.synced_batches import AgreedBatches
from a2gen_rec.errors import UserError
from a2gen_rec.evaluation.evaluate import action_metrics, evaluation_batches
from a2gen_rec.evaluation.predict import predict
from a2gen_rec.losses.loss import check_weights, means, term_names, total
from a2gen_rec.models.base import Encoded
from a2gen_rec.models.embedding_tables import whole_tables
from a2gen_rec.training import checkpoint
from a2gen_rec.training.adatask import TaskPipeline
from a2gen_rec.training.build import build, schedule
from a2gen_rec.training.logger import Progress
from a2gen_rec.utils.distributed import Process, agreed, gather, together

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
        process: Process,
        begin: str | None = None,
        loss: LossConfig | None = None,
        what: str = "",
    ) -> None:
        self.config, self.data, self.run, self.process, self.what = config, data, run, process, what
        self.stopped = False
        with agreed():
            self.card = _card(data, config)
            self.stream = WindowStream(
                data,
                "train",
                self.card,
                config.loader,
                whole_tables(self.card, config.model),
                process.rank,
                process.world,
                seed=config.train.seed,
            )
            found = begin or checkpoint.latest(run)
            self.state = self._fresh() if found is None else checkpoint.State.read(found)
            if found is not None:
                checkpoint.check_shape(self.state, asdict(config), self.card.to_dict(), run)
        self.state.data, self.state.card = data, self.card.to_dict()
        self.built = build(self.card, config, process)
        self.tasks = self.built.model.ranker.tasks
        if loss is not None:
            check_weights(loss, self.tasks)
            self.built.dmp.module.loss.config = loss
        self.bf16 = _bf16(config, process)
        if found is not None:
            checkpoint.load(found, self.built)
        self.position = Position.merge(self.state.positions, process.world)[process.rank]
        if len(self.state.positions) != process.world:
            self.state.windows = self.stream.windows_before(self.position)

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
            _asked_to_stop() as asked,
            Progress(
                self.run, self.process.leads, config.epochs, self.stream.windows, resumed_at, self.what
            ) as progress,
        ):
            if until is None and is_finished(self.state, config):
                progress.note(f"{self.run} is complete; raise train.epochs or train.max_steps, or name another run")
            while self.position.epoch < epochs and not self._done():
                batches = self._batches(asked)
                try:
                    self._epoch(pipeline, batches, progress)
                finally:
                    batches.close()
                if batches.stopped:
                    self.stopped = True
                    self.save()
                    progress.note(f"asked to stop: saved step {self.state.step}")
                    break
                if batches.exhausted:
                    self._next_epoch()
                    if not config.validate_every:
                        self._validate(pipeline, progress)
                    self.save()
            if self._done() and checkpoint.latest(self.run) != checkpoint.place(self.run, self.state.step):
                self._validate(pipeline, progress)
                self.save()
        return self.state.metrics

    def _epoch(self, pipeline: TrainPipelineSparseDist, batches: AgreedBatches, progress: Progress) -> None:
        """Step until the batches end: the epoch is over, steps ran out, or a stop was agreed."""
        config = self.config.train
        self.built.dmp.train()
        while True:
            schedule(self.built.optimizer, self._learning_rate())
            began, waited = time.perf_counter(), batches.wait_s
            try:
                sums, _ = pipeline.progress(batches)
            except StopIteration:
                return
            taken = batches.taken.popleft()
            self.position = taken.position
            self.state.step += 1
            self.state.windows += taken.windows
            progress.step(sums, taken.counts, taken.windows, time.perf_counter() - began, batches.wait_s - waited)
            step = self.state.step
            if config.log_every and step % config.log_every == 0:
                self._log(progress)
            if config.validate_every and step % config.validate_every == 0:
                self._validate(pipeline, progress)
                self.save()
            elif config.checkpoint_every and step % config.checkpoint_every == 0:
                self.save()
            if self._done():
                batches.limit = 0

    def _pipeline(self) -> TrainPipelineSparseDist:
        built = self.built
        parts = (built.dmp, built.optimizer, self.process.device)
        if built.adatask is None:
            return TrainPipelineSparseDist(*parts, custom_model_fwd=self._forward)
        return TaskPipeline(built.adatask, *parts, custom_model_fwd=self._forward)

    def _forward(self, batch: WindowBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, Encoded]]:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
            return self.built.dmp(batch)

    def _batches(self, asked: list[int]) -> AgreedBatches:
        limit = self.config.train.max_steps
        loader = WindowLoader(self.stream, self.config.loader.background, pin_memory=self.process.device.type == "cuda")
        return AgreedBatches(
            loader.epoch(self.position),
            lambda: self.stream.empty,
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
        if optim.decay == "none":
            return 1.0
        done = (self.position.epoch + self.state.windows / self.stream.windows) / train.epochs
        if train.max_steps:
            done = max(done, step / train.max_steps)
        done = min(done, 1.0)
        falling = 1 - done if optim.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return optim.final_share + (1 - optim.final_share) * falling

    def _validate(self, pipeline: TrainPipelineSparseDist, progress: Progress) -> None:
        pipeline.detach()
        metrics = self.measure()
        pipeline.attach()
        self.validated(metrics, progress)

    def measure(self) -> dict[str, float]:
        """Metrics on validation, on all ranks."""
        batches = evaluation_batches(self.data, "valid", self.card, self.config, self.process, with_oracle=False)
        predictions, sums = predict(
            self.built.dmp, self.built.model.ranker, batches, self.card, self.config.evaluate.max_error
        )
        metrics = {}
        if self.process.leads:
            terms = means(sums.loss, sums.counts, sums.generated)
            metrics["loss"] = float(total(terms, self.config.loss, self.tasks))
            metrics |= self._named(terms)
            scores = action_metrics(predictions, predictions.probability, self.card)
            aucs = {f"auc/{name}": row["auc"] for name, row in scores.items() if row["auc"] is not None}
            metrics |= aucs | {"auc": sum(aucs.values()) / max(len(aucs), 1)}
        return gather(metrics)[0]

    def monitored(self, metrics: dict[str, float]) -> float:
        """What early stopping and the best checkpoint go by; lower is better."""
        return metrics["loss"] if self.config.train.monitor == "loss" else -metrics["auc"]

    def validated(self, metrics: dict[str, float], progress: Progress) -> None:
        """Note the metrics of the step that the state is at."""
        state, value = self.state, self.monitored(metrics)
        state.metrics = metrics
        if state.best is None or value < state.best:
            state.best, state.best_step, state.waited = value, state.step, 0
        else:
            state.waited += 1
        progress.validated(metrics, state.step, state.best_step == state.step)

    def _log(self, progress: Progress) -> None:
        sums, counts = progress.take()
        together(sums)
        terms = means(sums, counts, self.built.model.ranker.generates)
        loss = float(total(terms, self.config.loss, self.tasks))
        if not math.isfinite(loss):
            raise UserError(
                f"{self.run}: the loss is {loss} at step {self.state.step}; lower optim.dense_lr or optim.tables_lr, "
                f"or look into the data"
            )
        progress.log(
            self.state.step,
            {"loss": loss, **self._named(terms)},
            self._learning_rate(),
        )

    def _named(self, terms: torch.Tensor) -> dict[str, float]:
        names = term_names(self.tasks)
        return {f"loss/{name}": value for name, value in zip(names, terms.tolist(), strict=True)}

    def save(self) -> None:
        """Write a checkpoint. All ranks call it."""
        self.state.positions = gather(self.position)
        self.state.config = asdict(self.config)
        checkpoint.save(self.run, self.built, self.state, self.config.train.keep)

    def _next_epoch(self) -> None:
        self.position = Position(epoch=self.position.epoch + 1, world=self.process.world)
        self.state.windows = 0

    def _done(self) -> bool:
        return _tired(self.state, self.config.train)

    def _fresh(self) -> checkpoint.State:
        world = self.process.world
        return checkpoint.State(
            step=0,
            windows=0,
            positions=[Position(world=world)] * world,
            best=None,
            best_step=None,
            waited=0,
            config=asdict(self.config),
            data=self.data,
            card=self.card.to_dict(),
        )


def is_finished(state: checkpoint.State, config: TrainConfig) -> bool:
    """Return whether training is complete: by epochs, by steps, or because validation stopped improving."""
    return all(position.epoch >= config.epochs for position in state.positions) or _tired(state, config)


def _tired(state: checkpoint.State, config: TrainConfig) -> bool:
    tired = bool(config.patience) and state.waited >= config.patience
    return tired or bool(config.max_steps and state.step >= config.max_steps)


def _card(data: str, config: Config) -> DatasetCard:
    """The dataset's card, if the configuration can be trained on it."""
    card = DatasetCard.load(data)
    if config.model.history > card.history:
        raise UserError(
            f"{data}: its windows carry {card.history} impressions of history, model.history asks for "
            f"{config.model.history}; prepare it with --history {config.model.history}"
        )
    if not card.splits["valid"].targets:
        raise UserError(f"{data}: its validation split is empty; prepare it with one")
    return card


def _bf16(config: Config, process: Process) -> bool:
    precision = config.train.precision
    return precision == "bf16" or (precision == "auto" and process.device.type == "cuda")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
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
