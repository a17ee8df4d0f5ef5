"""Opening a finished (or running) training run, to evaluate it, rank with it or score by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from a2gen_rec.config import Config
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import TrainingModel, build_training_model
from a2gen_rec.utils.distributed import DistributedContext, process_group

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass
class LoadedRun:
    """A run's best checkpoint, loaded.

    Attributes:
        data: the dataset's folder; card: the card the model was trained with.
        step: of the checkpoint; digest: tells it from others of that step, see :func:`checkpoint.digest`.
    """

    model: TrainingModel
    config: Config
    card: DatasetCard
    data: str
    process: DistributedContext
    step: int
    fingerprint: str

    @property
    def dataset(self) -> Dataset:
        """The dataset, with the card of the checkpoint."""
        return Dataset(self.data, self.card)


@contextmanager
def load_run(run: str, data: str = "", device: DeviceChoice = "auto") -> Iterator[LoadedRun]:
    """Load a run's best checkpoint on the ranks this process is one of.

    Args:
        data: dataset folder; empty takes the one the run was trained on.
        device: need not be the one the run was trained on.

    Raises:
        UserError: no checkpoint, or it does not fit the dataset.
    """
    place = checkpoint.best(run)
    state, digest = checkpoint.TrainState.read(place), checkpoint.fingerprint(place)
    config = restore_config(state.config)
    data = data or state.data
    card = DatasetCard.from_dict(state.card, f"{place}/{checkpoint.STATE_FILE}")
    present = DatasetCard.load(data)
    for name in ("actions", "labels", "objectives", "timed_actions", "features"):
        if getattr(present, name) != getattr(card, name):
            raise UserError(f"{data}: its {name} differ from those the run {run} was trained with")
    config.sharding.hbm_gb = config.sharding.ddr_gb = 0.0  # of the machines it was trained on
    config.sharding.plan_file = ""
    config.optim.multitask = "joint"  # nothing is trained: no need of moments per task
    with process_group(device) as process:
        if process.device.type == "cpu":
            config.sharding.compute_kernels = ["fused"]
        built = build_training_model(card, config, process)
        checkpoint.load(place, built, with_optimizer=False)
        yield LoadedRun(built, config, card, data, process, state.step, digest)


def restore_config(saved: dict[str, Any]) -> Config:
    """The configuration a checkpoint was written with.

    Raises:
        UserError: it has settings that this version does not.
    """
    try:
        return Config(**{section.name: _restore(section.type, saved[section.name]) for section in fields(Config)})
    except TypeError as error:
        raise UserError(f"the run was saved by another version of a2gen_rec: {error}") from error


def _restore(kind: Any, saved: dict[str, Any]) -> Any:
    inner = {field.name: field.type for field in fields(kind) if is_dataclass(field.type)}
    return kind(**{name: _restore(inner[name], value) if name in inner else value for name, value in saved.items()})
