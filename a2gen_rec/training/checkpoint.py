"""Checkpoints: the full state of a job, independent of the number of ranks and of the sharding plan.

``RUN/checkpoints/step-00000120/`` holds the tensors in the format of ``torch.distributed.checkpoint`` (parameters,
both optimizers, random states) and ``state.json`` (loader states, progress, metrics, configuration, dataset card).
A checkpoint is written to a temporary directory and renamed, so every directory of that name is complete.
"""

import json
import pickle
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from iopath.common.file_io import g_pathmgr
from torch.distributed.checkpoint.api import CheckpointException

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import check_same_data
from a2gen_rec.data.loader import LoaderState
from a2gen_rec.errors import UserError
from a2gen_rec.training.build import TrainingModel
from a2gen_rec.training.dcp_storage import IOPathReader, IOPathWriter
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import RunLock
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest
from a2gen_rec.utils.distributed import all_gather_object, sync_errors

STATE_FILE = "state.json"
FORMAT_VERSION = 5
"""Format of ``state.json`` and of the tensors' names."""

_MODEL_EXCEPTIONS = ("attention_impl", "dropout", "wide_dropout", "id_dropout", "embedding_init_scale")
"""Settings of the model that no tensor depends on."""
_STATE_SETTINGS = (
    ("sharding", "dtype"),
    ("optim", "sparse_optimizer"),
    ("optim", "multitask"),
    ("loss", "uncertainty_weighting"),
)  # settings that determine the type or presence of tensors in a checkpoint

_BATCH_ORDER_SETTINGS = (
    ("loader", "max_impressions_per_batch"),
    ("loader", "max_windows_per_batch"),
    ("loader", "shuffle_buffer_size"),
    ("train", "seed"),
    ("train", "replay_share"),
)  # settings that determine the order of batches


@dataclass(frozen=True)
class EarlierRun:
    """Run whose parameters another run started from.

    Attributes:
        run: Run directory.
        checkpoint: Fingerprint of the checkpoint.
        data: Dataset directory of its training.
        lineage: Lineage of that dataset.
    """

    run: str
    checkpoint: str
    data: str
    lineage: list[str]


@dataclass
class TrainState:
    """Content of a checkpoint in addition to its tensors.

    Attributes:
        step: Optimizer steps taken.
        windows: Training windows consumed in the current epoch, over all ranks.
        loader_states: Loader state of each rank.
        best: Best value of the monitored metric (lower is better); None before the first validation.
        best_step: Step of ``best``; None before the first validation.
        validations_since_best: Validations since ``best_step``.
        config: Resolved configuration.
        data: Dataset directory.
        card: Dataset card.
        metrics: Metrics of the last validation.
        seconds: Time in optimizer steps, over all resumptions.
        initialized_from: Earlier run whose parameters the run started from; None without a warm start.
        format_version: Format of ``state.json``.
    """

    step: int
    windows: int
    loader_states: list[LoaderState]
    best: float | None
    best_step: int | None
    validations_since_best: int
    config: dict[str, Any]
    data: str
    card: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    initialized_from: EarlierRun | None = None
    format_version: int = FORMAT_VERSION

    def dataset_card(self, file: str) -> DatasetCard:
        """Return the card of the training data; ``file`` is the source of the state, for messages."""
        return DatasetCard.from_dict(self.card, file)

    @classmethod
    def read(cls, checkpoint: str) -> "TrainState":
        """Read ``state.json`` of a checkpoint.

        Raises:
            UserError: The file is corrupted or has another format version.
        """
        file = paths.join(checkpoint, STATE_FILE)
        try:
            raw = json.loads(paths.read_text(file))
            version = raw.get("format_version", 1)
            if version != FORMAT_VERSION:
                raise UserError(f"{file}: unsupported format version {version}, expected {FORMAT_VERSION}")
            earlier = raw.get("initialized_from")
            raw["initialized_from"] = None if earlier is None else EarlierRun(**earlier)
            return cls(**{**raw, "loader_states": [LoaderState(**state) for state in raw["loader_states"]]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: not a checkpoint's state ({error})") from error


def best(run: str) -> str:
    """Return the checkpoint with the best validation metric, or the latest if none was validated.

    Raises:
        UserError: The run does not exist or has no checkpoint.
    """
    latest = RunDir(run).latest_checkpoint()
    if latest is None:
        paths.require_dir(run)
        raise UserError(f"{run}: no checkpoint in this run directory")
    step = TrainState.read(latest).best_step
    checkpoint = latest if step is None else RunDir(run).checkpoint(step)
    return checkpoint if paths.exists(checkpoint) else latest


def fingerprint(checkpoint: str) -> str:
    """Return 12 hexadecimal digits that identify a checkpoint's tensors; copies share them.

    They are a hash of the tensors' metadata, which contains an identifier drawn at every save of tensors.
    ``state.json`` may be rewritten for the same tensors.

    Raises:
        UserError: The metadata cannot be read.
    """
    file = paths.join(checkpoint, ".metadata")
    try:
        with g_pathmgr.open(file, "rb") as stream:
            return hex_digest(stream.read(), 12)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def save(run: str, model: TrainingModel, state: TrainState, keep_latest_k: int, lock: RunLock | None = None) -> None:
    """Write a checkpoint, then remove all but the latest ``keep_latest_k`` and the best. Called by all ranks.

    If the step is already saved, its tensors, which are the same, are kept and only its state is rewritten.

    Args:
        keep_latest_k: Number of latest checkpoints to keep; 0 keeps all.
        lock: Lock of the run on rank 0; None if nothing else writes the run.

    Raises:
        UserError: The run directory cannot be written, or another training took over the run.
    """
    run_dir = RunDir(run)
    target = run_dir.checkpoint(state.step)
    is_main = dist.get_rank() == 0
    text = json.dumps(asdict(state), indent=1)
    with sync_errors():
        if lock is not None:
            lock.check()
    exists, token = all_gather_object((paths.exists(target), secrets.token_hex(4)))[0]
    temporary = f"{target}.{token}.writing"
    if not exists:
        with sync_errors(), _translate_errors(temporary):
            if is_main:
                for name in paths.listdir(run_dir.checkpoints):
                    if name.endswith(".writing"):  # of a killed training
                        _remove(paths.join(run_dir.checkpoints, name))
                g_pathmgr.mkdirs(temporary)
        with _translate_errors(temporary):
            dcp.save(state_tensors(model), storage_writer=IOPathWriter(temporary))
    with sync_errors(), _translate_errors(temporary):
        if is_main:
            if lock is not None:
                lock.check()
            paths.write_text(paths.join(target if exists else temporary, STATE_FILE), text)
            if not exists:
                g_pathmgr.mv(temporary, target)
            for step in run_dir.checkpoint_steps()[:-keep_latest_k] if keep_latest_k else []:
                if step not in (state.best_step, state.step):
                    _remove(run_dir.checkpoint(step))


@contextmanager
def _translate_errors(temporary: str) -> Iterator[None]:
    """Turn a failed write into a UserError and remove the partial checkpoint."""
    try:
        yield
    except (OSError, CheckpointException, UserError) as error:
        if dist.get_rank() == 0:
            with suppress(OSError):
                _remove(temporary)
        raise UserError(f"{temporary}: checkpoint cannot be written ({_reason(error)})") from error


def load(checkpoint: str, model: TrainingModel, with_optimizer: bool = True) -> None:
    """Load model (and optimizers, random state) in place from a checkpoint. Called by all ranks.

    Raises:
        UserError: The checkpoint has another model shape, or is corrupted.
    """
    tensors = state_tensors(model, with_optimizer)
    reader = IOPathReader(checkpoint)
    with translate_load_errors(checkpoint):
        saved = reader.read_metadata().state_dict_metadata
        rng = {name: value for name, value in tensors.pop("rng").items() if f"rng.{name}" in saved}
        if rng:  # saved by the same number of ranks
            tensors["rng"] = rng
        dcp.load(tensors, storage_reader=reader)
    model.model_parallel.load_state_dict(tensors["model"])
    if with_optimizer:
        model.optimizer.load_state_dict(tensors["optimizer"])
        if _rng_key() in rng:
            torch.set_rng_state(rng[_rng_key()])
        if f"cuda_{_rng_key()}" in rng:
            torch.cuda.set_rng_state(rng[f"cuda_{_rng_key()}"])


@contextmanager
def translate_load_errors(checkpoint: str) -> Iterator[None]:
    """Turn the errors of reading a checkpoint's tensors into a UserError."""
    try:
        yield
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError, LookupError, ValueError) as error:
        raise UserError(f"{checkpoint}: incompatible with its config, or corrupted ({_reason(error)})") from error


def check_compatible(saved: TrainState, config: dict[str, Any], card: DatasetCard, data: str, run: str) -> None:
    """Check that training can resume from a checkpoint under ``config`` on the dataset ``data`` with the card ``card``.

    Raises:
        UserError: Naming the first setting that differs, or the first difference of the data.
    """
    check_settings(saved, config, run)
    trained = saved.dataset_card(run)
    check_same_data(card, trained, data, run)
    if saved.windows and card.identity != trained.identity:
        raise UserError(f"{run}: cannot change to a later increment, {data}, in the middle of an epoch")
    if saved.windows:  # within an epoch, loader states count batches
        for section, name in _BATCH_ORDER_SETTINGS:
            before, now = saved.config[section][name], config[section][name]
            if before != now:
                raise UserError(f"{run}: cannot change {section}.{name} ({before} -> {now}) in the middle of an epoch")


def check_settings(saved: TrainState, config: dict[str, Any], run: str) -> None:
    """Check that the tensors of a checkpoint fit a model of ``config``.

    Raises:
        UserError: Naming the first setting that differs.
    """
    default = asdict(ModelConfig())
    for name, value in config["model"].items():
        before = saved.config["model"].get(name, default[name])  # settings added after the checkpoint was saved
        if before != value and name not in _MODEL_EXCEPTIONS:
            raise UserError(
                f"{run}: checkpoint has model.{name}={before} but the config has {value}; "
                "use the same model, or another --run"
            )
    for section, name in _STATE_SETTINGS:
        before, now = saved.config[section][name], config[section][name]
        if before != now:
            raise UserError(
                f"{run}: checkpoint was trained with {section}.{name}={before} but the config has {now}; "
                "its tensors are incompatible"
            )


def state_tensors(model: TrainingModel, with_optimizer: bool = True) -> dict[str, Any]:
    """Return all tensors of a checkpoint by name: ``model``, ``rng``, ``optimizer``, ``states_per_task``."""
    tensors: dict[str, Any] = {"model": model.model_parallel.state_dict(), "rng": {}}
    if with_optimizer:
        optimizer = model.optimizer.state_dict()
        # Plans differ in which tables have state on this rank; SGD has none under any plan.
        optimizer["state"] = {name: state for name, state in optimizer["state"].items() if state}
        tensors |= {"optimizer": optimizer, "rng": {_rng_key(): torch.get_rng_state()}}
        if model.adatask is not None:
            tensors["states_per_task"] = model.adatask.tables.tensors()
        if torch.cuda.is_available():
            tensors["rng"][f"cuda_{_rng_key()}"] = torch.cuda.get_rng_state()
    return tensors


def _rng_key() -> str:
    return f"rank_{dist.get_rank()}_of_{dist.get_world_size()}"


def delete_all(run: str) -> None:
    """Delete all checkpoints of a run."""
    run_dir = RunDir(run)
    for step in run_dir.checkpoint_steps():
        _remove(run_dir.checkpoint(step))


def _remove(folder: str) -> None:
    if not paths.exists(folder):
        return
    if paths.is_local(folder):
        shutil.rmtree(folder)
        return
    for name in paths.listdir(folder):
        g_pathmgr.rm(paths.join(folder, name))


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Traceback")]
    return (lines[-1] if lines else type(error).__name__)[:300]
