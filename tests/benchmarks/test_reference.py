"""The pointwise reference is A2Gen: equal loss, equal gradients."""

import dataclasses

import numpy as np
import pytest
import torch
from reference.examples import build, targets_of
from reference.pointwise import PointwiseA2Gen, loss, renamed

from a2gen_rec.config import Config, LossConfig
from a2gen_rec.data.batch import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.factory import build_model
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

WORLDS = [
    make_card(),
    make_card(labels=("click", "long_view"), timed=("like", "comment", "follow", "exit")),
    make_card(timed=("exit",)),
]


def model(card: DatasetCard, config: Config) -> RankingModel:
    torch.manual_seed(0)
    made = build_model(card, config, torch.device("cpu"))
    for name, parameter in made.named_parameters():
        if parameter.count_nonzero() == 0 or "embeddings" in name or "heads" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # what begins at or near zero would hide its inputs' gradients
    return made


def ours(made: RankingModel, columns: WindowColumns, card: DatasetCard, config: Config) -> torch.Tensor:
    batch = collate(columns, np.arange(len(columns)), full_tables(card, config))
    return Loss(config.loss)(made(batch), batch)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("card", WORLDS)
def test_equal_loss_and_gradients(card: DatasetCard, seed: int) -> None:
    config = small_config(max_gap_s=100.0, occurrence_tower=False)  # else all of a history is of one age
    config.loss = LossConfig(order_weight=1.5, time_weight=0.7, order_power=1.5)
    columns = make_columns(card, 12, np.random.default_rng(seed), longest=14)  # longer than the history
    made = model(card, config)
    expected = ours(made, columns, card, config)
    expected.backward()

    reference = PointwiseA2Gen(card, config.model)
    reference.load_state_dict(renamed(made.state_dict()))
    examples = build(columns, *targets_of(columns, np.arange(12)), card.max_history)
    found = loss(reference(examples), examples, config.loss)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = renamed({name: parameter.grad for name, parameter in made.named_parameters()})
    for name, parameter in reference.named_parameters():
        gradient = parameter.grad
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_examples_know_no_more_than_is_visible() -> None:
    """What a target must not see is not among its history; what it may see is, once each."""
    card = WORLDS[0]
    columns = make_columns(card, 12, np.random.default_rng(5), longest=14)
    window, place = targets_of(columns, np.arange(12))
    examples = build(columns, window, place, 6)
    for row, (w, p) in enumerate(zip(window, place, strict=True)):
        start = columns.starts[w]
        target = start + p
        expected = [
            i
            for i in range(max(start, target - 6), target)
            if columns.ts_ms[i] < columns.ts_ms[target] and columns.end_ms[i] <= columns.ts_ms[target]
        ]
        n = int(examples.visible[row].sum())
        assert examples.history["item_id"][row, :n].tolist() == columns.impression_ids["item_id"][expected].tolist()
        assert not examples.history["item_id"][row, n:].any()
        for k, i in enumerate(expected):
            length = columns.action_lengths[i]
            token = slice(columns.action_starts[i], columns.action_starts[i] + length)
            assert examples.token[row, k].sum() == length
            assert examples.action[row, k, :length].tolist() == columns.action[token].tolist()


def test_a_target_without_history() -> None:
    """Its history vector is what the context alone gives; nothing of the padding, nor NaN, comes through."""
    card, config = WORLDS[0], small_config(occurrence_tower=False)
    columns = make_columns(card, 6, np.random.default_rng(1), longest=1)
    columns = dataclasses.replace(columns, first_target=np.zeros(6, np.int64))
    made = model(card, config)
    reference = PointwiseA2Gen(card, config.model)
    reference.load_state_dict(renamed(made.state_dict()))
    examples = build(columns, *targets_of(columns, np.arange(6)), card.max_history)
    assert not examples.visible.any()
    torch.testing.assert_close(
        loss(reference(examples), examples, config.loss), ours(made, columns, card, config), rtol=1e-5, atol=0
    )
