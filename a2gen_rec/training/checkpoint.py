"""Checkpoints: everything a job needs to go on, whatever the number of ranks and the sharding plan.

``RUN/checkpoints/step-00000120/`` holds the tensors as ``torch.distributed.checkpoint`` writes them (parameters,
both optimizers, random states) and ``state.json`` (loader positions, progress, metrics, configuration, dataset
card). A checkpoint is written beside its place and moved there whole, so that any folder of that name is complete.
"""

import hashlib
import json
import pickle
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
from a2gen_rec.data.loader import LoaderState
from a2gen_rec.errors import UserError
from a2gen_rec.training.build import TrainingModel
from a2gen_rec.training.dcp_storage import IOPathReader, IOPathWriter
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import all_gather_object, sync_errors

CHECKPOINTS_DIR, STATE_FILE = "checkpoints", "state.json"

_ORDER = (
    ("loader", "max_impressions"),
    ("loader", "max_windows"),
    ("loader", "buffer_windows"),
    ("train", "seed"),
)  # settings that make the order of batches


@dataclass
class TrainState:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: optimizer steps taken.
        windows: training windows consumed in the current epoch, over all ranks.
        positions: where each rank's loader stands.
        best, best_step: best value of the monitored metric (lower is better) and its step; None before any.
        waited: validations since the best one.
        config: the resolved configuration; data: the dataset's folder; card: its dataset card.
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

    @classmethod
    def read(cls, checkpoint: str) -> "TrainState":
        """Read ``state.json`` of a checkpoint.

        Raises:
            UserError: it is damaged or of another version.
        """
        file = paths.join(checkpoint, STATE_FILE)
        try:
            raw = json.loads(paths.read_text(file))
            return cls(**{**raw, "positions": [LoaderState(**position) for position in raw["positions"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: not a checkpoint's state ({error})") from error


def latest(run: str) -> str | None:
    """The last complete checkpoint of a run; None if there is none."""
    steps = _steps(run)
    return checkpoint_path(run, steps[-1]) if steps else None


def best(run: str) -> str:
    """The checkpoint with the best validation metric, or the last one where none was validated.

    Raises:
        UserError: the run has no checkpoint.
    """
    found = latest(run)
    if found is None:
        raise UserError(f"{run}: no checkpoint here; is it the folder given to `a2gen train --run`?")
    step = TrainState.read(found).best_step
    marked = found if step is None else checkpoint_path(run, step)
    return marked if paths.exists(marked) else found


def fingerprint(checkpoint: str) -> str:
    """Tells a checkpoint's tensors from any others, a copy's aside: 12 hexadecimal digits.

    Of the tensors' metadata, which has an identifier that is made anew whenever tensors are saved. ``state.json`` may
    be written again for the same ones.

    Raises:
        UserError: the metadata cannot be read.
    """
    file = paths.join(checkpoint, ".metadata")
    try:
        with g_pathmgr.open(file, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def save(run: str, built: TrainingModel, state: TrainState, keep: int) -> None:
    """Write a checkpoint, then drop those beyond the last ``keep`` and the best. Called by all ranks.

    A step saved before keeps its tensors, which can be no others, and gets the new state.

    Raises:
        UserError: the run's folder cannot be written to.
    """
    target = checkpoint_path(run, state.step)
    beside = f"{target}.writing"
    leads = dist.get_rank() == 0
    text = json.dumps(asdict(state), indent=1)
    again = all_gather_object(paths.exists(target))[0]
    if not again:
        with sync_errors(), _translate_errors(beside):
            if leads:
                _remove(beside)
                g_pathmgr.mkdirs(beside)
        with _translate_errors(beside):
            dcp.save(state_tensors(built), storage_writer=IOPathWriter(beside))
    with sync_errors(), _translate_errors(beside):
        if leads:
            paths.write_text(paths.join(target if again else beside, STATE_FILE), text)
            if not again:
                g_pathmgr.mv(beside, target)
            for step in _steps(run)[:-keep] if keep else []:
                if step not in (state.best_step, state.step):
                    _remove(checkpoint_path(run, step))


@contextmanager
def _translate_errors(beside: str) -> Iterator[None]:
    """Turn a failed write into the user's error and take back what was half written."""
    try:
        yield
    except (OSError, CheckpointException, UserError) as error:
        if dist.get_rank() == 0:
            with suppress(OSError):
                _remove(beside)
        raise UserError(f"{beside}: checkpoint cannot be written ({_cause(error)})") from error


def load(checkpoint: str, built: TrainingModel, with_optimizer: bool = True) -> None:
    """Fill model (and optimizers, random state) in place from a checkpoint. Called by all ranks.

    Raises:
        UserError: the checkpoint is of another model shape, or damaged.
    """
    found = state_tensors(built, with_optimizer)
    reader = IOPathReader(checkpoint)
    try:
        saved = reader.read_metadata().state_dict_metadata
        rng = {name: value for name, value in found.pop("rng").items() if f"rng.{name}" in saved}
        if rng:  # saved by as many ranks
            found["rng"] = rng
        dcp.load(found, storage_reader=reader)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError, LookupError, ValueError) as error:
        raise UserError(f"{checkpoint}: does not fit this model or is damaged ({_cause(error)})") from error
    built.model_parallel.load_state_dict(found["model"])
    if with_optimizer:
        built.optimizer.load_state_dict(found["optimizer"])
        if _rng_key() in rng:
            torch.set_rng_state(rng[_rng_key()])
        if f"cuda_{_rng_key()}" in rng:
            torch.cuda.set_rng_state(rng[f"cuda_{_rng_key()}"])


def check_compatible(saved: TrainState, config: dict[str, Any], card: dict[str, Any], run: str) -> None:
    """Refuse to go on with a model of another shape than the checkpoint's.

    Raises:
        UserError: naming the first setting that differs.
    """
    default = asdict(ModelConfig())
    for name, value in config["model"].items():
        before = saved.config["model"].get(name, default[name])  # a setting younger than the checkpoint
        if before != value and name not in ("attention_impl", "dropout", "embedding_init_scale"):
            raise UserError(
                f"{run}: its checkpoint has model.{name} = {before}, the configuration asks for {value}; "
                "give the same model, or another --run"
            )
    if saved.config["optim"]["tables"] != config["optim"]["tables"]:
        raise UserError(f"{run}: its checkpoint has optim.sparse_optimizer = {saved.config['optim']['tables']}")
    if (before := saved.config["optim"].get("tasks", "joint")) != config["optim"]["tasks"]:
        raise UserError(f"{run}: its checkpoint has optim.multitask = {before}, whose moments are others")
    if (before := saved.config["loss"].get("uncertainty", False)) != config["loss"]["uncertainty"]:
        raise UserError(
            f"{run}: its checkpoint has loss.uncertainty_weighting = {before}, whose weights are learned with it"
        )
    for name in ("actions", "labels", "objectives", "timed", "features"):
        if saved.card.get(name) != card[name]:
            raise UserError(f"{run}: was trained on a dataset with other {name}; prepare it the same way again")
    if saved.windows:  # in mid-epoch, where the loader stands is told in its own batches
        for section, name in _ORDER:
            before, now = saved.config[section][name], config[section][name]
            if before != now:
                raise UserError(f"{run}: stopped within an epoch with {section}.{name} = {before}, now asked for {now}")
        for name in ("splits", "history", "max_targets"):
            if saved.card[name] != card[name]:
                raise UserError(f"{run}: stopped within an epoch over a dataset with other {name}; give that one")


def state_tensors(built: TrainingModel, with_optimizer: bool = True) -> dict[str, Any]:
    """All tensors of a checkpoint as they are in memory, by name: ``model``, ``optimizer`` and more, ``rng``."""
    found: dict[str, Any] = {"model": built.model_parallel.state_dict(), "rng": {}}
    if with_optimizer:
        optimizer = built.optimizer.state_dict()
        # Plans differ in which tables have state on this rank; SGD's is empty under any plan.
        optimizer["state"] = {name: state for name, state in optimizer["state"].items() if state}
        found |= {"optimizer": optimizer, "rng": {_rng_key(): torch.get_rng_state()}}
        if built.adatask is not None:
            found["states_per_task"] = built.adatask.tables.tensors()
        if torch.cuda.is_available():
            found["rng"][f"cuda_{_rng_key()}"] = torch.cuda.get_rng_state()
    return found


def _rng_key() -> str:
    return f"rank_{dist.get_rank()}_of_{dist.get_world_size()}"


def checkpoint_path(run: str, step: int) -> str:
    """The folder of a step's checkpoint."""
    return paths.join(run, CHECKPOINTS_DIR, f"step-{step:08d}")


def delete_all(run: str) -> None:
    """Remove all checkpoints of a run."""
    for step in _steps(run):
        _remove(checkpoint_path(run, step))


def _steps(run: str) -> list[int]:
    names = paths.listdir(paths.join(run, CHECKPOINTS_DIR))
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


def _remove(folder: str) -> None:
    if not paths.exists(folder):
        return
    if paths.is_local(folder):
        shutil.rmtree(folder)
        return
    for name in paths.listdir(folder):
        g_pathmgr.rm(paths.join(folder, name))


def _cause(error: BaseException) -> str:
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Traceback")]
    return (lines[-1] if lines else type(error).__name__)[:300]
