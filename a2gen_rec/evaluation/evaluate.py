"""Evaluation of a model on one split: metrics of actions and times, and of trivial baselines (METHODS §8)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from a2gen_rec.config import Config, EvaluateConfig
from a2gen_rec.data.batch import COUNT_NAMES, count_names
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.data.schema import ITEM_ID, USER_ID
from a2gen_rec.data.synced_batches import SynchronizedBatches
from a2gen_rec.evaluation.metrics import binary_metrics, time_metrics
from a2gen_rec.evaluation.objective_metrics import objective_metrics
from a2gen_rec.evaluation.predict import EvaluationSums, Predictions, outcome_columns, predict
from a2gen_rec.evaluation.prediction_file import write_predictions
from a2gen_rec.evaluation.sequences import SequenceEvaluator
from a2gen_rec.losses.loss import term_means, term_names, total_loss
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.utils.distributed import DistributedContext, sync_errors


def evaluation_batches(
    dataset: Dataset, split: str, config: Config, process: DistributedContext, **options: Any
) -> SynchronizedBatches:
    """Return all batches of a split in file order, synchronized over ranks.

    Args:
        options: Further arguments of :class:`WindowDataset`.
    """
    full = EmbeddingTables.from_card(dataset.card, config.model).full_tables
    with sync_errors():
        windows = WindowDataset(
            dataset, split, config.loader, full, process.rank, process.world_size, shuffle=False, **options
        )
    start = LoaderState(world_size=process.world_size)
    loader = WindowDataLoader(windows, config.loader.prefetch)
    return SynchronizedBatches(
        loader.iter_epoch(start), lambda: windows.empty_batch, start, len(count_names(dataset.card))
    )


def evaluate(
    task: nn.Module,
    ranker: BaseRanker[Any],
    dataset: Dataset,
    split: str,
    config: Config,
    process: DistributedContext,
    predictions_file: str = "",
) -> dict[str, Any]:
    """Predict a split and compute its metrics. Called by all ranks.

    Args:
        task: Model with loss, as in :func:`predict`.
        ranker: Ranker of the model.
        dataset: Prepared dataset.
        split: Name of the split.
        config: Resolved configuration.
        process: Process group and device of this rank.
        predictions_file: Parquet file for the predictions (:mod:`prediction_file`); empty for none.

    Returns:
        On rank 0, ``{"split", "targets", "actions": {name: {...}}, "time": {name: {...}},
        "time_given_prefix": {name: {...}}, "objectives": {name: {...}}, "reference": {...}, ...}``; elsewhere ``{}``.
        Names are the card's actions without ``start`` and ``exit``, and its labels; times include ``exit``. ``time``
        is predicted before the impression, ``time_given_prefix`` given the steps before each action. For generative
        models, ``sequences`` if configured (:meth:`SequenceEvaluator.report`). ``subsets`` has ``targets``, ``actions``
        and ``time`` of ``new users``, ``known users``, ``new items`` and ``known items``. Keys of watch time and
        objectives are those of :func:`objective_metrics`.
    """
    card = dataset.card
    batches = evaluation_batches(dataset, split, config, process, with_oracle=True)
    k = config.evaluate.num_top_sequences
    evaluator = SequenceEvaluator(ranker, card.splits[split].targets) if k else None
    callback = None if evaluator is None else evaluator.add
    predictions, sums = predict(task, ranker, batches, card, config.evaluate.max_unexplored_mass, callback)
    sequences = None if evaluator is None else evaluator.report(card, k)
    if not process.is_main:
        return {}
    if predictions_file:
        write_predictions(predictions_file, predictions, card)
    result = metrics_report(predictions, sums, dataset, split, config, ranker.objective_tasks)
    return result if sequences is None else result | {"sequences": sequences}


def metrics_report(
    predictions: Predictions,
    sums: EvaluationSums,
    dataset: Dataset,
    split: str,
    config: Config,
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """Return metrics of given predictions as plain data, with the keys of :func:`evaluate`."""
    card = dataset.card
    names = outcome_columns(card)
    terms = term_means(sums.loss, sums.counts, sums.is_generative)
    return {
        "split": split,
        "targets": len(predictions.user),
        "actions": action_metrics(predictions, predictions.probability, card),
        "time": _time_metrics(predictions.time, predictions, card),
        "time_given_prefix": _time_metrics(predictions.time_given_prefix, predictions, card),
        **objective_metrics(predictions, names, card),
        "subsets": subset_metrics(predictions, card),
        "reference": _reference_metrics(predictions, dataset, config.evaluate),
        "loss": {
            "total": float(total_loss(terms, config.loss, tasks)),
            **dict(zip(term_names(tasks), terms.tolist(), strict=True)),
        },
        "order_violations": float(sums.order_violations)
        / max(float(sums.counts[COUNT_NAMES.index("ordered_pairs")]), 1.0),
        "unexplored_mass": {
            "mean": float(predictions.unexplored_mass.mean()),
            "max": float(predictions.unexplored_mass.max()),
        },
        "model_time_unit": "log1p seconds",
    }


def action_metrics(predictions: Predictions, scores: np.ndarray, card: DatasetCard) -> dict[str, Any]:
    """Return metrics of ``scores`` [n, outcomes] per action and label."""
    columns = outcome_columns(card)
    return {
        name: binary_metrics(scores[:, columns[name]], predictions.occurred[:, columns[name]], predictions.user)
        for name in [*card.predicted_actions, *card.labels]
    }


def _time_metrics(predicted: np.ndarray, predictions: Predictions, card: DatasetCard) -> dict[str, Any]:
    """Return metrics of ``predicted`` times [n, actions] per timed action."""
    names = outcome_columns(card)
    observed = predictions.observed_time
    return {
        name: time_metrics(predicted[:, names[name]], observed[:, names[name]])
        for name in names
        if name in card.timed_actions
    }


def subset_metrics(predictions: Predictions, card: DatasetCard) -> dict[str, Any]:
    """Return metrics on new and known users and items; new ones have no row in their vocabulary: new or rare values.

    A subset without targets is missing, and so are those of a feature without a vocabulary.
    """
    subsets = {}
    vocabularies = {feature.name for feature in card.features if feature.kind == "vocabulary"}
    for name, feature, rows in (("users", USER_ID, predictions.user_row), ("items", ITEM_ID, predictions.item)):
        if feature not in vocabularies:
            continue
        for kind, included in (("new", rows == 0), ("known", rows > 0)):
            if included.any():
                part = predictions.take(included)
                subsets[f"{kind} {name}"] = {
                    "targets": len(part.user),
                    "actions": action_metrics(part, part.probability, card),
                    "time": _time_metrics(part.time, part, card),
                }
    return subsets


def _reference_metrics(predictions: Predictions, dataset: Dataset, config: EvaluateConfig) -> dict[str, Any]:
    card = dataset.card
    names = outcome_columns(card)
    base = np.full_like(predictions.probability, np.nan)
    for name in names:
        base[:, names[name]] = card.base_rate.get(name, np.nan)
    reference = {
        "base_rate": action_metrics(predictions, base, card),
        "item_rate": action_metrics(predictions, _item_rate(predictions, dataset, config.item_rate_prior_weight), card),
        "median_time": {
            name: time_metrics(
                np.full(len(predictions.user), np.log1p(card.median_time_s[name])), predictions.observed_time[:, i]
            )
            for name, i in names.items()
            if name in card.timed_actions and name in card.median_time_s
        },
    }
    if card.oracle_columns:
        oracle = np.full_like(predictions.probability, np.nan)
        for column, name in enumerate(card.oracle_columns):
            oracle[:, names[name]] = predictions.oracle[:, column]
        metrics = action_metrics(predictions, oracle, card)
        reference["oracle"] = {name: metrics[name] for name in card.oracle_columns}
    return reference


def _item_rate(predictions: Predictions, dataset: Dataset, prior_weight: float) -> np.ndarray:
    """Return training rates of each target's item, smoothed with pseudo-impressions at the base rate."""
    card = dataset.card
    table = read_table(dataset.item_statistics_file)
    rows = next(feature.cardinality for feature in card.features if feature.name == ITEM_ID)
    item = dataset.new_rows.mask(ITEM_ID, table[ITEM_ID].to_numpy())

    def item_counts(name: str) -> np.ndarray:
        return np.bincount(item, table[name].to_numpy(), minlength=rows)[predictions.item]

    scores = np.full_like(predictions.probability, np.nan, dtype=np.float64)
    impressions = item_counts("impressions")
    for name, column in outcome_columns(card).items():
        if name in card.base_rate:
            scores[:, column] = (item_counts(name) + prior_weight * card.base_rate[name]) / (impressions + prior_weight)
    return scores
