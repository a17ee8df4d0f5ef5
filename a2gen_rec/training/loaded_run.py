"""Loading of a finished or running training run, for evaluation, ranking and scoring."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import load_compatible_card
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.errors import UserError
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import TrainingModel, build_training_model
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext, process_group

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass
class LoadedRun:
    """Best checkpoint of a run, loaded.

    Attributes:
        model: Sharded model.
        config: Configuration of the training.
        card: Dataset card of the training.
        data: Dataset directory.
        process: Process group and device of this rank.
        step: Step of the checkpoint.
        fingerprint: Identifier of the checkpoint's tensors, see :func:`checkpoint.fingerprint`.
        identity: Identity of the dataset in ``data``; that of ``card`` for the training data.
        new_rows: Table rows of the dataset that the model does not know, as later increments admitted their values.
    """

    model: TrainingModel
    config: Config
    card: DatasetCard
    data: str
    process: DistributedContext
    step: int
    fingerprint: str
    identity: DataIdentity = field(default_factory=DataIdentity)
    new_rows: NewRows = field(default_factory=NewRows)

    @property
    def dataset(self) -> Dataset:
        """The dataset, with the card of the checkpoint except for the identity of the data."""
        return Dataset(self.data, replace(self.card, identity=self.identity), new_rows=self.new_rows)


@contextmanager
def load_run(run: str, data: str = "", device: DeviceChoice = "auto") -> Iterator[LoadedRun]:
    """Load a run's best checkpoint on all ranks of this job.

    Args:
        run: Run directory.
        data: Dataset directory; by default that of the training.
        device: Device; may differ from that of the training.

    Raises:
        UserError: There is no checkpoint, or it is incompatible with the dataset.
    """
    reject_gbdt(run)
    path = checkpoint.best(run)
    state, fingerprint = checkpoint.TrainState.read(path), checkpoint.fingerprint(path)
    config = restore_config(state.config)
    data = data or state.data
    card = state.dataset_card(path)
    current = load_compatible_card(data, card, run)
    new_rows = NewRows.since(data, current, card)
    config.sharding.hbm_gb = config.sharding.ddr_gb = 0.0  # limits of the training machines
    config.sharding.plan_file = ""
    config.optim.multitask = "joint"  # no training, hence no optimizer states per task
    with process_group(device) as process:
        if process.device.type == "cpu":
            config.sharding.compute_kernels = ["fused"]
        model = build_training_model(card, config, process)
        checkpoint.load(path, model, with_optimizer=False)
        yield LoadedRun(model, config, card, data, process, state.step, fingerprint, current.identity, new_rows)


def reject_gbdt(run: str) -> None:
    """Raise UserError for a run of ``model.name: gbdt``, which has neither checkpoints nor embedding tables."""
    if paths.exists(RunDir(run).gbdt_file):
        raise UserError(
            f"{run}: is a run of model.name gbdt, which only `a2gen evaluate` and `a2gen experiment` support"
        )


def restore_config(saved: dict[str, Any]) -> Config:
    """Restore the configuration of a checkpoint.

    Raises:
        UserError: The checkpoint has settings that are unknown to this version.
    """
    try:
        return Config(**{section.name: _restore(section.type, saved[section.name]) for section in fields(Config)})
    except (TypeError, KeyError) as error:
        raise UserError(f"checkpoint config is incompatible with this version of a2gen_rec: {error}") from error


def _restore(kind: Any, saved: dict[str, Any]) -> Any:
    inner = {field.name: field.type for field in fields(kind) if is_dataclass(field.type)}
    return kind(**{name: _restore(inner[name], value) if name in inner else value for name, value in saved.items()})
