"""The training benchmark: its comparison can fail, its steps train, its report is complete."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_throughput
from harness import Report
from optimizations import Optimizations, WindowTraining
from stages import STAGES, Stopwatch

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import make_card, small_config, write_dataset
from tests.helpers.distributed import on_ranks

SETTINGS = train_throughput.Settings(
    history=6,
    dim=8,
    heads=2,
    users=40,
    items=40,
    impressions_per_user=120,
    max_impressions=300,
    direct_impressions=100,
    batch_targets=16,
    targets=64,
    repeats=1,
    compile=False,
)


def _measure(process: DistributedContext) -> Report:
    return train_throughput.measure(SETTINGS, process)


@pytest.mark.parametrize("world", [1, 2])
def test_the_whole_benchmark(world: int, tmp_path: Path) -> None:
    report = on_ranks(world, tmp_path, _measure)[0]
    levers, stages = report.tables
    assert [row[0] for row in levers.rows] == [row.name for row in train_throughput.ROWS[:-1]]
    for row in levers.rows:
        assert row[1] > 0
    reference, ours = levers.rows[train_throughput.REFERENCE], levers.rows[train_throughput.OURS]
    assert report.figures["ratio_vs_reference"] == pytest.approx(ours[1] / reference[1])
    assert reference[6] == pytest.approx(1 + SETTINGS.history, rel=0.1)  # few of a history's impressions are still on
    assert report.figures["lookup_ratio"] == pytest.approx(reference[6] / ours[6])
    assert report.figures["gradient_difference"] <= 1e-4
    assert [row[0] for row in stages.rows] == list(STAGES)
    for share in (2, 4):
        assert sum(row[share] for row in stages.rows) == pytest.approx(100, abs=0.5)


def _unequal(process: DistributedContext) -> str:
    # A reference of other mathematics must not be timed against ours.
    right = train_throughput.reference_loss
    train_throughput.reference_loss = lambda *arguments: right(*arguments) * 1.001
    with pytest.raises(UserError) as caught:
        train_throughput.measure(SETTINGS, process)
    return str(caught.value)


def test_unequal_losses_are_not_timed(tmp_path: Path) -> None:
    assert "differs from" in on_ranks(1, tmp_path, _unequal)[0]


def test_impossible_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="targets 0"):
        replace(SETTINGS, targets=0)
    assert "too few for histories of 1000" in on_ranks(1, tmp_path, _too_short)[0]


def _too_short(process: DistributedContext) -> str:
    with pytest.raises(ConfigError) as caught:
        train_throughput.measure(replace(SETTINGS, history=1000), process)
    return str(caught.value)


def _staged_and_whole(process: DistributedContext, data: str) -> list[np.ndarray]:
    """Dense parameters after three steps, whole and stage by stage."""
    config = small_config()
    config.loader.max_impressions_per_batch = 100
    after = []
    for staged in (False, True):
        form = WindowTraining(data, make_card(), config, process, Optimizations())
        watch = Stopwatch(process.device)
        for _ in range(3):
            if staged:
                form.staged_step(watch)
            else:
                form.step()
        form.close()
        assert staged == (watch.seconds["forward"] > 0)
        after.append(torch.cat([parameter.detach().flatten() for parameter in form.model.ranker.parameters()]).numpy())
    return after


@pytest.mark.parametrize("world", [1, 2])
def test_a_staged_step_trains_like_a_whole_one(world: int, tmp_path: Path) -> None:
    """Tables included: what they learnt shows in the dense gradients of the steps that follow."""
    data = write_dataset(tmp_path / "data", make_card())
    for whole, staged in on_ranks(world, tmp_path, _staged_and_whole, str(data)):
        np.testing.assert_allclose(staged, whole, rtol=1e-3, atol=1e-4)
