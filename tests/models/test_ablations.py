"""Inputs that each ablation of A2Gen ignores, and independence of everything else."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.losses.loss import Loss, loss_sums
from a2gen_rec.models.a2gen import A2GenOutput, A2GenRanker
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.baselines.towers import TowerOutput
from a2gen_rec.models.factory import build_model
from a2gen_rec.models.independent import IndependentHeadsRanker
from tests.helpers.cards import full_tables, make_card, make_columns, small_config
from tests.helpers.models import build_double, forward, make_batch

CARD = make_card(timed=("like", "comment", "follow", "exit"))
# Statistics summarize actions and times whatever the sequence contains.
EVERYTHING = {
    "feedback_encoding": "dual_view_full",
    "session_features": True,
    "predict_objectives": True,
    "statistics": False,
}


@pytest.fixture
def columns() -> WindowColumns:
    return make_columns(CARD, 15, np.random.default_rng(4))


def run(columns: WindowColumns, config: Config) -> tuple[RankingModel, WindowBatch, TargetEncoding]:
    model, batch = build_double(CARD, config), make_batch(CARD, columns, config)
    return model, batch, forward(model, batch)


def redone(columns: WindowColumns, history: bool, change: str) -> WindowColumns:
    """Change the actions inside the impressions that are (or are never) history, except their durations.

    Args:
        change: ``times`` of the actions, whose ``pairing`` with the times that there are, or the ``actions``.
    """
    rng = np.random.default_rng(7)
    offset, action = columns.offset_s.copy(), columns.action.copy()
    window = np.repeat(np.arange(len(columns)), columns.lengths)
    last = columns.starts[window] + columns.lengths[window] - 1 == np.arange(len(window))
    for position in np.flatnonzero(last != history):
        start = columns.action_starts[position] + 1
        end = start + columns.action_lengths[position] - 2
        if change == "times":
            offset[start:end] = np.sort(rng.random(end - start) * 9)
        elif change == "pairing":
            action[start:end] = action[start:end][::-1]
        else:
            action[start:end] = rng.permutation(np.arange(1, len(CARD.actions) - 1))[: end - start]
    return dataclasses.replace(columns, offset_s=offset, action=action)


@pytest.mark.parametrize("name", ["a2gen", "mmoe"])
@pytest.mark.parametrize(
    ("switch", "change"),
    [
        ({"use_action_times": False}, "times"),
        ({"use_action_times": False}, "pairing"),
        ({"use_action_order": False}, "pairing"),
        ({"action_pooling": "none"}, "actions"),
    ],
)
def test_history_is_encoded_without_ablated_input(switch: dict, change: str, name: str, columns: WindowColumns) -> None:
    if name == "mmoe" and "action_pooling" in switch:
        pytest.skip("A2Gen only")
    contexts = {}
    for on in (True, False):
        config = small_config(name=name, **EVERYTHING, **({} if on else switch))
        contexts[on] = [run(past, config)[2].context for past in (columns, redone(columns, True, change))]
    torch.testing.assert_close(*contexts[False], rtol=1e-9, atol=1e-11)
    # The mean of a baseline contains actions and times, but not their pairing.
    assert torch.allclose(*contexts[True]) == (name == "mmoe" and change == "pairing")


@pytest.mark.parametrize("generator", ["explicit", "implicit"])
def test_without_order_action_loss_is_order_independent(generator: str, columns: WindowColumns) -> None:
    losses = {}
    for on in (True, False):
        config = small_config(generator=generator, use_action_order=on)
        for changed_columns in (columns, redone(columns, False, "pairing")):
            _, batch, output = run(changed_columns, config)
            losses.setdefault(on, []).append(loss_sums(output, batch, config.loss)[0])
    torch.testing.assert_close(*losses[False], rtol=1e-12, atol=0)
    assert not torch.allclose(*losses[True])


@pytest.mark.parametrize("switch", ["use_action_times", "use_action_order"])
def test_without_times_emitted_times_are_ignored(switch: str, columns: WindowColumns) -> None:
    config = small_config(**{switch: False})
    outputs = [run(changed_columns, config)[2] for changed_columns in (columns, redone(columns, False, "times"))]
    assert torch.equal(outputs[0].steps.logits, outputs[1].steps.logits)
    assert torch.equal(outputs[0].steps.time, outputs[1].steps.time)


@pytest.mark.parametrize("switch", [{"use_action_times": False}, {"use_action_order": False}])
def test_training_and_decoding_use_the_same_prefixes(switch: dict, columns: WindowColumns) -> None:
    """Teacher-forced predictions at the labels equal those of stepwise decoding along them."""
    config = small_config(**switch)
    model, batch, output = run(columns, config)
    assert isinstance(output, A2GenOutput)
    ranker = model.ranker
    assert isinstance(ranker, A2GenRanker)
    position = 0
    for target, length in enumerate(batch_steps(batch)):
        labels = batch.step_label[position : position + length].tolist()
        walked = sorted(labels) if "use_action_order" in switch else labels
        state = ranker.generator.init_state(output.context[target : target + 1])
        tokens = ranker.generator.precompute_tokens(output.tables, torch.zeros_like(ranker.is_timed))
        action, time = torch.tensor([0]), torch.zeros(1, dtype=torch.float64)
        for label in walked:
            steps, state = ranker.generator.step(action, time, state, tokens)
            at = position + labels.index(label)
            torch.testing.assert_close(output.steps.time[at, label], steps.time[0, label])
            torch.testing.assert_close(
                torch.log_softmax(output.steps.logits[at], 0)[label], torch.log_softmax(steps.logits[0], 0)[label]
            )
            action, time = torch.tensor([label]), steps.time[:, label]
        position += length
    marginals = ranker.marginals(output, max_unexplored_mass=0.0)
    assert marginals.unexplored_mass.abs().max() < 1e-12
    torch.testing.assert_close(marginals.probability[:, -1], torch.ones_like(marginals.probability[:, -1]))


def batch_steps(batch: WindowBatch) -> list[int]:
    """Return the number of steps of each target."""
    return torch.bincount((batch.action[batch.step_token] == 0).cumsum(0) - 1).tolist()


def test_independent_heads_use_the_encoder_of_a2gen(columns: WindowColumns) -> None:
    config = small_config(generator="independent_heads", **EVERYTHING)
    model, batch, output = run(columns, config)
    ranker = model.ranker
    assert isinstance(ranker, IndependentHeadsRanker)
    assert not ranker.is_generative
    assert isinstance(output, TowerOutput)
    task_specific = build_model(CARD, small_config(occurrence_head=False, **EVERYTHING)).ranker
    shapes = {
        name: value.shape for name, value in task_specific.state_dict().items() if not name.startswith("generator.")
    }
    results = {name: value.shape for name, value in ranker.state_dict().items() if not name.startswith("generator.")}
    assert results == shapes, "encoder, labels and objectives must be those of A2Gen"
    assert output.watch_time is not None
    assert ranker.objective_tasks == task_specific.objective_tasks

    marginals = ranker.marginals(output, 0.0)
    torch.testing.assert_close(marginals.probability[:, 1:-1], output.event_logits.sigmoid())
    assert bool((marginals.unexplored_mass == 0).all())
    other = run(redone(columns, False, "actions"), config)[2]
    assert torch.equal(other.event_logits, output.event_logits), "predictions must not depend on the target's actions"

    loss, _ = Loss(config.loss, tasks=ranker.objective_tasks)(output, batch)
    loss.backward()
    assert not [name for name, p in ranker.named_parameters() if p.grad is None]


def test_independent_heads_start_at_base_rates_and_median_times(columns: WindowColumns) -> None:
    card = dataclasses.replace(make_card(), base_rate=CARD.base_rate | {"like": 0.1, "comment": 0.02})
    model = build_model(card, small_config(generator="independent_heads"), torch.device("cpu"))
    batch = collate(columns, np.arange(5), full_tables(card, small_config()))
    marginals = model.ranker.marginals(model(batch), 0.0)
    expected = torch.tensor([1, 0.1, 0.02, 0.3, 1]).expand_as(marginals.probability)
    torch.testing.assert_close(marginals.probability, expected, rtol=1e-5, atol=0)
    expected = torch.log1p(torch.tensor([0, 5, math.nan, 5, 5])).expand_as(marginals.time)
    torch.testing.assert_close(marginals.time, expected, rtol=1e-5, atol=0, equal_nan=True)
