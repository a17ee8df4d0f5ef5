"""Last line of `a2gen train`: the state of the run and the command that follows."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from a2gen_rec.cli.train import _next_step
from a2gen_rec.config import TrainConfig
from a2gen_rec.data.loader import LoaderState
from a2gen_rec.training.checkpoint import STATE_FILE, TrainState
from a2gen_rec.training.run_dir import RunDir


def write_state(step: int, best_step: int | None = None, test_targets: int = 5) -> None:
    checkpoint = Path(RunDir("my run").checkpoint(step))
    checkpoint.mkdir(parents=True)
    card = {"splits": {"test": {"targets": test_targets}}}
    state = TrainState(step, 0, [LoaderState(epoch=2)], 0.5, best_step, 0, {}, "data", card)
    (checkpoint / STATE_FILE).write_text(json.dumps(asdict(state)))


def test_names_the_best_checkpoint_and_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not _next_step("my run", TrainConfig())
    write_state(10)
    write_state(20, best_step=10)
    finished = _next_step("my run", TrainConfig(epochs=2))
    assert finished == "my run: best checkpoint is step 10; to evaluate: a2gen evaluate --run 'my run'"
    write_state(30, best_step=30, test_targets=0)
    next_day = _next_step("my run", TrainConfig(epochs=2))
    assert next_day.endswith("to train on the next day: a2gen train --init-from 'my run' --data DATA --run NEXT_RUN")
    stopped = _next_step("my run", TrainConfig(epochs=3))
    assert stopped == "my run: stopped at step 30; to resume: a2gen train --run 'my run'"
