"""What an experiment runs, in which order, and what of it again."""

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.command_runner import CommandRunner
from a2gen_rec.experiments.runner import Experiment
from a2gen_rec.experiments.suite import Suite, read_suite
from a2gen_rec.training.checkpoint import FORMAT_VERSION
from tests.helpers import CONFIGS
from tests.helpers.cards import make_card, write_dataset

CARD = make_card()
TINY = {
    "model.dim": 8,
    "model.num_heads": 2,
    "model.time_buckets": 8,
    "loader.max_impressions_per_batch": 200,
    "train.max_steps": 3,
}
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


def suite_of(folder: Path, content: dict[str, Any] = SUITE) -> Suite:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(str(file))


class Pretended:
    """Stands for `a2gen train` and `evaluate`: leaves what they leave, and remembers what was asked.

    A run's validation AUC is its learning rate, for MMoE one less it.

    Args:
        breaks: part of a run's folder, or of its settings, at which training fails; ``broken``: evaluation.
        unfinished: the same, at which training stops before its end and says nothing.
    """

    def __init__(self, breaks: str = "", broken: str = "", unfinished: str = "") -> None:
        self.asked: list[tuple[str, str]] = []
        self.breaks, self.broken, self.unfinished = breaks, broken, unfinished

    def __call__(self, arguments: list[str], log: str) -> int:
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        run = Path(options["--run"])
        self.asked.append((arguments[0], str(run.parent.relative_to(run.parents[2]))))
        settings = yaml.safe_load((run / "settings.yaml").read_text())
        told = f"{run} {json.dumps(settings)}"
        fails = self.breaks if arguments[0] == "train" else self.broken
        if fails and fails in told:
            Path(log).write_text("step 1\na2gen: error: it broke\n\n")
            return 1
        if arguments[0] == "train":
            stopped = bool(self.unfinished) and self.unfinished in told
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
        place = run / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "state.json").write_text(json.dumps(state))

    def count(self, command: str) -> int:
        return sum(asked == command for asked, _ in self.asked)


def carry_out(suite: Suite, folder: Path, raw: Path, launch: Pretended, jobs: int = 1) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return Experiment(suite, str(folder / "out"), str(raw), jobs, lines.append, launch).run(), lines


@pytest.mark.parametrize("jobs", [1, 3])
def test_models_are_tuned_alike_then_trained_then_tested(jobs: int, raw: Path, tmp_path: Path) -> None:
    launch = Pretended()
    results, lines = carry_out(suite_of(tmp_path), tmp_path, raw, launch, jobs)
    assert results["failed"] == []
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "out" / "results.json").read_text())

    # Two trials each; the best one is the first seed's run, so it is not trained again.
    tuned = launch.asked[: 2 * 2 * 2]
    assert sorted(tuned) == sorted(2 * [("train", f"{d}/{m}") for d in ("one", "two") for m in ("a2gen", "mmoe")])
    trained = launch.asked[len(tuned) : len(tuned) + 2 * (1 + 1 + 2)]
    assert {command for command, _ in trained} == {"train"}
    assert trained.count(("train", "one/no-gate")) == 2
    assert trained.count(("train", "one/a2gen")) == 1
    tested = launch.asked[len(tuned) + len(trained) :]
    assert {command for command, _ in tested} == {"evaluate"}
    assert len(tested) == 2 * 3 * 2, "the chosen setting of every model and ablation, with each seed, once"

    assert results["best_settings"] == {
        data: {"a2gen": {"optim.dense_lr": 0.5}, "mmoe": {"optim.dense_lr": 0.25}} for data in ("one", "two")
    }
    rows = {(row["dataset"], row["model"], row["seed"]): row for row in results["runs"]}
    assert set(rows) == {(d, m, s) for d in ("one", "two") for m in ("a2gen", "mmoe", "no gate") for s in (5, 6)}
    ablation = rows["two", "no gate", 6]
    assert ablation["ablation_of"] == "a2gen"
    assert ablation["overrides"] == {"model.use_head_gate": False, "optim.dense_lr": 0.5}, "tuned as its model was"
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
    assert sum(line.startswith("[") for line in lines) == len(launch.asked)


def test_nothing_is_tested_before_all_is_chosen_and_trained(raw: Path, tmp_path: Path) -> None:
    class Watching(Pretended):
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

    launch = Watching()
    carry_out(suite_of(tmp_path), tmp_path, raw, launch)
    assert launch.count("evaluate") == 12


def test_ablations_are_run_where_they_are_wanted(raw: Path, tmp_path: Path) -> None:
    launch = Pretended()
    one = SUITE["datasets"]["one"] | {"ablations": False}
    results, _ = carry_out(
        suite_of(tmp_path, SUITE | {"datasets": SUITE["datasets"] | {"one": one}}), tmp_path, raw, launch
    )
    assert results["failed"] == []
    assert launch.asked.count(("train", "two/no-gate")) == 2
    assert not any("one/no-gate" in folder for _, folder in launch.asked)


def test_an_ablation_of_what_was_tuned_is_one(raw: Path, tmp_path: Path) -> None:
    ablations = {"a2gen": {"slow": {"optim.dense_lr": 0.125}}}
    results, _ = carry_out(suite_of(tmp_path, SUITE | {"ablations": ablations}), tmp_path, raw, Pretended())
    rates = {run["overrides"]["optim.dense_lr"] for run in results["runs"] if run["model"] == "slow"}
    assert rates == {0.125}


def test_a_dataset_made_otherwise_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    content = SUITE | {"datasets": {"made": {"simulate": {"users": 30}, "settings": TINY}}}
    (tmp_path / "out/data/made").mkdir(parents=True)
    write_dataset(tmp_path / "out/data/made", CARD, windows=12, files=1)
    suite = suite_of(tmp_path, content)
    carry_out(suite, tmp_path, tmp_path, Pretended())  # of unknown making, so it is what there is
    (tmp_path / "out/data/made.json").write_text(json.dumps(suite.datasets[0].preparation, indent=1) + "\n")
    assert not carry_out(suite, tmp_path, tmp_path, Pretended())[0]["failed"]
    content["datasets"]["made"]["simulate"]["users"] = 31
    results, _ = carry_out(suite_of(tmp_path, content), tmp_path, tmp_path, Pretended())
    (failed,) = results["failed"]
    assert "out/data/made: was made otherwise, as" in failed["error"]
    assert not results["runs"]


def test_two_experiments_are_not_in_one_folder_at_once(raw: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path)

    def another(arguments: list[str], log: str) -> int:
        with pytest.raises(UserError, match="another `a2gen experiment` is at work here"):
            carry_out(suite, tmp_path, raw, Pretended())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(suite, tmp_path, raw, another)  # type: ignore[arg-type]
    assert carry_out(suite, tmp_path, raw, Pretended())[0]["runs"]


def test_what_is_there_is_not_done_again(raw: Path, tmp_path: Path) -> None:
    first, again = Pretended(), Pretended()
    before, _ = carry_out(suite_of(tmp_path), tmp_path, raw, first)
    after, lines = carry_out(suite_of(tmp_path), tmp_path, raw, again)
    assert again.asked == []
    assert lines == []
    assert after["runs"] == before["runs"]

    # A seed more costs its runs only; other settings of one dataset cost those of that dataset.
    more = Pretended()
    carry_out(suite_of(tmp_path, SUITE | {"seeds": [5, 6, 7]}), tmp_path, raw, more)
    assert (more.count("train"), more.count("evaluate")) == (2 * 3, 2 * 3)
    other = Pretended()
    two = {"data": "two", "settings": TINY | {"model.dim": 16}}
    carry_out(suite_of(tmp_path, SUITE | {"datasets": SUITE["datasets"] | {"two": two}}), tmp_path, raw, other)
    assert {run.split("/")[0] for _, run in other.asked} == {"two"}
    assert other.count("train") == 4 + 4


def test_other_data_in_the_same_place_are_not_taken_for_the_same(raw: Path, tmp_path: Path) -> None:
    carry_out(suite_of(tmp_path), tmp_path, raw, Pretended())
    card = DatasetCard.load(str(raw / "one"))
    card.dropped_rows["spam"] = 3
    card.save(str(raw / "one"))
    again = Pretended()
    carry_out(suite_of(tmp_path), tmp_path, raw, again)
    assert {run.split("/")[0] for _, run in again.asked} == {"one"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_is_told_and_stops_no_other_run(jobs: int, raw: Path, tmp_path: Path) -> None:
    launch = Pretended(breaks="one/mmoe", broken="two/no-gate/seed-6")
    results, lines = carry_out(suite_of(tmp_path), tmp_path, raw, launch, jobs)
    failed = [(each["phase"], each["run"]["dataset"], each["run"]["model"]) for each in results["failed"]]
    assert failed == [("tuning", "one", "mmoe")] * 2 + [("test", "two", "no gate")]
    assert "a2gen train ended with exit code 1: it broke; see " in results["failed"][0]["error"]
    assert any("one · mmoe, seed 5 failed: a2gen train ended" in line for line in lines)
    assert "mmoe" not in results["best_settings"]["one"], "no trial, no choice, no test"
    done = {(row["dataset"], row["model"], row["seed"]) for row in results["runs"]}
    assert len(done) == 12 - 2 - 1
    assert ("two", "no gate", 6) not in done

    mended = Pretended()
    results, _ = carry_out(suite_of(tmp_path), tmp_path, raw, mended, jobs)
    assert results["failed"] == []
    assert len(results["runs"]) == 12
    assert (mended.count("train"), mended.count("evaluate")) == (2 + 1, 2 + 1)


def test_a_trial_that_fails_loses(raw: Path, tmp_path: Path) -> None:
    results, _ = carry_out(suite_of(tmp_path), tmp_path, raw, Pretended(breaks='"dense_lr": 0.5'))
    assert len(results["failed"]) == 4
    assert results["best_settings"]["two"] == {model: {"optim.dense_lr": 0.25} for model in ("a2gen", "mmoe")}


def test_a_run_that_stopped_early_is_no_result_and_is_gone_on_with(raw: Path, tmp_path: Path) -> None:
    results, _ = carry_out(suite_of(tmp_path), tmp_path, raw, Pretended(unfinished="two/no-gate/seed-5"))
    (failure,) = results["failed"]
    assert failure["error"].endswith("was stopped before its end")
    results, _ = carry_out(suite_of(tmp_path), tmp_path, raw, launch := Pretended())
    assert launch.asked == [("train", "two/no-gate"), ("evaluate", "two/no-gate")]
    rows = {(row["dataset"], row["model"], row["seed"]): row for row in results["runs"]}
    assert rows["two", "no gate", 5]["resumed"] is True


def test_by_loss_the_least_is_chosen(raw: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, SUITE | {"tuning": SUITE["tuning"] | {"select": "loss"}})
    results, _ = carry_out(suite, tmp_path, raw, Pretended())
    assert results["best_settings"]["one"] == {model: {"optim.dense_lr": 0.25} for model in ("a2gen", "mmoe")}


def test_a_dataset_that_cannot_be_had_fails_alone(raw: Path, tmp_path: Path) -> None:
    datasets = {"one": SUITE["datasets"]["one"], "three": {"data": "three", "settings": TINY}}
    results, lines = carry_out(suite_of(tmp_path, SUITE | {"datasets": datasets}), tmp_path, raw, Pretended())
    assert [each["run"] for each in results["failed"]] == [{"dataset": "three"}]
    assert {row["dataset"] for row in results["runs"]} == {"one"}
    assert any(line.startswith("data of three failed: ") for line in lines)


def test_what_cannot_be_begun(raw: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    with pytest.raises(ConfigError, match="--jobs 0 must be at least 1"):
        Experiment(suite, str(tmp_path / "out"), jobs=0)
    with pytest.raises(UserError, match="must be a local folder"):
        Experiment(suite, "s3://bucket/out")


def inside(arguments: list[str], log: str) -> int:
    """`a2gen` in this process: as a process of its own, but without its start."""
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_quick_suite_at_a_tiny_size(tmp_path: Path) -> None:
    file = CONFIGS / "experiments" / "quick.yaml"
    content = yaml.safe_load(file.read_text())
    small = content["datasets"]["small"]
    small["simulate"] = {"users": 40, "items": 20, "impressions_per_user": 15}
    small["config"] = str(file.parents[1] / "simulated.yaml")
    small["settings"] = TINY
    suite = suite_of(tmp_path, content)
    lines: list[str] = []
    results = Experiment(suite, str(tmp_path / "out"), log=lines.append, run_command=inside).run()
    assert results["failed"] == [], lines
    assert {(row["model"], row["seed"]) for row in results["runs"]} == {
        (model, seed) for model in ("a2gen", "mmoe", "plain attention") for seed in (0, 1)
    }
    for row in results["runs"]:
        measured = json.loads((tmp_path / "out" / row["test"]).read_text())
        predictions, _ = read_predictions(str(tmp_path / "out" / row["predictions"]))
        assert measured["split"] == "test"
        assert measured["targets"] == len(predictions.user) > 0
        assert 0 < row["validation"]["auc"] < 1
        assert row["step"] == 3
        assert ("sequences" in measured) == (row["model"] != "mmoe")
    again = Pretended()
    assert (
        Experiment(suite, str(tmp_path / "out"), log=lines.append, run_command=again).run()["runs"] == results["runs"]
    )
    assert again.asked == []

    main(["report", "experiment", str(tmp_path / "out"), "--bootstrap-resamples", "10"])
    page = (tmp_path / "out" / "report.html").read_text()
    for said in ("small: what the ablations cost", "small: generated action sequences", "What tuning chose", "oracle"):
        assert said in page
    for picture in re.findall(r"\]\(([^)]+[.]svg)\)", (tmp_path / "out" / "report.md").read_text()):
        assert (tmp_path / "out" / picture).exists()


def test_the_command_runs_processes_of_its_own(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One model, one seed; of the second dataset the training fails."""
    content = SUITE | {"models": {"mmoe": {"model.name": "mmoe"}}, "seeds": [0]}
    for name in ("ablations", "tuning"):
        content.pop(name)
    content["datasets"] = {
        "one": SUITE["datasets"]["one"],
        "two": {"data": "two", "settings": TINY | {"model.max_history": 9}},
    }
    suite_of(tmp_path, content)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(
            ["experiment", "--suite", str(tmp_path / "suite.yaml"), "--raw", str(raw), "--out", str(out), "--jobs", "2"]
        )
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.err == "a2gen: error: 1 run failed (see above); rerun the same command to retry them\n"
    assert "one · mmoe, seed 0: test AUC " in said.out
    assert "model needs 9" in said.out
    results = json.loads((out / "results.json").read_text())
    (row,) = results["runs"]
    assert row["seconds"] > 0
    assert row["targets_per_s"] is None, "three steps are too few to log"


def test_stopping_ends_what_runs_and_starts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    processes = CommandRunner()
    codes: list[int] = []
    worker = threading.Thread(target=lambda: codes.append(processes([], str(tmp_path / "log"))))
    began = time.monotonic()
    worker.start()
    while not processes._running:
        time.sleep(0.01)
    processes.stop()
    worker.join(20)
    assert codes == [-signal.SIGTERM]
    assert processes([], str(tmp_path / "log")) == -signal.SIGTERM
    assert time.monotonic() - began < 20
