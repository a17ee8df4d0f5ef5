"""State files of checkpoints, and selection of checkpoints in a run directory."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from a2gen_rec.data.loader import LoaderState
from a2gen_rec.errors import UserError
from a2gen_rec.training.checkpoint import FORMAT_VERSION, STATE_FILE, TrainState, best
from a2gen_rec.training.run_dir import RunDir


def write_state(run: Path, step: int, best_step: int | None = None) -> TrainState:
    state = TrainState(step, 7, [LoaderState(epoch=1)], 0.5, best_step, 0, {"model": {}}, "data", {}, {"loss": 0.5})
    checkpoint = Path(RunDir(str(run)).checkpoint(step))
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text(json.dumps(asdict(state)))
    return state


def test_state_round_trip(tmp_path: Path) -> None:
    state = write_state(tmp_path, 3)
    assert TrainState.read(RunDir(str(tmp_path)).checkpoint(3)) == state


@pytest.mark.parametrize("version", [None, FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_rejects_states_of_other_versions(version: int | None, tmp_path: Path) -> None:
    write_state(tmp_path, 3)
    file = Path(RunDir(str(tmp_path)).checkpoint(3), STATE_FILE)
    raw = json.loads(file.read_text())
    raw = {name: value for name, value in raw.items() if name != "format_version"}
    file.write_text(json.dumps(raw if version is None else raw | {"format_version": version}))
    with pytest.raises(UserError, match=f"unsupported format version {version or 1}, expected {FORMAT_VERSION}"):
        TrainState.read(str(file.parent))


@pytest.mark.parametrize("text", ["{", "[]", f'{{"format_version": {FORMAT_VERSION}}}'])
def test_rejects_corrupted_states(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(UserError, match="not a checkpoint's state") as raised:
        TrainState.read(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_selects_the_latest_and_the_best_checkpoint(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    assert run_dir.latest_checkpoint() is None
    with pytest.raises(UserError, match="no checkpoint in this run directory"):
        best(str(tmp_path))
    write_state(tmp_path, 9)
    assert best(str(tmp_path)) == run_dir.checkpoint(9), "the latest without a validation"
    write_state(tmp_path, 20, best_step=9)
    Path(run_dir.checkpoints, "step-00000030.writing").mkdir()
    assert run_dir.checkpoint_steps() == [9, 20]
    assert run_dir.latest_checkpoint() == run_dir.checkpoint(20)
    assert best(str(tmp_path)) == run_dir.checkpoint(9)
