"""Training of all boosters of a run on one rank."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import check_same_data
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.evaluation.predict import predict
from a2gen_rec.gbdt.files import GBDTRecord, import_lightgbm, read_record, write_run
from a2gen_rec.gbdt.ranker import GBDTModel, GBDTRanker, Task
from a2gen_rec.losses.loss import Loss, validate_objective_weights
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.training.build import ModelWithLoss
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import lock_run
from a2gen_rec.training.trainer import load_card, validation_metrics
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext, process_group

_GB = 1e9
_DATASET_SETTINGS = {"verbosity": -1, "feature_pre_filter": False, "deterministic": True, "force_row_wise": True}
"""Settings that the binned rows of all boosters share."""


@dataclass(frozen=True)
class FlatSplit:
    """Rows and outcomes of a split.

    Attributes:
        rows: [targets, columns] float32.
        outcomes: [targets, tasks] float32: 0 or 1, or log1p seconds; NaN if unknown.
    """

    rows: np.ndarray
    outcomes: np.ndarray


def train_gbdt(config: Config, data: str, run: str) -> GBDTRecord:
    """Train the boosters of a run; a finished run is kept.

    Raises:
        ConfigError: The job has several ranks, or an objective weight is unknown.
        UserError: LightGBM is not installed, the run is another model's or has other settings, or its rows are larger
            than ``gbdt.max_matrix_gb``.
    """
    lightgbm, data, run_dir = import_lightgbm(), paths.abspath(data), RunDir(run)
    with process_group("cpu") as process:
        if process.world_size > 1:
            raise ConfigError(f"model.name gbdt trains on one rank, not on {process.world_size}")
        with lock_run(run) as lock:
            card = load_card(data, config)
            if not card.splits["valid"].targets:
                raise UserError(f"{data}: the validation split is empty, which early stopping needs; prepare one")
            if run_dir.latest_checkpoint() is not None:
                raise UserError(f"{run}: has checkpoints of another model; choose another --run")
            if paths.exists(run_dir.gbdt_file):
                record = _check_same(read_record(run), config, card, data, run)
                print("training is already complete", flush=True)
                return record
            ranker = GBDTRanker(card, config)
            validate_objective_weights(config.loss, ranker.objective_tasks)
            paths.write_text(run_dir.config_file, yaml.safe_dump({"data": data, **asdict(config)}, sort_keys=False))
            card.save(run)
            dataset = Dataset(data, card)
            train, valid = (read_flat(dataset, split, ranker, config) for split in ("train", "valid"))
            ranker.boosters = _fit_all(lightgbm, ranker, train, valid, config)
            del train, valid
            metrics = _validate(ranker, dataset, config, process)
            lock.check()
            record = write_run(run, ranker, asdict(config), data, card, metrics)
    print(f"validation: {', '.join(f'{name} {metrics[name]:.4f}' for name in ('auc', 'loss') if name in metrics)}")
    return record


def read_flat(dataset: Dataset, split: str, ranker: GBDTRanker, config: Config) -> FlatSplit:
    """Return the rows and outcomes of a split, filled batch by batch.

    Raises:
        UserError: The rows are larger than ``gbdt.max_matrix_gb``.
    """
    targets, width = dataset.card.splits[split].targets, len(ranker.columns)
    size_gb = 4 * targets * width / _GB
    if size_gb > config.gbdt.max_matrix_gb:
        raise UserError(
            f"{dataset.path}: {targets:,} {split} rows of {width} columns have {size_gb:.1f} GB, above "
            f"gbdt.max_matrix_gb {config.gbdt.max_matrix_gb:g}"
        )
    print(f"{split}: {targets:,} rows of {width} columns, {size_gb:.2f} GB", flush=True)
    rows = np.empty((targets, width), np.float32)
    outcomes = np.empty((targets, len(ranker.tasks)), np.float32)
    first = 0
    for batch in _batches(dataset, split, config):
        part = slice(first, first + len(batch.target))
        rows[part], outcomes[part] = ranker.rows(batch).numpy(), observed_outcomes(batch, ranker).numpy()
        first = part.stop
    return FlatSplit(rows[:first], outcomes[:first])


def observed_outcomes(batch: WindowBatch, ranker: GBDTRanker) -> torch.Tensor:
    """Return [targets, tasks] observed values of the ranker's tasks; NaN if unknown."""
    occurred, time = target_outcomes(batch, len(ranker.is_timed))
    objectives = batch.objectives[:, : len(ranker.objective_tasks)]
    return torch.cat([occurred[:, 1:-1], batch.labels, objectives, time[:, ranker.is_timed]], dim=1)


def _batches(dataset: Dataset, split: str, config: Config) -> Iterator[WindowBatch]:
    full_tables = EmbeddingTables.from_card(dataset.card, config.model).full_tables
    yield from WindowDataset(dataset, split, config.loader, full_tables, shuffle=False)


def _fit_all(
    lightgbm: ModuleType, ranker: GBDTRanker, train: FlatSplit, valid: FlatSplit, config: Config
) -> dict[tuple[str, str], Any]:
    """Return the boosters of all tasks with enough outcomes; they share the binned rows."""
    settings = {**_DATASET_SETTINGS, "seed": config.train.seed, "num_threads": config.gbdt.threads}
    bins = lightgbm.Dataset(train.rows, params=settings, free_raw_data=True)
    valid_bins = bins.create_valid(valid.rows, params=settings)
    bins.construct()
    valid_bins.construct()
    boosters = {}
    for column, task in enumerate(ranker.tasks):
        observed, valid_observed = train.outcomes[:, column], valid.outcomes[:, column]
        if not _is_learnable(task, observed, valid_observed, config.gbdt.min_positives):
            print(f"{task.outcome} ({task.kind}): too few outcomes; predicted by the training data's rate or median")
            continue
        booster = lightgbm.train(
            {**settings, **_settings(task, config)},
            _known(bins, observed),
            config.gbdt.max_trees,
            valid_sets=[_known(valid_bins, valid_observed)],
            callbacks=[lightgbm.early_stopping(config.gbdt.patience, verbose=False)],
        )
        ((metric, value),) = booster.best_score["valid_0"].items()
        print(f"{task.outcome} ({task.kind}): {booster.best_iteration} trees, {metric} {value:.4f}", flush=True)
        # The text holds the trees up to the best iteration, and neither rows nor later trees.
        boosters[task.outcome, task.kind] = lightgbm.Booster(model_str=booster.model_to_string())
    return boosters


def _settings(task: Task, config: Config) -> dict[str, Any]:
    """Return the settings of a task's booster."""
    settings = config.gbdt
    metric = "auc" if config.train.monitor == "auc" else "binary_logloss"
    return {
        "objective": "binary" if task.kind == "occurrence" else "regression_l1",
        "metric": metric if task.kind == "occurrence" else "l1",
        "num_leaves": settings.num_leaves,
        "learning_rate": settings.learning_rate,
        "min_data_in_leaf": settings.min_child_samples,
        "feature_fraction": settings.feature_fraction,
        "bagging_fraction": settings.bagging_fraction,
        "bagging_freq": 1,
        "lambda_l2": settings.lambda_l2,
    }


def _is_learnable(task: Task, train: np.ndarray, valid: np.ndarray, min_positives: int) -> bool:
    """Return whether training has enough outcomes of each class, and validation some."""
    if task.kind == "time":
        return bool(np.isfinite(train).sum() >= min_positives and np.isfinite(valid).any())
    counts = [min((values == 0).sum(), (values == 1).sum()) for values in (train, valid)]
    return bool(counts[0] >= min_positives and counts[1] > 0)


def _known(bins: Any, outcomes: np.ndarray) -> Any:
    """Return the binned rows with known outcomes, labelled."""
    known = np.isfinite(outcomes)
    if not known.all():
        bins = bins.subset(np.flatnonzero(known))
        bins.construct()
    return bins.set_label(outcomes[known])


def _validate(ranker: GBDTRanker, dataset: Dataset, config: Config, process: DistributedContext) -> dict[str, float]:
    model = ModelWithLoss(GBDTModel(ranker), Loss(config.loss, 1, ranker.objective_tasks))
    batches = evaluation_batches(dataset, "valid", config, process, with_oracle=False)
    predictions, sums = predict(model, ranker, batches, dataset.card, config.evaluate.max_unexplored_mass)
    return validation_metrics(predictions, sums, dataset.card, config, ranker.objective_tasks)


def _check_same(record: GBDTRecord, config: Config, card: DatasetCard, data: str, run: str) -> GBDTRecord:
    """Return the record of a finished run if it was trained with these settings on these data."""
    for section, values in json.loads(json.dumps(asdict(config))).items():
        for name, value in values.items():
            before = record.config[section].get(name)
            if before != value and section != "evaluate" and not (_is_nan(before) and _is_nan(value)):
                raise UserError(f"{run}: was trained with {section}.{name}={before}, not {value}; choose another --run")
    trained = DatasetCard.from_dict(record.card, RunDir(run).gbdt_file)
    check_same_data(card, trained, data, run)
    if card.identity != trained.identity:
        raise UserError(f"{run}: does not continue with a later increment, {data}; choose another --run")
    return record


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
