"""The training benchmark detects differences, trains, and reports all variants."""

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

pytestmark = pytest.mark.processes

SETTINGS = train_throughput.Settings(
    history=6,
    dim=8,
    num_heads=2,
    users=40,
    items=40,
    impressions_per_user=120,
    max_impressions=300,
    max_reference_attention_impressions=100,
    batch_targets=16,
    targets=32,
    repeats=1,
    compile=False,
)


def _measure(process: DistributedContext) -> Report:
    train_throughput.WARMUP_STEPS = train_throughput.STAGE_ROUNDS = 1
    return train_throughput.measure(SETTINGS, process)


@pytest.mark.parametrize("world_size", [1, 2])
def test_measures_all_variants(world_size: int, tmp_path: Path) -> None:
    report = on_ranks(world_size, tmp_path, _measure)[0]
    rates, stages = report.tables
    assert [row[0] for row in rates.rows] == [variant.name for variant in train_throughput.VARIANTS[:-1]]
    for row in rates.rows:
        assert row[1] > 0
    reference, full = rates.rows[train_throughput.REFERENCE], rates.rows[train_throughput.FULL]
    assert report.metrics["ratio_vs_reference"] == pytest.approx(full[1] / reference[1])
    assert reference[6] == pytest.approx(1 + SETTINGS.history, rel=0.1)  # few history impressions overlap the target
    assert report.metrics["lookup_ratio"] == pytest.approx(reference[6] / full[6])
    assert report.metrics["gradient_difference"] <= 1e-4
    assert [row[0] for row in stages.rows] == list(STAGES)
    for percent in (2, 4):
        assert sum(row[percent] for row in stages.rows) == pytest.approx(100, abs=0.5)


def _unequal(process: DistributedContext) -> str:
    # A reference with different results must not be timed.
    correct = train_throughput.reference_loss
    train_throughput.reference_loss = lambda *arguments: correct(*arguments) * 1.001
    with pytest.raises(UserError) as caught:
        train_throughput.measure(SETTINGS, process)
    return str(caught.value)


def test_rejects_unequal_losses_before_timing(tmp_path: Path) -> None:
    assert "differs from" in on_ranks(1, tmp_path, _unequal)[0]


def test_rejects_invalid_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="targets 0"):
        replace(SETTINGS, targets=0)
    assert "too small for histories of 1000" in on_ranks(1, tmp_path, _too_short)[0]


def _too_short(process: DistributedContext) -> str:
    with pytest.raises(ConfigError) as caught:
        train_throughput.measure(replace(SETTINGS, history=1000), process)
    return str(caught.value)


def _staged_and_full(process: DistributedContext, data: str) -> list[np.ndarray]:
    """Return the dense parameters after three full steps and after three staged steps."""
    config = small_config()
    config.loader.max_impressions_per_batch = 100
    parameters = []
    for staged in (False, True):
        training = WindowTraining(data, make_card(), config, process, Optimizations())
        watch = Stopwatch(process.device)
        for _ in range(3):
            if staged:
                training.staged_step(watch)
            else:
                training.step()
        training.close()
        assert staged == (watch.seconds["forward"] > 0)
        parameters.append(
            torch.cat([parameter.detach().flatten() for parameter in training.model.ranker.parameters()]).numpy()
        )
    return parameters


@pytest.mark.parametrize("world_size", [1, 2])
def test_staged_step_equals_full_step(world_size: int, tmp_path: Path) -> None:
    """Table updates are covered: they change the dense gradients of later steps."""
    data = write_dataset(tmp_path / "data", make_card())
    for full, staged in on_ranks(world_size, tmp_path, _staged_and_full, str(data)):
        np.testing.assert_allclose(staged, full, rtol=1e-3, atol=1e-4)
