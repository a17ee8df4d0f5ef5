"""The pointwise reference has the loss and gradients of A2Gen."""

import dataclasses

import numpy as np
import pytest
import torch
from reference.examples import build_examples, window_targets
from reference.pointwise import PointwiseA2Gen, reference_loss, to_reference_names

from a2gen_rec.config import Config, LossConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.factory import build_model
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

CARDS = [
    make_card(),
    make_card(labels=("click", "long_view"), timed=("like", "comment", "follow", "exit")),
    make_card(timed=("exit",)),
]


def make_model(card: DatasetCard, config: Config) -> RankingModel:
    torch.manual_seed(0)
    a2gen = build_model(card, config, torch.device("cpu"))
    for name, parameter in a2gen.named_parameters():
        if parameter.count_nonzero() == 0 or "embeddings" in name or "heads" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # weights near zero would hide gradients of earlier layers
    return a2gen


def a2gen_loss(a2gen: RankingModel, columns: WindowColumns, card: DatasetCard, config: Config) -> torch.Tensor:
    batch = collate(columns, np.arange(len(columns)), full_tables(card, config))
    return Loss(config.loss)(a2gen(batch), batch)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("card", CARDS)
def test_equal_loss_and_gradients(card: DatasetCard, seed: int) -> None:
    config = small_config(
        max_gap_s=100.0, occurrence_head=False, statistics=False
    )  # spreads the history over recency buckets
    config.loss = LossConfig(order_weight=1.5, time_weight=0.7, order_power=1.5)
    columns = make_columns(card, 12, np.random.default_rng(seed), max_length=14)  # longer than max_history
    a2gen = make_model(card, config)
    expected = a2gen_loss(a2gen, columns, card, config)
    expected.backward()

    reference = PointwiseA2Gen(card, config.model)
    reference.load_state_dict(to_reference_names(a2gen.state_dict()))
    examples = build_examples(columns, *window_targets(columns, np.arange(12)), card.max_history)
    actual = reference_loss(reference(examples), examples, config.loss)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    gradients = to_reference_names({name: parameter.grad for name, parameter in a2gen.named_parameters()})
    for name, parameter in reference.named_parameters():
        gradient = parameter.grad
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_examples_contain_only_visible_history() -> None:
    """The history of a target has every visible impression once, and no other."""
    card = CARDS[0]
    columns = make_columns(card, 12, np.random.default_rng(5), max_length=14)
    window, position = window_targets(columns, np.arange(12))
    examples = build_examples(columns, window, position, 6)
    for row, (w, p) in enumerate(zip(window, position, strict=True)):
        start = columns.starts[w]
        target = start + p
        expected = [
            i
            for i in range(max(start, target - 6), target)
            if columns.ts_ms[i] < columns.ts_ms[target] and columns.end_ms[i] <= columns.ts_ms[target]
        ]
        n = int(examples.history_mask[row].sum())
        assert examples.history["item_id"][row, :n].tolist() == columns.impression_ids["item_id"][expected].tolist()
        assert not examples.history["item_id"][row, n:].any()
        for k, i in enumerate(expected):
            length = columns.action_lengths[i]
            token = slice(columns.action_starts[i], columns.action_starts[i] + length)
            assert examples.token_mask[row, k].sum() == length
            assert examples.action[row, k, :length].tolist() == columns.action[token].tolist()


def test_target_without_history() -> None:
    """The history vector depends only on the context, not on padding, and is not NaN."""
    card, config = CARDS[0], small_config(occurrence_head=False, statistics=False)
    columns = make_columns(card, 6, np.random.default_rng(1), max_length=1)
    columns = dataclasses.replace(columns, first_target=np.zeros(6, np.int64))
    a2gen = make_model(card, config)
    reference = PointwiseA2Gen(card, config.model)
    reference.load_state_dict(to_reference_names(a2gen.state_dict()))
    examples = build_examples(columns, *window_targets(columns, np.arange(6)), card.max_history)
    assert not examples.history_mask.any()
    torch.testing.assert_close(
        reference_loss(reference(examples), examples, config.loss),
        a2gen_loss(a2gen, columns, card, config),
        rtol=1e-5,
        atol=0,
    )
