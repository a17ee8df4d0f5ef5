"""``a2gen train --init-from``: three days of a log, on each of which users and videos come and go."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.config import Config, PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.training import checkpoint
from a2gen_rec.training.build import build_training_model
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.loaded_run import restore_config
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.warm_start import WarmStart
from a2gen_rec.utils.distributed import DistributedContext
from tests.end_to_end.test_lineage import SMALL, SPEC, TREES, Trained, write_log
from tests.end_to_end.test_training_job import checkpoints, tensors, train_arguments, wait_for_checkpoint
from tests.helpers import CONFIGS
from tests.helpers.cards import checkpoint_tensors
from tests.helpers.distributed import CommandJob, on_ranks

pytestmark = pytest.mark.processes

DAY_MS = 86_400_000
FEATURES = [
    {"name": "user_id", "level": "user"},
    {"name": "item_id", "level": "item"},
    {"name": "length", "level": "item", "kind": "buckets", "edges": [10, 20]},
]
SETTINGS = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)


def write_day(folder: Path, day: int) -> str:
    """Write a log of some videos and users of the day before, and new ones; those of the last day are most."""
    rng, count, last = np.random.default_rng(day), 900, day == 2
    item = rng.integers(10 * day, 10 * day + (80 if last else 40), count)
    table = {
        "user": [f"user-{number}" for number in rng.integers(5 * day, 5 * day + (60 if last else 30), count)],
        "item": [f"video-{number}" for number in item],
        "ts": 1_714_521_600_000 + DAY_MS * day + np.cumsum(rng.integers(0, 60_000, count)),
        "dwell": rng.exponential(10, count),
        "like": (rng.random(count) < 0.2 + 0.6 * (item % 2)).astype(int),
        "length": item.astype(float),
    }
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "log.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``day0`` to ``day2``, of which later days reuse rows and the last has larger tables, and ``run`` of day 0."""
    result = Trained(tmp_path_factory.mktemp("warm"))
    spec = result.folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC | {"features": FEATURES}))
    settings = {
        "day0": {"capacity": 1.0, "ttl_days": 0.6, "valid_fraction": 0.2, "test_fraction": 0.1},
        "day1": {},
        "day2": {"capacity": 1.5},
    }
    for day, (name, changes) in enumerate(settings.items()):
        raw, base = write_day(result.folder / f"raw{day}", day), result.path(f"day{day - 1}") if day else ""
        config = replace(SETTINGS, **({"ttl_days": 0.0} | changes))  # type: ignore[arg-type]
        prepare("generic", raw, result.path(name), config, str(spec), base=base)
    main(["train", "--data", result.path("day0"), "--run", result.path("run"), *SMALL, "--train.epochs", "2"])
    return result


def vocabulary(data: str, name: str) -> dict[str, int]:
    return {row["value"]: row["row"] for row in pq.read_table(f"{data}/vocabulary/{name}.parquet").to_pylist()}


def start(process: DistributedContext, config: Config, run: str, data: str, initial: str, out: str) -> None:
    """Save the initial model of a dataset, and the model with the parameters of a run."""
    dataset = Dataset.open(data)
    built = build_training_model(dataset.card, config, process)
    state = checkpoint.TrainState(0, 0, [], None, None, 0, {}, data, dataset.card.to_dict())
    checkpoint.save(initial, built, state, keep_latest_k=0)
    WarmStart.open(run, config, dataset).load(built)
    checkpoint.save(out, built, state, keep_latest_k=0)


@pytest.mark.parametrize(("ranks", "day"), [(1, 1), (2, 2)])
def test_values_keep_vectors_and_moments(ranks: int, day: int, made: Trained, tmp_path: Path) -> None:
    """Values of both days have the same vector and moments; new values have those of a new model."""
    run, data = made.path("run"), made.path(f"day{day}")
    config = restore_config(TrainState.read(checkpoint.best(run)).config)
    config.sharding.sharding_types = ["row_wise"]
    on_ranks(ranks, tmp_path, start, config, run, data, str(tmp_path / "initial"), str(tmp_path / "out"))
    trained = checkpoint_tensors(Path(checkpoint.best(run)), tmp_path / "trained.pt")
    initial, loaded = (tensors(tmp_path / name, tmp_path / f"{name}.pt") for name in ("initial", "out"))
    for feature in ("user_id", "item_id"):
        before, after = vocabulary(made.path("day0"), feature), vocabulary(data, feature)
        kept, new = before.keys() & after.keys(), after.keys() - before.keys()
        reused = {after[value] for value in new} & set(before.values())
        assert min(len(kept), len(new), len(reused)) > 0
        names = [name for name in loaded if f".{module_key(feature)}." in f".{name}." and loaded[name].dim()]
        assert {"optimizer" in name for name in names} == {True, False}
        for name in names:
            assert len(loaded[name]) == len(initial[name]) >= len(trained[name])
            assert (len(loaded[name]) > len(trained[name])) == (day == 2), "the tables of day 2 have grown"
            for value in kept:
                assert torch.equal(loaded[name][after[value]], trained[name][before[value]]), (name, value)
            for value in new:
                assert torch.equal(loaded[name][after[value]], initial[name][after[value]]), (name, value)
                if "optimizer" in name:
                    assert not loaded[name][after[value]].any()


def latest(run: str) -> TrainState:
    return TrainState.read(RunDir(run).latest_checkpoint() or "")


def test_a_day_is_evaluated_before_it_is_learned(
    made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``progressive.json`` equals the evaluation of the earlier run; settings are its own, with one epoch."""
    main(
        [
            "evaluate",
            "--run",
            made.path("run"),
            "--data",
            made.path("day1"),
            "--split",
            "train",
            "--json",
            f"{tmp_path}/r",
        ]
    )
    expected = json.loads((tmp_path / "r").read_text())
    main(["train", "--init-from", made.path("run"), "--data", made.path("day1"), "--run", f"{tmp_path}/run1"])
    progressive = json.loads((tmp_path / "run1" / "progressive.json").read_text())
    assert progressive == expected
    assert {"new users", "known users", "new items", "known items"} == progressive["subsets"].keys()
    assert f"before training: {expected['targets']} targets, mean AUC {expected['actions']['like']['auc']:.4f}" in (
        capsys.readouterr().out
    )
    before, after = latest(made.path("run")), latest(f"{tmp_path}/run1")
    assert after.config == before.config | {"train": before.config["train"] | {"epochs": 1}}
    assert after.initialized_from is not None
    assert after.initialized_from.run == made.path("run")
    assert after.initialized_from.data == made.path("day0")
    assert after.initialized_from.checkpoint == checkpoint.fingerprint(checkpoint.best(made.path("run")))
    assert (after.best_step, after.metrics) == (None, {}), "there is no validation split"
    assert checkpoint.best(f"{tmp_path}/run1") == RunDir(f"{tmp_path}/run1").latest_checkpoint()

    main(["train", "--init-from", f"{tmp_path}/run1", "--data", made.path("day2"), "--run", f"{tmp_path}/run2"])
    main(
        [
            "evaluate",
            "--run",
            f"{tmp_path}/run1",
            "--data",
            made.path("day2"),
            "--split",
            "train",
            "--json",
            f"{tmp_path}/r",
        ]
    )
    expected = json.loads((tmp_path / "r").read_text())
    assert json.loads((tmp_path / "run2" / "progressive.json").read_text()) == expected
    main(
        [
            "evaluate",
            "--run",
            f"{tmp_path}/run2",
            "--data",
            made.path("day2"),
            "--split",
            "train",
            "--json",
            f"{tmp_path}/r",
        ]
    )
    seen = json.loads((tmp_path / "r").read_text())
    assert "new items" not in seen["subsets"], "the run knows its training data"
    assert seen["actions"]["like"]["auc"] > expected["actions"]["like"]["auc"], "it has learned the day"


def test_resumes_exactly_after_sigkill(made: Trained, tmp_path: Path) -> None:
    """SIGKILL in the middle of a day, with replayed windows of the day before."""
    options = ["--init-from", made.path("run"), "--train.checkpoint-interval", "2", "--train.replay-share", "0.5"]
    options += ["--loader.max-impressions-per-batch", "30", "--model.dropout", "0.2"]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    data = Path(made.path("day1"))
    codes, text = CommandJob(2, tmp_path / "whole.log", train_arguments(data, uninterrupted, *options)).wait()
    assert codes == [0, 0], text
    job = CommandJob(2, tmp_path / "killed.log", train_arguments(data, killed, *options))
    wait_for_checkpoint(killed, lambda: job.is_running)
    job.send_signal(signal.SIGKILL)
    assert job.wait()[0] == [-signal.SIGKILL] * 2
    assert checkpoints(killed)[-1] < checkpoints(uninterrupted)[-1], "the job must be killed before it ends"
    (killed / "progressive.json").unlink()
    codes, text = CommandJob(2, tmp_path / "resumed.log", train_arguments(data, killed, *options)).wait()
    assert codes == [0, 0], text
    assert "resuming at step" in text
    assert not (killed / "progressive.json").exists(), "a resumed run has learned windows of the day"
    left, right = tensors(uninterrupted, tmp_path / "left.pt"), tensors(killed, tmp_path / "right.pt")
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_resumes_after_a_kill_before_the_first_checkpoint(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters are the start again, as ``a2gen train --run RUN`` knows the earlier run."""
    command = ["--init-from", made.path("run"), "--data", made.path("day1")]
    main(["train", "--run", f"{tmp_path}/whole", *command])
    with monkeypatch.context() as patch:
        patch.setattr(WarmStart, "evaluate", kill)
        with pytest.raises(ZeroDivisionError):
            main(["train", "--run", f"{tmp_path}/killed", *command])
    assert not checkpoints(tmp_path / "killed")
    main(["train", "--run", f"{tmp_path}/killed"])
    assert latest(f"{tmp_path}/killed").initialized_from == latest(f"{tmp_path}/whole").initialized_from
    left, right = (tensors(tmp_path / name, tmp_path / f"{name}.pt") for name in ("whole", "killed"))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    main(["train", "--run", f"{tmp_path}/next", "--init-from", f"{tmp_path}/killed", "--data", made.path("day2")])
    started = latest(f"{tmp_path}/next").initialized_from
    assert started is not None
    assert started.run == f"{tmp_path}/killed"
    topology = str(CONFIGS / "topologies" / "laptop.yaml")
    main(["plan", "--config", f"{tmp_path}/next/config.yaml", "--topology", topology, "--ranks", "1"])


def kill(*_: object) -> None:
    raise ZeroDivisionError


def test_the_same_command_resumes_with_the_same_epochs(
    made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("train: {epochs: 4}")
    command = ["train", "--config", f"{tmp_path}/settings.yaml", "--run", f"{tmp_path}/run", *SMALL]
    command += ["--init-from", made.path("run"), "--data", made.path("day1")]
    main(command)
    main(command)
    assert latest(f"{tmp_path}/run").loader_states[0].epoch == 1
    assert "training is already complete" in capsys.readouterr().err
    main([*command, "--train.epochs", "2"])
    assert latest(f"{tmp_path}/run").loader_states[0].epoch == 2


def test_the_next_step_is_the_next_day(made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An increment without test split cannot be evaluated on one; its own data are not evaluated as new ones."""
    main(["train", "--run", f"{tmp_path}/run", "--init-from", made.path("run"), "--data", made.path("day1")])
    next_day = f"to train on the next day: a2gen train --init-from {tmp_path}/run --data DATA --run NEXT_RUN"
    assert next_day in capsys.readouterr().out
    main(["train", "--run", f"{tmp_path}/again", "--init-from", f"{tmp_path}/run", "--data", made.path("day1")])
    assert "no later data than the earlier run has learned" in capsys.readouterr().out
    assert not (tmp_path / "again" / "progressive.json").exists()


def test_rejects_a_start_from_another_model_lineage_or_run(
    made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Trained(tmp_path)
    write_log(tmp_path / "raw", "other")
    prepare("generic", folder.path("raw"), folder.path("other"), SETTINGS, made.path("spec.yaml"))
    begin, run = ["train", "--run", folder.path("new"), *SMALL], made.path("run")
    main(["train", "--data", made.path("day1"), "--run", folder.path("later"), "--init-from", run])
    main([*begin[:2], folder.path("plain"), *SMALL, "--data", made.path("day0"), "--train.max-steps", "1"])
    capsys.readouterr()
    day1 = ["--data", made.path("day1")]
    refusals = [
        ([*begin, "--init-from", run, "--data", folder.path("other")], "belongs to another lineage than run"),
        ([*begin, "--init-from", folder.path("later"), "--data", made.path("day0")], "encodes values differently"),
        ([*begin, "--init-from", run, *day1, "--model.dim", "16"], "checkpoint has model.dim=8 but the config has 16"),
        ([*begin, "--init-from", run], "--data is missing"),
        ([*begin, "--init-from", folder.path("none"), *day1], "none"),
        ([*begin, "--init-from", run, *day1, *TREES], "model.name gbdt has no parameters to start from"),
        ([*begin, "--init-from", run, *day1, "--train.forkmerge.merge-interval-epochs", "1"], "train.forkmerge"),
        (["train", "--run", folder.path("plain"), "--init-from", run, *SMALL], "did not start from another run"),
        (["train", "--run", folder.path("later"), "--init-from", folder.path("plain")], f"started from {run}"),
        (["train", "--run", folder.path("later"), *day1, "--train.replay-share", "-1"], "train.replay_share"),
        ([*begin, *day1, "--train.replay-share", "0.5"], "train.replay_share 0.5 requires --init-from"),
        (
            [*begin, "--init-from", folder.path("later"), *day1, "--train.replay-share", "0.5"],
            "day1: is the training data of this run as well; set train.replay_share 0",
        ),
    ]
    for command, message in refusals:
        assert message in folder.refusal(command, capsys)


def test_replay_requires_the_earlier_data(made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The earlier dataset may be replaced after the start of a run, which then cannot read it."""
    folder = Trained(tmp_path)
    command = ["train", "--run", folder.path("run"), "--data", made.path("day1"), "--init-from", made.path("run")]
    main([*command, "--train.replay-share", "1", "--train.max-steps", "1"])
    capsys.readouterr()
    card = DatasetCard.load(made.path("day0"))
    message = folder.refusal([*command, "--train.replay-share", "0.5", "--train.max-steps", "9"], capsys)
    assert "cannot change train.replay_share (1.0 -> 0.5) in the middle of an epoch" in message
    command += ["--train.replay-share", "1", "--train.max-steps", "9"]
    try:
        DatasetCard.load(made.path("day1")).save(made.path("day0"))
        assert "is not the dataset that" in folder.refusal(command, capsys)
        (made.folder / "day0").rename(made.folder / "moved")
        assert "day0: was removed, but" in folder.refusal(command, capsys)
        (made.folder / "moved").rename(made.folder / "day0")
    finally:
        card.save(made.path("day0"))
