"""Validation of logs with rare or without any actions: the best checkpoint and the monitored metric."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.training import checkpoint
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.run_dir import RunDir
from tests.helpers.cards import small_config

TRAIN, VALID, TEST = 1200, 300, 60


def write_log(folder: Path) -> None:
    """Write a log whose action ``rare`` occurs in 8 impressions of validation only."""
    rng, count = np.random.default_rng(0), TRAIN + VALID + TEST
    item = rng.integers(0, 20, count)
    rare = np.zeros(count, int)
    rare[TRAIN + rng.choice(VALID, 8, replace=False)] = 1
    columns = {
        "user": [f"u{n}" for n in rng.integers(0, 40, count)],
        "item": [f"v{n}" for n in item],
        "ts": 1_714_521_600_000 + 600_000 * np.arange(count),
        "dwell": rng.exponential(10, count),
        "like": (rng.random(count) < np.where(item % 3 == 0, 0.6, 0.1)).astype(int),
        "rare": rare,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "log.parquet")


def run(folder: Path, actions: list[str], monitor: str = "loss", dwell: bool = True, **model: object) -> TrainState:
    """Prepare and train; return the final state."""
    spec = {
        "kind": "impressions",
        "columns": {"user": "user", "item": "item", "time": "ts", **({"dwell_s": "dwell"} if dwell else {})},
        "actions": {name: {"flag": name} for name in actions},
        "split": {"valid_fraction": VALID / (TRAIN + VALID + TEST), "test_fraction": TEST / (TRAIN + VALID + TEST)},
    }
    folder.mkdir()
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    config = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, max_history=10, max_targets=10)
    prepare("generic", str(folder.parent / "raw"), str(folder / "data"), config, str(folder / "spec.yaml"))
    settings = small_config(**model)
    settings.train.epochs, settings.train.monitor, settings.loader.prefetch = 5, monitor, False  # type: ignore[assignment]
    settings.optim.dense_lr, settings.loader.max_impressions_per_batch = 0.005, 400
    train(settings, str(folder / "data"), str(folder / "run"))
    latest = RunDir(str(folder / "run")).latest_checkpoint()
    assert latest is not None
    return TrainState.read(latest)


@pytest.mark.parametrize("model", [{}, {"name": "mmoe"}])
def test_an_action_without_training_positives_does_not_select_the_checkpoint(model: dict, tmp_path: Path) -> None:
    write_log(tmp_path / "raw")
    without, with_rare = (run(tmp_path / name, actions, **model) for name, actions in
                          (("without", ["like"]), ("with", ["like", "rare"])))  # fmt: skip
    if not model:  # MMoE hardly learns here: its best step depends on the initial values
        assert with_rare.best_step == without.best_step == with_rare.step
    assert with_rare.metrics["loss/occurrence"] < 3
    assert with_rare.metrics["loss"] == pytest.approx(without.metrics["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("dwell", "model", "aucs"),
    [(True, {"predict_objectives": True}, {"auc/glance", "auc/effective"}), (True, {}, set()), (False, {}, set())],
)
def test_logs_without_actions_monitor_objectives_or_the_loss(
    dwell: bool, model: dict, aucs: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "raw")
    state = run(tmp_path / "bare", [], "auc", dwell, **model)
    assert {name for name in state.metrics if name.startswith("auc/")} == aucs
    assert ("auc" in state.metrics) == bool(aucs)
    output = capsys.readouterr().err
    assert "validation loss" in output
    assert ("mean AUC" in output) == bool(aucs)
    best = json.loads(Path(checkpoint.best(str(tmp_path / "bare" / "run")), "state.json").read_text())
    expected = -best["metrics"]["auc"] if aucs else best["metrics"]["loss"]
    assert best["best"] == expected
