"""Experiments: executed commands, their order, and reuse of results."""

import json
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.command_runner import CommandRunner
from a2gen_rec.experiments.runner import Experiment
from a2gen_rec.experiments.suite import Suite, read_suite
from a2gen_rec.training.checkpoint import FORMAT_VERSION
from tests.helpers import CONFIGS
from tests.helpers.cards import make_card, write_dataset
from tests.helpers.distributed import CommandJob

pytestmark = pytest.mark.processes

CARD = make_card()
TINY = {
    "model.dim": 8,
    "model.num_heads": 2,
    "model.time_buckets": 8,
    "loader.max_impressions_per_batch": 200,
    "train.max_steps": 3,
}
TINY_TREES = {"gbdt.min_positives": 5, "gbdt.min_child_samples": 5, "gbdt.max_trees": 20}
SUITE: dict[str, Any] = {
    "datasets": {"one": {"data": "one", "settings": TINY}, "two": {"data": "two", "settings": TINY}},
    "models": {"a2gen": {}, "mmoe": {"model.name": "mmoe"}},
    "ablations": {"a2gen": {"no gate": {"model.use_head_gate": False}}},
    "seeds": [5, 6],
    "tuning": {"trials": 2, "space": {"optim.dense_lr": [0.5, 0.25]}},
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        write_dataset(tmp_path / "raw" / name, CARD, windows=12, files=1, seed=seed)
    return tmp_path / "raw"


def write_suite(folder: Path, content: dict[str, Any] = SUITE) -> Suite:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(str(file))


class FakeCommands:
    """Fake of ``a2gen train`` and ``evaluate`` that writes their files and records calls.

    A run's validation AUC is its learning rate; for MMoE it is 1 minus the learning rate.

    Args:
        fail_train: Part of the run directory or the settings for which training fails.
        fail_evaluate: Part of the run directory or the settings for which evaluation fails.
        unfinished: Part of the run directory or the settings for which training stops early without an error.
    """

    def __init__(self, fail_train: str = "", fail_evaluate: str = "", unfinished: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail_train, self.fail_evaluate, self.unfinished = fail_train, fail_evaluate, unfinished

    def __call__(self, arguments: list[str], log: str) -> int:
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        run = Path(options["--run"])
        self.calls.append((arguments[0], str(run.parent.relative_to(run.parents[2]))))
        settings = yaml.safe_load((run / "settings.yaml").read_text())
        text = f"{run} {json.dumps(settings)}"
        fails = self.fail_train if arguments[0] == "train" else self.fail_evaluate
        if fails and fails in text:
            Path(log).write_text("step 1\na2gen: error: it broke\n\n")
            return 1
        if arguments[0] == "train":
            stopped = bool(self.unfinished) and self.unfinished in text
            self.train(run, settings, options["--data"], 1 if stopped else 3)
        else:
            Path(options["--predictions"]).write_text("")
            Path(options["--json"]).write_text(json.dumps({"actions": {"like": {"auc": 0.5}}}))
        return 0

    def train(self, run: Path, settings: dict, data: str, step: int) -> None:
        rate = settings["optim"]["dense_lr"]
        auc = 1 - rate if settings["model"].get("name") == "mmoe" else rate
        state = {
            "step": step,
            "windows": 1,
            "loader_states": [{"world_size": 1}],
            "best": 1.0,
            "best_step": step,
            "validations_since_best": 0,
            "config": {},
            "data": data,
            "card": DatasetCard.load(data).to_dict(),
            "format_version": FORMAT_VERSION,
            "metrics": {"auc": auc, "loss": 1.0 + rate},
        }
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text(json.dumps(state))

    def count(self, command: str) -> int:
        return sum(name == command for name, _ in self.calls)


def run_experiment(
    suite: Suite, folder: Path, raw: Path, commands: FakeCommands, jobs: int = 1
) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return Experiment(suite, str(folder / "out"), str(raw), jobs, lines.append, commands).run(), lines


@pytest.mark.parametrize("jobs", [1, 3])
def test_tunes_then_trains_then_tests(jobs: int, raw: Path, tmp_path: Path) -> None:
    commands = FakeCommands()
    results, lines = run_experiment(write_suite(tmp_path), tmp_path, raw, commands, jobs)
    assert results["failed"] == []
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "out" / "results.json").read_text())

    # Two trials per model; the best one is the run of the first seed and is not trained again.
    tuned = commands.calls[: 2 * 2 * 2]
    assert sorted(tuned) == sorted(2 * [("train", f"{d}/{m}") for d in ("one", "two") for m in ("a2gen", "mmoe")])
    trained = commands.calls[len(tuned) : len(tuned) + 2 * (1 + 1 + 2)]
    assert {command for command, _ in trained} == {"train"}
    assert trained.count(("train", "one/no-gate")) == 2
    assert trained.count(("train", "one/a2gen")) == 1
    tested = commands.calls[len(tuned) + len(trained) :]
    assert {command for command, _ in tested} == {"evaluate"}
    assert len(tested) == 2 * 3 * 2, "best settings of every model and ablation, once per seed"

    assert results["best_settings"] == {
        data: {"a2gen": {"optim.dense_lr": 0.5}, "mmoe": {"optim.dense_lr": 0.25}} for data in ("one", "two")
    }
    rows = {(row["dataset"], row["model"], row["seed"]): row for row in results["runs"]}
    assert set(rows) == {(d, m, s) for d in ("one", "two") for m in ("a2gen", "mmoe", "no gate") for s in (5, 6)}
    ablation = rows["two", "no gate", 6]
    assert ablation["ablation_of"] == "a2gen"
    assert ablation["overrides"] == {"model.use_head_gate": False, "optim.dense_lr": 0.5}, "tuned settings of its model"
    assert ablation["validation"] == {"auc": 0.5, "loss": 1.5}
    assert rows["one", "mmoe", 5]["validation"]["auc"] == 0.75
    assert len(results["trials"]) == 8
    for row in results["runs"]:
        assert (tmp_path / "out" / row["test"]).exists()
        assert (tmp_path / "out" / row["predictions"]).exists()
        assert row["parameters"]["tables"] > 0
        assert row["parameters"]["dense"] > 0
        assert {"commit", "torch"} <= set(row["machine"])
        assert row["resumed"] is False
    assert sum(line.startswith("[") for line in lines) == len(commands.calls)


def test_tests_only_after_tuning_and_training(raw: Path, tmp_path: Path) -> None:
    class CheckingCommands(FakeCommands):
        def __call__(self, arguments: list[str], log: str) -> int:
            out = tmp_path / "out"
            records = len(list(out.rglob("record.json")))
            if arguments[0] == "evaluate":
                assert (out / "best_settings.json").exists()
                assert records == 8 + 8
            else:
                assert not list(out.rglob("test.*"))
                assert "test" not in arguments
            return super().__call__(arguments, log)

    commands = CheckingCommands()
    run_experiment(write_suite(tmp_path), tmp_path, raw, commands)
    assert commands.count("evaluate") == 12


def test_runs_ablations_on_enabled_datasets_only(raw: Path, tmp_path: Path) -> None:
    commands = FakeCommands()
    one = SUITE["datasets"]["one"] | {"ablations": False}
    results, _ = run_experiment(
        write_suite(tmp_path, SUITE | {"datasets": SUITE["datasets"] | {"one": one}}), tmp_path, raw, commands
    )
    assert results["failed"] == []
    assert commands.calls.count(("train", "two/no-gate")) == 2
    assert not any("one/no-gate" in folder for _, folder in commands.calls)


def test_ablation_may_override_a_tuned_setting(raw: Path, tmp_path: Path) -> None:
    ablations = {"a2gen": {"slow": {"optim.dense_lr": 0.125}}}
    results, _ = run_experiment(write_suite(tmp_path, SUITE | {"ablations": ablations}), tmp_path, raw, FakeCommands())
    rates = {run["overrides"]["optim.dense_lr"] for run in results["runs"] if run["model"] == "slow"}
    assert rates == {0.125}


def test_rejects_a_dataset_prepared_with_other_settings(tmp_path: Path) -> None:
    content = SUITE | {"datasets": {"made": {"simulate": {"users": 30}, "settings": TINY}}}
    (tmp_path / "out/data/made").mkdir(parents=True)
    write_dataset(tmp_path / "out/data/made", CARD, windows=12, files=1)
    suite = write_suite(tmp_path, content)
    run_experiment(suite, tmp_path, tmp_path, FakeCommands())  # without recorded settings, the directory is accepted
    (tmp_path / "out/data/made.json").write_text(json.dumps(suite.datasets[0].preparation, indent=1) + "\n")
    assert not run_experiment(suite, tmp_path, tmp_path, FakeCommands())[0]["failed"]
    content["datasets"]["made"]["simulate"]["users"] = 31
    results, _ = run_experiment(write_suite(tmp_path, content), tmp_path, tmp_path, FakeCommands())
    (failed,) = results["failed"]
    assert "out/data/made: was prepared with other settings (see" in failed["error"]
    assert not results["runs"]


def test_locks_the_output_directory(raw: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)

    def another(arguments: list[str], log: str) -> int:
        with pytest.raises(UserError, match="locked by another `a2gen experiment`"):
            run_experiment(suite, tmp_path, raw, FakeCommands())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(suite, tmp_path, raw, another)  # type: ignore[arg-type]
    assert run_experiment(suite, tmp_path, raw, FakeCommands())[0]["runs"]


def test_reuses_existing_results(raw: Path, tmp_path: Path) -> None:
    first, again = FakeCommands(), FakeCommands()
    before, _ = run_experiment(write_suite(tmp_path), tmp_path, raw, first)
    after, lines = run_experiment(write_suite(tmp_path), tmp_path, raw, again)
    assert again.calls == []
    assert lines == []
    assert after["runs"] == before["runs"]

    # A new seed adds its runs only; changed settings of one dataset retrain that dataset only.
    more = FakeCommands()
    run_experiment(write_suite(tmp_path, SUITE | {"seeds": [5, 6, 7]}), tmp_path, raw, more)
    assert (more.count("train"), more.count("evaluate")) == (2 * 3, 2 * 3)
    other = FakeCommands()
    two = {"data": "two", "settings": TINY | {"model.dim": 16}}
    run_experiment(write_suite(tmp_path, SUITE | {"datasets": SUITE["datasets"] | {"two": two}}), tmp_path, raw, other)
    assert {run.split("/")[0] for _, run in other.calls} == {"two"}
    assert other.count("train") == 4 + 4


def test_retrains_on_changed_data(raw: Path, tmp_path: Path) -> None:
    run_experiment(write_suite(tmp_path), tmp_path, raw, FakeCommands())
    card = DatasetCard.load(str(raw / "one"))
    card.dropped_rows["spam"] = 3
    card.save(str(raw / "one"))
    again = FakeCommands()
    run_experiment(write_suite(tmp_path), tmp_path, raw, again)
    assert {run.split("/")[0] for _, run in again.calls} == {"one"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_failures_are_reported_and_do_not_stop_other_runs(jobs: int, raw: Path, tmp_path: Path) -> None:
    commands = FakeCommands(fail_train="one/mmoe", fail_evaluate="two/no-gate/seed-6")
    results, lines = run_experiment(write_suite(tmp_path), tmp_path, raw, commands, jobs)
    failed = [(entry["phase"], entry["run"]["dataset"], entry["run"]["model"]) for entry in results["failed"]]
    assert failed == [("tuning", "one", "mmoe")] * 2 + [("test", "two", "no gate")]
    assert "a2gen train exited with code 1: it broke; see " in results["failed"][0]["error"]
    assert any("one · mmoe, seed 5 failed: a2gen train exited" in line for line in lines)
    assert "mmoe" not in results["best_settings"]["one"], "without a finished trial there are no best settings"
    done = {(row["dataset"], row["model"], row["seed"]) for row in results["runs"]}
    assert len(done) == 12 - 2 - 1
    assert ("two", "no gate", 6) not in done

    retry = FakeCommands()
    results, _ = run_experiment(write_suite(tmp_path), tmp_path, raw, retry, jobs)
    assert results["failed"] == []
    assert len(results["runs"]) == 12
    assert (retry.count("train"), retry.count("evaluate")) == (2 + 1, 2 + 1)


def test_failed_trials_are_not_selected(raw: Path, tmp_path: Path) -> None:
    results, _ = run_experiment(write_suite(tmp_path), tmp_path, raw, FakeCommands(fail_train='"dense_lr": 0.5'))
    assert len(results["failed"]) == 4
    assert results["best_settings"]["two"] == {model: {"optim.dense_lr": 0.25} for model in ("a2gen", "mmoe")}


def test_resumes_unfinished_runs(raw: Path, tmp_path: Path) -> None:
    results, _ = run_experiment(write_suite(tmp_path), tmp_path, raw, FakeCommands(unfinished="two/no-gate/seed-5"))
    (failure,) = results["failed"]
    assert failure["error"].endswith("training did not finish")
    results, _ = run_experiment(write_suite(tmp_path), tmp_path, raw, commands := FakeCommands())
    assert commands.calls == [("train", "two/no-gate"), ("evaluate", "two/no-gate")]
    rows = {(row["dataset"], row["model"], row["seed"]): row for row in results["runs"]}
    assert rows["two", "no gate", 5]["resumed"] is True


def test_selects_the_minimum_loss(raw: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path, SUITE | {"tuning": SUITE["tuning"] | {"select": "loss"}})
    results, _ = run_experiment(suite, tmp_path, raw, FakeCommands())
    assert results["best_settings"]["one"] == {model: {"optim.dense_lr": 0.25} for model in ("a2gen", "mmoe")}


def test_a_missing_dataset_fails_alone(raw: Path, tmp_path: Path) -> None:
    datasets = {"one": SUITE["datasets"]["one"], "three": {"data": "three", "settings": TINY}}
    results, lines = run_experiment(
        write_suite(tmp_path, SUITE | {"datasets": datasets}), tmp_path, raw, FakeCommands()
    )
    assert [entry["run"] for entry in results["failed"]] == [{"dataset": "three"}]
    assert {row["dataset"] for row in results["runs"]} == {"one"}
    assert any(line.startswith("data of three failed: ") for line in lines)


def test_rejects_invalid_experiments(raw: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    with pytest.raises(ConfigError, match="--jobs 0 must be at least 1"):
        Experiment(suite, str(tmp_path / "out"), jobs=0)
    with pytest.raises(UserError, match="no storage is registered for s3"):
        Experiment(suite, "s3://bucket/out")


def run_in_process(arguments: list[str], log: str) -> int:
    """Run ``a2gen`` in this process, without the start of a subprocess."""
    try:
        main(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_runs_the_quick_suite(tmp_path: Path) -> None:
    file = CONFIGS / "experiments" / "quick.yaml"
    content = yaml.safe_load(file.read_text())
    small = content["datasets"]["small"]
    small["simulate"] = {"users": 40, "items": 20, "impressions_per_user": 15}
    small["config"] = str(file.parents[1] / "simulated.yaml")
    small["settings"] = TINY | TINY_TREES
    suite = write_suite(tmp_path, content)
    lines: list[str] = []
    results = Experiment(suite, str(tmp_path / "out"), log=lines.append, run_command=run_in_process).run()
    assert results["failed"] == [], lines
    assert {(row["model"], row["seed"]) for row in results["runs"]} == {
        (model, seed) for model in ("a2gen", "mmoe", "gbdt", "plain attention") for seed in (0, 1)
    }
    for row in results["runs"]:
        measured = json.loads((tmp_path / "out" / row["test"]).read_text())
        predictions, _ = read_predictions(str(tmp_path / "out" / row["predictions"]))
        assert measured["split"] == "test"
        assert measured["targets"] == len(predictions.user) > 0
        assert 0 < row["validation"]["auc"] < 1
        assert row["step"] > 3 if row["model"] == "gbdt" else row["step"] == 3
        assert ("sequences" in measured) == (row["model"] not in ("mmoe", "gbdt"))
        assert bool(row.get("importance")) == (row["model"] == "gbdt")
        first, _ = read_predictions(str(tmp_path / "out" / results["runs"][0]["predictions"]))
        for name in ("user", "item", "occurred", "observed_time"):
            np.testing.assert_array_equal(getattr(predictions, name), getattr(first, name))
    again = FakeCommands()
    assert (
        Experiment(suite, str(tmp_path / "out"), log=lines.append, run_command=again).run()["runs"] == results["runs"]
    )
    assert again.calls == []

    main(["report", "experiment", str(tmp_path / "out"), "--bootstrap-resamples", "10"])
    page = (tmp_path / "out" / "report.html").read_text()
    for output in (
        "small: ablations",
        "small: generated action sequences",
        "Columns of gbdt by gain",
        "Best settings",
        "oracle",
    ):
        assert output in page
    for picture in re.findall(r"\]\(([^)]+[.]svg)\)", (tmp_path / "out" / "report.md").read_text()):
        assert (tmp_path / "out" / picture).exists()


def run_forked(self: CommandRunner, arguments: Sequence[str], log: str) -> int:
    """Run ``a2gen`` in a forked process, which starts faster than an interpreter."""
    (code,), _ = CommandJob(1, Path(log), arguments).wait()
    return code


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_command_line_runs_subprocesses(
    forked: bool, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model, one seed; training fails on the second dataset."""
    if forked:
        monkeypatch.setattr(CommandRunner, "__call__", run_forked)
    content = SUITE | {"models": {"mmoe": {"model.name": "mmoe"}}, "seeds": [0]}
    for name in ("ablations", "tuning"):
        content.pop(name)
    content["datasets"] = {
        "one": SUITE["datasets"]["one"],
        "two": {"data": "two", "settings": TINY | {"model.max_history": 9}},
    }
    write_suite(tmp_path, content)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(
            ["experiment", "--suite", str(tmp_path / "suite.yaml"), "--raw", str(raw), "--out", str(out), "--jobs", "2"]
        )
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert output.err == "a2gen: error: 1 run failed (see above); rerun the same command to retry them\n"
    assert "one · mmoe, seed 0: test AUC " in output.out
    assert "model needs 9" in output.out
    results = json.loads((out / "results.json").read_text())
    (row,) = results["runs"]
    assert row["seconds"] > 0
    assert row["targets_per_s"] is None, "three steps are too few to log"


def test_stop_terminates_commands_and_starts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    processes = CommandRunner()
    codes: list[int] = []
    worker = threading.Thread(target=lambda: codes.append(processes([], str(tmp_path / "log"))))
    start = time.monotonic()
    worker.start()
    while not processes._running:
        time.sleep(0.01)
    processes.stop()
    worker.join(20)
    assert codes == [-signal.SIGTERM]
    assert processes([], str(tmp_path / "log")) == -signal.SIGTERM
    assert time.monotonic() - start < 20
