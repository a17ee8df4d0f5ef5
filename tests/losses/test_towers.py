"""Losses of towers against loops over impressions, and their means over splits of a batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.losses.loss import TERM_NAMES, Loss, loss_sums, term_means, total_loss
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.losses.towers import tower_loss_sums
from a2gen_rec.models.baselines.towers import TowerOutput
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

CARD = make_card(labels=("click", "long_view"))
ACTIONS = len(CARD.actions)


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    return make_columns(CARD, 9, np.random.default_rng(2))


def make_batch(columns: WindowColumns, rows: np.ndarray) -> WindowBatch:
    batch = collate(columns, rows, full_tables(CARD, small_config()))
    return dataclasses.replace(batch, offset_s=batch.offset_s.double())


def output_for(batch: WindowBatch, objectives: int = 0) -> TowerOutput:
    """Return predictions that depend on the target's position in the data, not on its batch."""
    n = len(batch.target)
    seed = batch.ts_ms[batch.target, None].double() % 1000 / 100

    def generated(width: int, shift: float) -> Tensor:
        return torch.sin(seed + shift + torch.arange(width)).requires_grad_()

    return TowerOutput(
        context=torch.zeros(n, 3, dtype=torch.float64),
        label_logits=generated(2, 0.1),
        objective_logits=generated(objectives, 0.2),
        watch_time=None,
        event_logits=generated(ACTIONS - 2, 0.3),
        time=generated(ACTIONS, 0.4),
    )


@pytest.mark.parametrize("error", ["mse", "mae"])
def test_sums_equal_loops(error: str, columns: WindowColumns) -> None:
    batch = make_batch(columns, np.arange(9))
    output = output_for(batch)
    logits, time = output.event_logits.detach(), output.time.detach()
    events, times, timed, target = 0.0, 0.0, 0, 0
    for row in range(9):
        for position in range(int(columns.first_target[row]), int(columns.lengths[row])):
            impression = int(columns.starts[row]) + position
            start = int(columns.action_starts[impression])
            tokens = range(start + 1, start + int(columns.action_lengths[impression]))
            did = {int(columns.action[token]): float(columns.offset_s[token]) for token in tokens}
            for code in range(1, ACTIONS - 1):
                p = 1 / (1 + math.exp(-float(logits[target, code - 1])))
                events -= math.log(p if code in did else 1 - p)
            for code, seconds in did.items():
                if not math.isnan(seconds):
                    difference = float(time[target, code]) - math.log(1 + seconds)
                    times += difference**2 if error == "mse" else abs(difference)
                    timed += 1
            target += 1
    results = [towers.sum() for towers in tower_loss_sums(output.event_logits, output.time, batch, error)]
    assert [one.item() for one in results] == pytest.approx([events, times], rel=1e-6)
    terms = term_means(loss_sums(output, batch, LossConfig(time_loss=error)), batch.counts, is_generative=False)
    expected = dict.fromkeys(TERM_NAMES, 0.0) | {"action": events / target, "time": times / timed}
    for name, value in zip(TERM_NAMES, terms.tolist(), strict=True):
        if name != "label":
            assert value == pytest.approx(expected[name], rel=1e-6), name


def test_gradients_reach_only_known_times_of_occurred_actions(columns: WindowColumns) -> None:
    batch = make_batch(columns, np.arange(9))
    output = output_for(batch)
    events, times = tower_loss_sums(output.event_logits, output.time, batch)
    (events.sum() + times.sum()).backward()
    occurred, time = target_outcomes(batch, ACTIONS)
    assert output.event_logits.grad.all()
    assert torch.equal(output.time.grad != 0, time.isfinite())
    assert (time.isfinite() <= (occurred == 1)).all()
    assert (occurred[:, -1] == 1).all()


@pytest.mark.parametrize("uncertainty", [False, True])
def test_ranks_sum_to_the_full_batch(uncertainty: bool, columns: WindowColumns) -> None:
    config, tasks = LossConfig(uncertainty_weighting=uncertainty), ("glance", "effective")
    everything = make_batch(columns, np.arange(9))
    full_loss, (full_sums, _) = Loss(config, 1, tasks)(output_for(everything, 2), everything)
    parts = []
    for rows in (np.arange(2), np.arange(2, 9)):
        batch = dataclasses.replace(make_batch(columns, rows), counts=everything.counts)
        parts.append(Loss(config, 2, tasks)(output_for(batch, 2), batch))
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), full_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(sums for _, (sums, _) in parts), full_sums, rtol=1e-12, atol=0)
    if not uncertainty:
        mean = term_means(full_sums, everything.counts, is_generative=False)
        torch.testing.assert_close(total_loss(mean, config, tasks), full_loss.detach())
        steps = term_means(full_sums, everything.counts)
        assert steps[0] * everything.counts[1] == pytest.approx(float(mean[0] * everything.counts[0]))
        assert torch.equal(steps[1:], mean[1:])


def test_step_target_index(columns: WindowColumns) -> None:
    batch = make_batch(columns, np.arange(9))
    lengths = [int(columns.action_lengths[position]) - 1 for position in _targets(columns)]
    assert batch.step_target_index.tolist() == [owner for owner, length in enumerate(lengths) for _ in range(length)]


def _targets(columns: WindowColumns) -> list[int]:
    """Return the impressions that are targets, in order."""
    return [
        int(columns.starts[row]) + position
        for row in range(len(columns))
        for position in range(int(columns.first_target[row]), int(columns.lengths[row]))
    ]
