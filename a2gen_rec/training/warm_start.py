"""Warm start: parameters and optimizer states of an earlier run, for a later increment of its data [ours].

Rows never move, so a value keeps its vector. Rows that the earlier run has not trained for their present value are
initialized: those of new values, rows that a retired value has left, and rows of grown tables.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import check_later_data
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.errors import UserError
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import TrainingModel
from a2gen_rec.training.checkpoint import EarlierRun
from a2gen_rec.training.dcp_storage import IOPathReader
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext


@dataclass(frozen=True)
class WarmStart:
    """Best checkpoint of an earlier run, from which a run starts.

    Attributes:
        checkpoint: Directory of the checkpoint.
        step: Its step.
        card: Dataset card of its training.
        dataset: Dataset of the new run. Its new rows are those that the checkpoint does not know.
        earlier: Record of the earlier run.
    """

    checkpoint: str
    step: int
    card: DatasetCard
    dataset: Dataset
    earlier: EarlierRun

    @classmethod
    def open(cls, run: str, config: Config, dataset: Dataset) -> "WarmStart":
        """Check that a run can start from the parameters of ``run`` on a dataset.

        Raises:
            UserError: The earlier run has no checkpoint, another model, or data of another lineage.
        """
        path = checkpoint.best(run)
        state = checkpoint.TrainState.read(path)
        checkpoint.check_settings(state, asdict(config), run)
        card = state.dataset_card(path)
        check_later_data(dataset.card, card, dataset.path, run)
        new_rows = NewRows.since(dataset.path, dataset.card, card)
        earlier = EarlierRun(paths.abspath(run), checkpoint.fingerprint(path), state.data, list(card.identity.lineage))
        return cls(path, state.step, card, replace(dataset, new_rows=new_rows), earlier)

    def load(self, model: TrainingModel) -> None:
        """Load the parameters and optimizer states. Called by all ranks."""
        rows = {name: torch.tensor(rows) for name, rows in self.dataset.new_rows.rows.items()}
        load_earlier(self.checkpoint, model, rows)

    def evaluate(self, model: TrainingModel, config: Config, process: DistributedContext) -> dict[str, Any]:
        """Evaluate the loaded model on the new training split. New values have row 0, as for the earlier run.

        Called by all ranks, before training.

        Returns:
            On rank 0, the keys of ``a2gen evaluate --json``; elsewhere ``{}``. Also ``{}`` without later data, because
            the model has learned this split.
        """
        data, trained = self.dataset.card.identity, self.card.identity
        if data == trained:
            return {}
        parallel, ranker = model.model_parallel, model.model.ranker
        result = evaluate(parallel, ranker, self.dataset, "train", config, process)
        return result and {
            **result,
            "run": self.earlier.run,
            "step": self.step,
            "data": self.dataset.path,
            "data_digest": data.data_digest,
            "training_data_digest": trained.data_digest,
            "lists": {},
        }


def open_replay(earlier: EarlierRun, dataset: Dataset) -> Dataset:
    """Return the earlier run's dataset, with the card of the present one.

    Values that have retired since have row 0, because other values may have their rows.

    Raises:
        UserError: The earlier dataset was changed or removed, or is the present one.
    """
    problem = ""
    if earlier.lineage == dataset.card.identity.lineage:
        problem = "is the training data of this run as well"
    elif not paths.exists(earlier.data):
        problem = f"was removed, but {earlier.run} was trained on it"
    elif list((card := DatasetCard.load(earlier.data)).identity.lineage) != earlier.lineage:
        problem = f"is not the dataset that {earlier.run} was trained on"
    if problem:
        raise UserError(f"{earlier.data}: {problem}; set train.replay_share 0")
    return Dataset(earlier.data, dataset.card, new_rows=NewRows.since(dataset.path, dataset.card, card))


def check_same_start(saved: EarlierRun | None, init_from: str, run: str) -> None:
    """Check that a resumed run started from the run ``init_from``.

    Raises:
        UserError: It started from another run, or from none.
    """
    if saved is None or saved.run != paths.abspath(init_from):
        start = f"started from {saved.run}" if saved else "did not start from another run"
        raise UserError(f"{run}: has checkpoints and {start}; choose another --run, or leave out --init-from")


class GrowingTablesPlanner(DefaultLoadPlanner):
    """Load planner for tables with more rows than in the checkpoint: further rows keep their values.

    DCP refuses to load a tensor of another size. Rows are read shard by shard, under any plan and number of ranks.

    Args:
        rows: Table -> rows of the model.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        super().__init__()
        self.rows = rows

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = dict(self.metadata.state_dict_metadata)
        for name, stored in saved.items():
            table = _table_of(name, self.rows)
            if table and isinstance(stored, TensorStorageMetadata) and stored.size[0] < self.rows[table]:
                saved[name] = replace(stored, size=torch.Size([self.rows[table], *stored.size[1:]]))
        self.metadata = replace(self.metadata, state_dict_metadata=saved)
        return super().create_local_plan()


def check_growth(path: str, rows: Mapping[str, int]) -> None:
    """Check that no table has grown that is sharded by columns, with an optimizer state per row and shard.

    Raises:
        UserError: Naming the table.
    """
    stored = IOPathReader(path).read_metadata().state_dict_metadata
    sizes = [(name, x.size) for name, x in stored.items() if isinstance(x, TensorStorageMetadata)]
    weights = {_table_of(name, rows): size[0] for name, size in sizes if len(size) > 1}
    for name, size in sizes:
        table = _table_of(name, rows)
        if table and weights[table] < rows[table] and size[0] != weights[table]:
            raise UserError(
                f"{path}: table {table} has grown from {weights[table]} to {rows[table]} rows, but sharded by columns; "
                "train the first run with sharding.sharding_types [row_wise, table_wise]"
            )


def load_earlier(path: str, model: TrainingModel, new_rows: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of earlier data in place: parameters and optimizer states, no learning rates or random states.

    Called by all ranks. States per task (``optim.multitask: adatask``) are reset.

    Args:
        path: Checkpoint.
        model: Model with its initial values. Its tables have at least as many rows as in the checkpoint.
        new_rows: Table -> [rows] int64 rows that keep their initial vectors and optimizer states.

    Raises:
        UserError: The checkpoint has another model shape, or is corrupted.
    """
    state = checkpoint.state_tensors(model)
    loaded = {"model": state["model"], "optimizer": {"state": state["optimizer"]["state"]}}
    sizes = model.model.tables.rows
    initial = []
    for name, tensor in _flatten(loaded):
        if table := _table_of(name, sizes):
            for values, first in _shards(tensor):
                rows = new_rows.get(table, torch.zeros(0, dtype=torch.int64)) - first % sizes[table]
                rows = rows[(rows >= 0) & (rows < len(values))].to(values.device)
                initial.append((values, rows, values[rows].clone()))
    with checkpoint.translate_load_errors(path):
        check_growth(path, sizes)
        dcp.load(loaded, storage_reader=IOPathReader(path), planner=GrowingTablesPlanner(sizes))
    for values, rows, start in initial:
        values[rows] = start
    model.model_parallel.load_state_dict(loaded["model"])
    model.optimizer.load_state_dict(state["optimizer"])


def _table_of(name: str, tables: Mapping[str, Any]) -> str:
    """Return the table that a tensor of a checkpoint belongs to; empty for dense parameters."""
    return next((table for table in tables if f".{module_key(table)}." in f".{name}."), "")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shards(tensor: Any) -> list[tuple[Tensor, int]]:
    """Return the local parts of a tensor with their first row."""
    if isinstance(tensor, ShardedTensor):
        return [(shard.tensor, shard.metadata.shard_offsets[0]) for shard in tensor.local_shards()]
    return [(tensor, 0)] if isinstance(tensor, Tensor) and tensor.dim() else []
