"""Seeded rankers in float64 on one process, without sharding."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.models.factory import build_model
from tests.helpers.cards import full_tables


def build_double(card: DatasetCard, config: Config, randomize: bool = False) -> RankingModel:
    """Return a seeded float64 model in which no parameter is zero, as zeros would hide the layers before them.

    Args:
        card: Dataset card.
        config: Configuration.
        randomize: Draw all parameters with std 0.4; otherwise only the all-zero ones are drawn, with std 1.
    """
    torch.manual_seed(0)
    model = build_model(card, config, torch.device("cpu")).double()
    for parameter in model.parameters():
        if randomize:
            torch.nn.init.normal_(parameter, std=0.4)
        elif not parameter.any():
            torch.nn.init.normal_(parameter)
    return model


def make_batch(
    card: DatasetCard, columns: WindowColumns, config: Config, rows: np.ndarray | None = None, **options: Any
) -> WindowBatch:
    """Return the batch of the windows ``rows``, by default of all; ``options`` as in :func:`collate`."""
    return collate(columns, np.arange(len(columns)) if rows is None else rows, full_tables(card, config), **options)


def lookup(model: RankingModel, batch: WindowBatch) -> dict[str, JaggedTensor]:
    """Return the looked-up rows in float64; the embedding collection's own forward rounds to float32."""
    rows = {}
    for name in batch.sparse.keys():  # noqa: SIM118 - not a mapping
        ids = batch.sparse[name]
        rows[name] = JaggedTensor(
            model.embeddings.embeddings[module_key(name)].weight[ids.values()], lengths=ids.lengths()
        )
    return rows


def forward(model: RankingModel, batch: WindowBatch) -> Any:
    """Return the ranker's output for a batch, in float64."""
    return model.ranker(lookup(model, batch), batch)


def all_predictions(model: RankingModel, output: Any) -> Tensor:
    """Return every prediction that ranking uses and the context, one row per target."""
    marginals = model.ranker.marginals(output, max_unexplored_mass=0.0)
    heads = [output.label_logits, output.objective_logits, output.label_probability, output.objective_probability]
    heads += [] if output.watch_time is None else [output.watch_time[:, None]]
    return torch.cat([marginals.probability, torch.nan_to_num(marginals.time), *heads, output.context], 1)


def change_impressions(
    card: DatasetCard, columns: WindowColumns, impressions: np.ndarray, target: int, rng: np.random.Generator
) -> WindowColumns:
    """Change actions, times, outcomes, labels and objectives of ``impressions``; also ids, except the ``target``'s."""
    sizes = {feature.name: feature.cardinality for feature in card.features}
    offset_s, action = columns.offset_s.copy(), columns.action.copy()
    ids, session, outcome = (
        {name: values.copy() for name, values in features.items()}
        for features in (columns.impression_ids, columns.session, columns.outcome)
    )
    for impression in impressions:
        start = columns.action_starts[impression]
        end = start + columns.action_lengths[impression]
        offset_s[start + 1 : end] = rng.random(end - start - 1) * 1000
        action[start + 1 : end - 1] = rng.permutation(np.arange(1, len(card.actions) - 1))[: end - start - 2]
        for features in [outcome] if impression == target else [outcome, ids, session]:
            for name, values in features.items():
                values[impression] = (values[impression] + 1) % sizes[name]
    labels, objectives = columns.labels.copy(), columns.objectives.copy()
    labels[impressions], objectives[impressions] = 1 - labels[impressions], np.nan
    return dataclasses.replace(
        columns,
        offset_s=offset_s,
        action=action,
        outcome=outcome,
        impression_ids=ids,
        session=session,
        labels=labels,
        objectives=objectives,
    )
