"""Evaluation of a finished run with the metrics of all models."""

from dataclasses import replace
from typing import Any

from a2gen_rec.config import EvaluateConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import load_compatible_card
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.errors import ConfigError
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.gbdt.files import read_boosters, read_record
from a2gen_rec.gbdt.ranker import GBDTModel, GBDTRanker
from a2gen_rec.losses.loss import Loss
from a2gen_rec.training.build import ModelWithLoss
from a2gen_rec.training.loaded_run import restore_config
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils.distributed import process_group


def evaluate_gbdt(run: str, split: str, data: str, config: EvaluateConfig, predictions: str = "") -> dict[str, Any]:
    """Evaluate a run of ``model.name: gbdt`` on one rank.

    Args:
        run: Run directory.
        split: Name of the split.
        data: Dataset directory; empty for that of the run.
        config: Settings of the evaluation.
        predictions: Parquet file for per-target predictions; empty for none.

    Returns:
        The result of :func:`a2gen_rec.runs.evaluate.evaluate_run`; ``step`` is the number of trees.

    Raises:
        ConfigError: The job has several ranks.
        UserError: A file is missing or corrupted, LightGBM is not installed, or the dataset is incompatible.
    """
    record = read_record(run)
    settings, data = replace(restore_config(record.config), evaluate=config), data or record.data
    card = DatasetCard.from_dict(record.card, RunDir(run).gbdt_file)
    current = load_compatible_card(data, card, run)
    dataset = Dataset(data, card, new_rows=NewRows.since(data, current, card))
    ranker = GBDTRanker(card, settings, read_boosters(run, record))
    model = ModelWithLoss(GBDTModel(ranker), Loss(settings.loss, 1, ranker.objective_tasks))
    with process_group("cpu") as process:
        if process.world_size > 1:
            raise ConfigError(f"model.name gbdt is evaluated on one rank, not on {process.world_size}")
        result = evaluate(model, ranker, dataset, split, settings, process, predictions)
    keys = {"run": run, "step": record.trees, "data": data}
    digests = {
        "data_digest": current.identity.data_digest,
        "training_data_digest": card.identity.data_digest,
    }
    return {**result, **keys, **digests, "lists": {}}
