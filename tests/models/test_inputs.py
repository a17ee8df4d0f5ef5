"""Numbers, multi-valued features and vectors in every model."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.vectors import VectorTable
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.inputs import _embed
from a2gen_rec.models.matches import item_matches
from tests.helpers.cards import make_columns, make_rich_card, random_vectors, small_config
from tests.helpers.models import all_predictions, build_double, forward, lookup, make_batch

CARD = make_rich_card()
VECTORS = random_vectors(CARD, np.random.default_rng(5))
MODELS = ["a2gen", "mmoe", "ple", "hstu"]


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    return make_columns(CARD, 5, np.random.default_rng(3))


def predictions(model: RankingModel, columns: WindowColumns, **options: object) -> Tensor:
    batch = make_batch(CARD, columns, small_config(), **{"vectors": VECTORS, **options})
    with torch.no_grad():
        return all_predictions(model, forward(model, batch))


def changed_predictions(model: RankingModel, columns: WindowColumns) -> dict[tuple[str, float], Tensor]:
    """Return the predictions after a change of each number, multi-valued feature and vector: (input, change) -> them"""
    changed = {}
    for index, number in enumerate(CARD.numbers_at("item", "context")):
        for value in (np.nan, 0.0):
            values = columns.numbers.copy()
            values[:, index] = value
            changed[number.name, value] = dataclasses.replace(columns, numbers=values)
    changed["age", 1.0] = dataclasses.replace(columns, user_numbers=columns.user_numbers * 0 + 1)
    for field in ("user_bags", "impression_bags"):
        for feature, bags in getattr(columns, field).items():
            unknown = {**getattr(columns, field), feature: Bags.unknown(len(bags))}
            changed[feature, 0.0] = dataclasses.replace(columns, **{field: unknown})
    results = {key: predictions(model, variant) for key, variant in changed.items()}
    doubled = {name: VectorTable(2 * table.values) for name, table in VECTORS.items()}
    results["content", 2.0] = predictions(model, columns, vectors=doubled)
    missing = dataclasses.replace(columns, item_index=np.full_like(columns.item_index, -1))
    results["content", np.nan] = predictions(model, missing)
    assert len(results) == 13
    return results


@pytest.mark.parametrize("name", MODELS)
def test_every_input_changes_predictions(name: str, columns: WindowColumns) -> None:
    model = build_double(CARD, small_config(name=name), randomize=True).eval()
    before, results = predictions(model, columns), changed_predictions(model, columns)
    for key, result in results.items():
        assert not torch.allclose(result, before, atol=1e-6), key
    assert not torch.allclose(results["price", 0.0], results["price", np.nan], atol=1e-6)  # missing is not the mean


@pytest.mark.parametrize("name", MODELS)
def test_excluded_inputs_change_no_prediction(name: str, columns: WindowColumns) -> None:
    excluded = ["price", "tags", "content", "hobbies"]
    model = build_double(CARD, small_config(name=name, excluded_inputs=excluded), randomize=True).eval()
    before = predictions(model, columns)
    for (changed, value), result in changed_predictions(model, columns).items():
        assert torch.allclose(result, before, atol=1e-6) == (changed in excluded), (changed, value)


def test_statistics_of_excluded_features(columns: WindowColumns) -> None:
    positions = {statistic.feature: index for index, statistic in enumerate(CARD.statistics)}
    excluded, other = sorted(positions)[:2]
    model = build_double(CARD, small_config(excluded_inputs=[excluded]), randomize=True).eval()
    before = predictions(model, columns)
    for feature in (excluded, other):
        values = columns.statistics.copy()
        values[:, positions[feature]] += 1
        result = predictions(model, dataclasses.replace(columns, statistics=values))
        assert torch.allclose(result, before, atol=1e-6) == (feature == excluded)


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (["colour"], "the dataset has no input 'colour', only user_id"),
        ([feature.name for feature in CARD.features_at("item")], "excludes all item features"),
    ],
)
def test_rejects_excluded_inputs(excluded: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_double(CARD, small_config(excluded_inputs=excluded))


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_deduplication_have_no_effect(name: str, columns: WindowColumns) -> None:
    model = build_double(CARD, small_config(name=name), randomize=True).eval()
    together = predictions(model, columns)
    torch.testing.assert_close(predictions(model, columns, dedup=False), together, atol=1e-9, rtol=1e-7)
    alone = [predictions(model, columns, rows=np.array([row])) for row in range(len(columns))]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-6, rtol=1e-6)
    concatenated = WindowColumns.concat([columns.take(np.array([row])) for row in range(len(columns))])
    torch.testing.assert_close(predictions(model, concatenated), together, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained(name: str, columns: WindowColumns) -> None:
    config = small_config(name=name)
    model = build_double(CARD, config, randomize=True)
    batch = make_batch(CARD, columns, config, vectors=VECTORS)
    loss = Loss(config.loss, 1, model.ranker.objective_tasks, None).double()
    total = loss(forward(model, batch), batch)
    (total if isinstance(total, Tensor) else total[0]).backward()
    for parameter_name, parameter in model.ranker.inputs.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    for table in ("tags", "topics", "hobbies", "moods"):
        weight = model.embeddings.embeddings[f"table_{table}"].weight
        assert weight.grad is not None, table
        assert weight.grad.abs().sum() > 0, table


def test_bags_are_weighted_means(columns: WindowColumns) -> None:
    config = small_config()
    model = build_double(CARD, config)
    for dedup in (True, False):
        batch = make_batch(CARD, columns, config, dedup=dedup)
        embedded = _embed("tags", lookup(model, batch)["tags"].values(), batch)
        table = model.embeddings.embeddings["table_tags"].weight
        bags, start = columns.impression_bags["tags"], 0
        for impression, length in enumerate(bags.lengths):
            part = slice(start, start + length)
            weights = torch.from_numpy(bags.weights[part]).double()
            expected = (weights[:, None] * table[torch.from_numpy(bags.ids[part])]).sum(0) / weights.sum()
            torch.testing.assert_close(embedded[impression], expected, atol=1e-6, rtol=1e-5)
            start += length


@pytest.mark.parametrize("with_history", [False, True])
def test_lists_match_if_they_share_a_known_value(columns: WindowColumns, with_history: bool) -> None:
    batch = make_batch(CARD, columns, small_config())
    matches = item_matches(batch, ["item_id", "tags"], with_history)
    bags = columns.impression_bags["tags"]
    starts = np.cumsum(bags.lengths) - bags.lengths
    values = [set(bags.ids[start : start + length]) - {0} for start, length in zip(starts, bags.lengths, strict=True)]
    window = batch.history_window.tolist()
    keys = list(zip(window, batch.history_column.tolist(), batch.history_index.tolist(), strict=True))
    offset = batch.history_shape[1] if with_history else 0
    targets = zip(batch.target_window.tolist(), batch.target_column.tolist(), batch.target.tolist(), strict=True)
    rows = [(w, offset + column, impression) for w, column, impression in targets] + (keys if with_history else [])
    compared = 0
    for row_window, row, impression in rows:
        for key_window, key, other in keys:
            if row_window == key_window:
                assert matches[row_window, 1, row, key].item() == bool(values[impression] & values[other])
                compared += 1
    assert compared > 20
