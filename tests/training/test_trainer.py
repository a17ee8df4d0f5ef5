"""Completion of training: epochs of all ranks, steps and early stopping."""

from dataclasses import replace

import pytest

from a2gen_rec.config import TrainConfig
from a2gen_rec.data.loader import LoaderState
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.trainer import is_finished

CONFIG = TrainConfig(epochs=3, max_steps=0, patience=0)


def make_state(epochs: tuple[int, ...] = (0, 0), step: int = 0, validations_since_best: int = 0) -> TrainState:
    loader_states = [LoaderState(epoch=epoch, world_size=len(epochs)) for epoch in epochs]
    return TrainState(step, 0, loader_states, None, None, validations_since_best, {}, "", {})


@pytest.mark.parametrize(("epochs", "expected"), [((2, 2), False), ((3, 2), False), ((2, 3), False), ((3, 3), True)])
def test_finishes_with_the_last_epoch_of_all_ranks(epochs: tuple[int, ...], expected: bool) -> None:
    assert is_finished(make_state(epochs), CONFIG) is expected


def test_finishes_at_the_maximum_step() -> None:
    config = replace(CONFIG, max_steps=10)
    assert [is_finished(make_state(step=step), config) for step in (9, 10)] == [False, True]
    assert not is_finished(make_state(step=10), CONFIG), "0 disables the limit"


def test_finishes_when_patience_runs_out() -> None:
    config = replace(CONFIG, patience=2)
    assert [is_finished(make_state(validations_since_best=count), config) for count in (1, 2)] == [False, True]
    assert not is_finished(make_state(validations_since_best=2), CONFIG), "0 disables early stopping"
