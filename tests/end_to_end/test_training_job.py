"""Training jobs of one and two ranks: killed, stopped, resumed, and with invalid input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.data.card import DatasetCard
from tests.helpers.cards import SMALL_MODEL_OPTIONS, checkpoint_tensors, make_card, save_card, write_dataset
from tests.helpers.distributed import CommandJob

pytestmark = pytest.mark.processes

SMALL = [*SMALL_MODEL_OPTIONS, "--loader.max-impressions-per-batch", "100"]
CARD = make_card()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD)


@pytest.fixture
def broken(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset for a test to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "broken"))


def train_arguments(data: Path, run: Path, *options: str) -> list[str]:
    return ["train", "--data", str(data), "--run", str(run), *SMALL, *options]


class LaunchedJob:
    """A command in an interpreter of its own, or in several under torchrun; the counterpart of CommandJob."""

    def __init__(self, ranks: int, output: Path, arguments: Sequence[str]) -> None:
        launcher = ["-m", "a2gen_rec.launch.torchrun", "--standalone", "--nnodes=1", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), "-m", *(["--"] if ranks > 1 else [])]
        self._output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [*command, "a2gen_rec.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> tuple[list[int], str]:
        return [self._process.wait(600)], self._output.read_text()


JOBS = [CommandJob, pytest.param(LaunchedJob, marks=pytest.mark.thorough)]
"""Jobs of forked ranks, which start faster, and of interpreters under torchrun."""
Job = CommandJob | LaunchedJob


def run_ranks(ranks: int, output: Path, *arguments: str) -> str:
    """Run a command on forked ranks and return its output."""
    codes, text = CommandJob(ranks, output, arguments).wait()
    assert codes == [0] * ranks, text
    return text


def checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[-1].isdigit()) if folder.exists() else []


def wait_for_checkpoint(run: Path, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not checkpoints(run):
        assert is_running(), "the job ended without a checkpoint"
        assert time.monotonic() < deadline, "no checkpoint within 90 seconds"
        time.sleep(0.005)


def tensors(run: Path, scratch: Path) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(run / "checkpoints" / checkpoints(run)[-1], scratch)


def test_resumes_exactly_after_sigkill(dataset: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; dropout tests the random states, two ranks test the loader states."""
    options = ["--train.epochs", "2", "--train.checkpoint-interval", "3", "--model.dropout", "0.2"]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run_ranks(2, tmp_path / "uninterrupted.log", *train_arguments(dataset, uninterrupted, *options))
    arguments = train_arguments(dataset, killed, *options)
    job = CommandJob(2, tmp_path / "killed.log", arguments)
    wait_for_checkpoint(killed, lambda: job.is_running)
    job.send_signal(signal.SIGKILL)
    assert job.wait()[0] == [-signal.SIGKILL] * 2
    last = checkpoints(killed)[-1]
    assert last < checkpoints(uninterrupted)[-1], "the job must be killed before it ends"
    output = run_ranks(2, tmp_path / "resumed.log", *arguments)
    assert f"resuming at step {int(last[5:])}" in output
    left, right = tensors(uninterrupted, tmp_path / "uninterrupted.pt"), tensors(killed, tmp_path / "killed.pt")
    assert left.keys() == right.keys()
    assert any("rng" in name for name in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("start", JOBS)
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_saves_and_exits_on_a_stop_request_and_resumes(
    ranks: int, number: signal.Signals, start: type[Job], dataset: Path, tmp_path: Path
) -> None:
    """All ranks get the signal, under torchrun from torchrun. Schedulers send it more than once."""
    run = tmp_path / "run"
    options = ["--train.epochs", "200", "--train.patience", "0", "--train.checkpoint-interval", "7"]
    job = start(ranks, tmp_path / "stopped.log", train_arguments(dataset, run, *options))
    wait_for_checkpoint(run, lambda: job.is_running)
    job.send_signal(number)
    time.sleep(0.01)
    job.send_signal(number)
    codes, output = job.wait()
    assert set(codes) == {0}, output
    assert "stop requested; checkpoint saved at step" in output
    step = int(checkpoints(run)[-1][5:])
    assert f"checkpoint saved at step {step}" in output
    options = ["--train.max-steps", str(step + 2), "--train.patience", "0"]
    resumed = run_ranks(ranks, tmp_path / "resumed.log", *train_arguments(dataset, run, *options))
    assert f"resuming at step {step}" in resumed
    assert int(checkpoints(run)[-1][5:]) == step + 2


def test_evaluation_on_two_ranks_equals_one(dataset: Path, tmp_path: Path) -> None:
    """Every target is counted exactly once."""
    run, results = tmp_path / "run", []
    main(["train", "--data", str(dataset), "--run", str(run), *SMALL, "--train.max-steps", "5"])
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        evaluate = ["evaluate", "--run", str(run), "--split", "test", "--json", str(file)]
        run_ranks(ranks, tmp_path / f"{ranks}.log", *evaluate)
        results.append(json.loads(file.read_text()))
    one, two = results
    assert one["targets"] == two["targets"] > 100
    for name, row in one["actions"].items():
        assert two["actions"][name] == pytest.approx(row, rel=1e-4), name
        assert two["reference"]["item_rate"][name] == pytest.approx(one["reference"]["item_rate"][name]), name
    for name, times in one["time"].items():
        # Rounding may reorder nearly equal times.
        correlations = [result["time"][name].pop("rank_correlation") for result in (one, two)]
        assert correlations[1] == pytest.approx(correlations[0], abs=0.01), name
        assert two["time"][name] == pytest.approx(times, rel=1e-4), name
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_ensemble_trained_on_two_ranks_is_evaluated_on_one(broken: Path, tmp_path: Path) -> None:
    """Rank 0 gathers all lists and trains; the other rank does not wait for it."""
    run = tmp_path / "run"
    no_users = {"user": pa.array([], pa.string()), "user_key": pa.array([], pa.int64())}
    pq.write_table(pa.table(no_users), broken / "users.parquet")
    main(["train", "--data", str(broken), "--run", str(run), *SMALL, "--train.max-steps", "5"])
    small = ["--epochs", "2", "--dim", "4", "--quadrature-degree", "8", "--formula-trials", "4"]
    output = run_ranks(2, tmp_path / "ensemble.log", "ensemble", "train", "--run", str(run), *small)
    assert output.count("ensemble: ") == output.count("scored train: 3 files") == 1
    reported = yaml.safe_load((run / "ensemble" / "ensemble.yaml").read_text())["metrics"]
    shutil.rmtree(run / "scores")
    main(["evaluate", "--run", str(run), "--split", "valid", "--json", str(tmp_path / "1.json")])
    lists = json.loads((tmp_path / "1.json").read_text())["lists"]
    for name in ("k", "lists", "mean_length", "behaviors"):
        assert lists[name] == reported[name]
    for name, metrics in reported["methods"].items():
        # Rounding may reorder nearly equal candidates.
        assert lists["methods"][name]["mean"] == pytest.approx(metrics["mean"], abs=0.02), name


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail and return its error line."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv))
    assert exit_info.value.code in (1, 2)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("a2gen: error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def train(capsys: pytest.CaptureFixture[str], data: Path, run: Path, *options: str) -> str:
    loader = ["--loader.prefetch", "false"]
    return fails(capsys, "train", "--data", str(data), "--run", str(run), *SMALL, *loader, *options)


def first_file(data: Path) -> Path:
    return sorted((data / "train").iterdir())[0]


def rewrite(file: Path, change: dict[str, object]) -> None:
    """Replace columns of a Parquet file by nested lists; None removes a column."""
    table = pq.read_table(file)
    for name, value in change.items():
        if value is None:
            table = table.drop_columns([name])
        else:
            index = table.schema.get_field_index(name)
            table = table.set_column(index, name, pa.array(value, table.schema.field(name).type))
    pq.write_table(table, file)


def test_rejects_a_truncated_file(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first_file(broken)
    file.write_bytes(file.read_bytes()[:-200])
    assert file.name in train(capsys, broken, tmp_path / "run")


def test_rejects_a_missing_column(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first_file(broken)
    rewrite(file, {"author_id": None})
    message = train(capsys, broken, tmp_path / "run")
    assert file.name in message
    assert "'author_id': column is missing" in message


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("item_id", 40, "id is not in [0, 40)"),
        ("action_offset_s", float("nan"), "'start' must be at 0 seconds"),
        ("action", 9, "unknown action"),
    ],
)
def test_invalid_values_name_file_row_and_field(
    column: str, value: float, reason: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = first_file(broken)
    values = pq.read_table(file)[column].to_pylist()
    if column == "item_id":
        values[25][-1] = value
    else:
        values[25][-1][0] = value
    rewrite(file, {column: values})
    message = train(capsys, broken, tmp_path / "run")
    assert f"{file.name}, row 25, field '{column}'" in message
    assert reason in message
    assert not checkpoints(tmp_path / "run")


def test_prefetching_loader_reports_invalid_values(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = first_file(broken)
    values = pq.read_table(file)["item_id"].to_pylist()
    values[3][0] = -1
    rewrite(file, {"item_id": values})
    message = fails(capsys, "train", "--data", str(broken), "--run", str(tmp_path / "run"), *SMALL)
    assert f"{file.name}, row 3, field 'item_id': id is not in" in message


def test_rejects_an_unwritable_run_directory(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert "cannot write to directory" in train(capsys, dataset, tmp_path / "file" / "run")


def test_rejects_a_checkpoint_of_another_model(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(["train", "--data", str(dataset), "--run", str(run), *SMALL, "--train.max-steps", "2"])
    before = sorted(path.name for path in run.rglob("*"))
    message = train(capsys, dataset, run, "--model.dim", "16")
    assert "checkpoint has model.dim=8 but the config has 16" in message
    other = replace(CARD, features=[replace(f, cardinality=f.cardinality + 1) for f in CARD.features])
    changed = Path(shutil.copytree(dataset, tmp_path / "changed"))
    save_card(changed, other)
    assert "another lineage than run" in train(capsys, changed, run)
    for changes in ({"objectives": ["glance"]}, {"timed_actions": ["like", "exit"]}):
        save_card(changed, replace(CARD, **changes))
        assert f"{next(iter(changes))} differ from those of run" in train(capsys, changed, run)
    message = train(capsys, dataset, run, "--loss.uncertainty-weighting", "true")
    assert "checkpoint was trained with loss.uncertainty_weighting=False" in message
    message = train(capsys, dataset, run, "--sharding.dtype", "fp16")
    assert "checkpoint was trained with sharding.dtype=fp32 but the config has fp16" in message
    assert sorted(path.name for path in run.rglob("*")) == before


def test_resumes_on_the_same_data_only(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels mended with the same counts: no resumption; an evaluation states the digest of its data."""
    run, same = tmp_path / "run", Path(shutil.copytree(dataset, tmp_path / "same"))
    main(["train", "--data", str(dataset), "--run", str(run), *SMALL, "--train.max-steps", "2"])
    mended = Path(shutil.copytree(dataset, tmp_path / "mended"))
    for split in ("train", "test"):
        file = mended / split / "part-00000.parquet"
        labels = pq.read_table(file)["label_click"].to_pylist()
        rewrite(file, {"label_click": [[1 - label for label in window] for window in labels]})
    save_card(mended, CARD)
    digests = [DatasetCard.load(str(folder)).identity.data_digest for folder in (dataset, mended)]
    content = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    message = train(capsys, mended, run, "--train.max-steps", "4")
    assert f"was trained on other data (data_digest {digests[0]}, now {digests[1]})" in message
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == content

    results = []
    for data in (dataset, mended, same):
        capsys.readouterr()
        main(["evaluate", "--run", str(run), "--data", str(data), "--json", str(tmp_path / "result.json")])
        results.append(json.loads((tmp_path / "result.json").read_text()))
        assert ("the run was trained on other data" in capsys.readouterr().out) == (data == mended)
    assert [result["data_digest"] for result in results] == [*digests, digests[0]]
    assert {result["training_data_digest"] for result in results} == {digests[0]}
    assert results[0]["actions"]["click"]["auc"] != results[1]["actions"]["click"]["auc"]
    main(["train", "--data", str(same), "--run", str(run), *SMALL, "--train.max-steps", "4"])


def test_rejects_a_damaged_checkpoint(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", "--data", str(dataset), "--run", str(run), *SMALL, "--train.max-steps", "2"])
    for name in ("*.distcp", ".metadata"):
        (file,) = (run / "checkpoints").rglob(name)
        content = file.read_bytes()
        file.write_bytes(content[:300])
        assert "corrupted" in train(capsys, dataset, run, "--train.max-steps", "4")
        file.write_bytes(content)


def test_invalid_settings_exit_with_2(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, reason in (
        ("--model.dim=7", "multiple"),
        ("--model.width=8", "model.width"),
        ("--train.epochs=x", "int"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["train", "--data", str(dataset), "--run", str(tmp_path / "run"), option])
        assert exit_info.value.code == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", JOBS)
def test_two_ranks_print_an_error_once(start: type[Job], broken: Path, tmp_path: Path) -> None:
    """An invalid row that one rank reads ends the job with one error line and no traceback."""
    for file in (broken / "train").iterdir():
        values = pq.read_table(file)["item_id"].to_pylist()
        values[30][0] = 77
        rewrite(file, {"item_id": values})
    codes, output = start(2, tmp_path / "output.log", train_arguments(broken, tmp_path / "run")).wait()
    assert set(codes) == {1}
    assert output.count("a2gen: error: ") == 1, output
    assert "row 30, field 'item_id': id is not in [0, 40)" in output
    assert "Traceback" not in output
    assert not checkpoints(tmp_path / "run")


def test_rejects_tables_that_do_not_fit(dataset: Path, tmp_path: Path) -> None:
    arguments = train_arguments(dataset, tmp_path / "run", "--sharding.ddr-gb", "0.000001")
    codes, output = CommandJob(2, tmp_path / "output.log", arguments).wait()
    assert codes == [1, 1]
    assert output.count("a2gen: error: the embedding tables do not fit on 2 rank(s)") == 1, output
    assert "Traceback" not in output


def test_rejects_other_batches_within_an_epoch(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(["train", "--data", str(dataset), f"--run={run}", *SMALL, "--train.max-steps", "4"])
    message = train(capsys, dataset, run, "--loader.max-impressions-per-batch", "300")
    assert "cannot change loader.max_impressions_per_batch (100 -> 300) in the middle of an epoch" in message
    capsys.readouterr()
    main(["train", f"--run={run}", "--train.max-steps", "6"])
    assert "resuming at step 4" in capsys.readouterr().err


def test_trains_without_a_validation_split(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The latest checkpoint is the best. ForkMerge merges by validation, and is refused."""
    card, run = DatasetCard.load(str(broken)), tmp_path / "run"
    empty = replace(card.splits["valid"], targets=0)
    replace(card, splits=card.splits | {"valid": empty}).save(str(broken))
    main(train_arguments(broken, run, "--train.epochs", "2"))
    output = capsys.readouterr()
    assert "no validation split; the latest checkpoint will be the best" in output.err
    assert f"best checkpoint is step {int(checkpoints(run)[-1][5:])}" in output.out
    options = ["--train.forkmerge.merge-interval-epochs", "1", "--train.forkmerge.branch-loss-weights", "[{}, {}]"]
    assert "the validation split is empty, which train.forkmerge needs" in train(
        capsys, broken, tmp_path / "forked", *options
    )
    assert not (tmp_path / "forked").exists()


def test_rejects_more_history_than_in_the_dataset(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "rerun prepare with --max-history 50" in train(
        capsys, dataset, tmp_path / "run", "--model.max-history", "50"
    )
