"""Runs of gradient boosted trees: files, resumption, evaluation, and commands that do not apply."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.gbdt.files import read_record
from a2gen_rec.gbdt.fit import read_flat
from a2gen_rec.gbdt.ranker import GBDTRanker
from tests.helpers.cards import small_config

pytestmark = pytest.mark.training

SMALL = ["--gbdt.max-trees", "30", "--gbdt.min-child-samples", "10", "--gbdt.learning-rate", "0.1"]
FEATURES = ["--model.session-features", "true", "--model.predict-objectives", "true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gbdt")
    main(["simulate", "--out", str(folder / "log"), "--users", "60", "--items", "40", "--impressions-per-user", "40"])
    main(["prepare", "simulated", "--raw", str(folder / "log"), "--out", str(folder / "data"), "--num-partitions", "2"])
    return folder / "data"


def train(data: Path, run: Path, *options: str) -> None:
    main(["train", "--data", str(data), "--run", str(run), "--model.name", "gbdt", *SMALL, *FEATURES, *options])


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    train(data, data.parent / "run")
    return data.parent / "run"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_evaluates_like_other_models(run: Path, data: Path, tmp_path: Path) -> None:
    files = tmp_path / "result.json", tmp_path / "result.parquet"
    main(["evaluate", "--run", str(run), "--split", "valid", "--json", str(files[0]), "--predictions", str(files[1])])
    result, record = json.loads(files[0].read_text()), read_record(str(run))
    card = Dataset.open(str(data)).card
    assert set(result["actions"]) == {*card.predicted_actions, *card.labels}
    assert set(result["objectives"]) == set(card.objectives)
    assert set(result["time"]) == set(card.timed_actions)
    assert result["step"] == record.trees > 0
    assert result["data_digest"] == result["training_data_digest"] == card.identity.data_digest
    for name, row in result["actions"].items():
        if row["auc"] is not None:
            assert row["auc"] == pytest.approx(record.metrics[f"auc/{name}"], abs=1e-6), "the files hold the boosters"
    assert result["loss"]["total"] == pytest.approx(record.metrics["loss"], abs=1e-6)
    assert result["actions"]["long_view"]["auc"] > 0.6
    median = result["reference"]["median_time"]["exit"]["mae_log"]
    assert result["time"]["exit"]["mae_log"] < median
    predictions, _ = read_predictions(str(files[1]))
    assert np.isfinite(predictions.probability).all()
    assert (predictions.unexplored_mass == 0).all()
    assert math.isclose(sum(record.importance.values()), 1, abs_tol=1e-6)
    assert list(record.importance.values()) == sorted(record.importance.values(), reverse=True)


def test_rare_outcomes_have_their_training_rate(run: Path, data: Path, tmp_path: Path) -> None:
    card, record = Dataset.open(str(data)).card, read_record(str(run))
    trained = {entry["outcome"] for entry in record.boosters if entry["kind"] == "occurrence"}
    positives = card.splits["train"].positives
    rare = [name for name in card.predicted_actions if positives[name] < 50]
    assert rare, "the log is small"
    assert all(positives[name] >= 50 for name in trained)
    assert {"long_view", "glance"} <= trained
    file = tmp_path / "predictions.parquet"
    main(["evaluate", "--run", str(run), "--split", "valid", "--predictions", str(file)])
    predictions, names = read_predictions(str(file))
    for name in rare:
        np.testing.assert_allclose(predictions.probability[:, names.index(name)], card.base_rate[name], rtol=1e-4)


def test_rows_and_outcomes_of_a_split_are_complete(data: Path) -> None:
    dataset, config = Dataset.open(str(data)), small_config(session_features=True, predict_objectives=True)
    ranker = GBDTRanker(dataset.card, config)
    flat = read_flat(dataset, "train", ranker, config)
    summary = dataset.card.splits["train"]
    assert len(flat.rows) == summary.targets
    for column, task in enumerate(ranker.tasks):
        if task.kind == "occurrence":
            assert np.nansum(flat.outcomes[:, column]) == summary.positives[task.outcome], task
        else:
            occurred = np.isfinite(flat.outcomes[:, column]).sum()
            assert occurred <= summary.positives.get(task.outcome, summary.targets)
            assert np.nanmedian(flat.outcomes[:, column]) == pytest.approx(
                math.log1p(dataset.card.median_time_s[task.outcome]), rel=0.02
            )


def test_training_is_deterministic_and_resumes(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data, tmp_path / "again")
    for file in sorted((run / "boosters").iterdir()):
        assert (tmp_path / "again" / "boosters" / file.name).read_text() == file.read_text()
    capsys.readouterr()
    main(["train", "--run", str(tmp_path / "again")])
    assert "training is already complete" in capsys.readouterr().out
    command = ["train", "--run", str(tmp_path / "again"), "--gbdt.num-leaves", "7"]
    assert "was trained with gbdt.num_leaves=31, not 7" in error_of(command, capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["export", "--out", "OUT"],
        ["rank", "--user", "1"],
        ["ensemble", "train"],
        ["train", "--data", "DATA", "--model.name", "a2gen"],
    ],
)
def test_commands_that_need_tables_are_refused(
    command: list[str], run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"OUT": str(tmp_path / "out"), "DATA": str(data)}
    error = error_of([*(paths.get(part, part) for part in command), "--run", str(run)], capsys)
    assert "is a run of model.name gbdt, which only `a2gen evaluate` and `a2gen experiment` support" in error


def test_settings_that_do_not_apply_are_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["train", "--data", str(data), "--run", str(tmp_path / "run"), "--model.name", "gbdt"]
    for options, expected in (
        (["--optim.multitask", "adatask"], "must be one with a tower per task, not gbdt"),
        (["--train.forkmerge.merge-interval-epochs", "1"], "ForkMerge cannot train model.name gbdt"),
        (["--plan", "plan.json"], "--plan: model.name gbdt has no embedding tables"),
        (["--gbdt.max-matrix-gb", "0.0001"], "above gbdt.max_matrix_gb 0.0001"),
        (["--gbdt.num-leaves", "1"], "gbdt.num_leaves 1 must be at least 2"),
    ):
        assert expected in error_of([*new, *options], capsys)
    assert "no embedding tables to plan" in error_of(["plan", "--data", str(data), "--model.name", "gbdt"], capsys)
    error = error_of(["evaluate", "--run", str(run), "--ensemble", "somewhere"], capsys)
    assert "supports no ensemble" in error


def test_several_ranks_are_refused(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    new = ["train", "--data", str(data), "--run", str(tmp_path / "run"), "--model.name", "gbdt"]
    assert "model.name gbdt trains on one rank, not on 2" in error_of(new, capsys)
    assert "model.name gbdt is evaluated on one rank, not on 2" in error_of(["evaluate", "--run", str(run)], capsys)


def test_missing_lightgbm_is_one_line(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    expected = "model.name gbdt requires LightGBM: pip install 'a2gen_rec[gbdt]'"
    new = ["train", "--data", str(data), "--run", str(tmp_path / "run"), "--model.name", "gbdt"]
    assert expected in error_of(new, capsys)
    assert not (tmp_path / "run").exists()
    assert expected in error_of(["evaluate", "--run", str(run)], capsys)


def test_damaged_files_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, tmp_path / "run", "--gbdt.max-trees", "2")
    (tmp_path / "run" / "boosters" / "00.txt").write_text("tree\n")
    error = error_of(["evaluate", "--run", str(tmp_path / "run")], capsys)
    assert "boosters/00.txt: not a LightGBM model" in error
    (tmp_path / "run" / "gbdt.json").write_text('{"format_version": 0}')
    error = error_of(["evaluate", "--run", str(tmp_path / "run")], capsys)
    assert "unsupported format version 0, expected 1" in error
