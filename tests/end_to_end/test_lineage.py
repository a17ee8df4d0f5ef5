"""Two days' logs whose cards have equal shapes: every command refuses the other day's dataset, and writes nothing."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.artifact.manifest import read_manifest
from a2gen_rec.cli.main import main
from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.experiments.runner import Experiment
from a2gen_rec.experiments.suite import read_suite
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.run_dir import RunDir
from tests.helpers import CONFIGS
from tests.helpers.cards import SMALL_MODEL_OPTIONS

pytestmark = pytest.mark.training

SMALL = [*SMALL_MODEL_OPTIONS, "--loader.max-impressions-per-batch", "200", "--train.log-interval", "0"]
TREES = ["--model.name", "gbdt", "--gbdt.max-trees", "3", "--gbdt.min-child-samples", "10"]
SPEC = {
    "kind": "impressions",
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}},
    "features": [
        {"name": "user_id", "level": "user", "size": 20},
        {"name": "item_id", "level": "item", "size": 15},
        {"name": "length", "level": "item", "kind": "buckets", "edges": [10, 20]},
    ],
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}


def write_log(folder: Path, prefix: str, day: int = 0) -> None:
    """Write a day's log of 30 users and 40 items whose names begin with a prefix."""
    rng, count = np.random.default_rng(0), 900
    item = rng.integers(0, 40, count)
    table = {
        "user": [f"user-{number}" for number in rng.integers(0, 30, count)],
        "item": [f"{prefix}-{number}" for number in item],
        "ts": 1_714_521_600_000 + 86_400_000 * day + np.cumsum(rng.integers(0, 60_000, count)),
        "dwell": rng.exponential(10, count),
        "like": rng.integers(0, 2, count),
        "length": item.astype(float),
    }
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "log.parquet")


@dataclass(frozen=True)
class Trained:
    """Data of two days, and everything made of the first.

    Attributes:
        folder: folder with ``day1``, ``day2`` (datasets), ``raw1``, ``raw2``, ``run``, ``trees``, ``plan.yaml``,
            ``model`` (exported), and ``spec.yaml``.
    """

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def files(self) -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in self.folder.rglob("*") if file.is_file()}

    def refusal(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        """Return the only line that a command prints on its failure, after which all files are as before."""
        before = self.files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code in (1, 2)
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1, output.err
        assert self.files() == before
        return output.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    result = Trained(tmp_path_factory.mktemp("lineage"))
    (result.folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    config = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, statistics=False)
    for day in ("1", "2"):
        write_log(result.folder / f"raw{day}", f"video{day}")
        prepare("generic", result.path(f"raw{day}"), result.path(f"day{day}"), config, result.path("spec.yaml"))
    train = ["train", "--data", result.path("day1")]
    main([*train, "--run", result.path("run"), *SMALL, "--train.max-steps", "4"])
    main([*train, "--run", result.path("trees"), *TREES])
    main(["export", "--run", result.path("run"), "--out", result.path("model"), "--dtype", "fp32"])
    plan = ["plan", "--data", result.path("day1"), "--topology", str(CONFIGS / "topologies" / "laptop.yaml"), *SMALL]
    main([*plan, "--ranks", "1", "--save", result.path("plan.yaml")])
    return result


COMMANDS: dict[str, Callable[[Trained], list[str]]] = {
    "evaluate": lambda made: [
        *("evaluate", "--run", made.path("run"), "--data", made.path("day2")),
        *("--json", made.path("result.json"), "--predictions", made.path("result.parquet")),
    ],
    "evaluate trees": lambda made: ["evaluate", "--run", made.path("trees"), "--data", made.path("day2")],
    "rank": lambda made: ["rank", "--run", made.path("run"), "--data", made.path("day2"), "--user", "user-1"],
    "ensemble train": lambda made: ["ensemble", "train", "--run", made.path("run"), "--data", made.path("day2")],
    "export": lambda made: [
        *("export", "--run", made.path("run"), "--data", made.path("day2"), "--out", made.path("model2"))
    ],
    "train": lambda made: [
        *("train", "--run", made.path("run"), "--data", made.path("day2"), *SMALL, "--train.max-steps", "8")
    ],
    "train trees": lambda made: ["train", "--run", made.path("trees"), "--data", made.path("day2"), *TREES],
    "train --plan": lambda made: [
        *("train", "--run", made.path("new"), "--data", made.path("day2"), "--plan", made.path("plan.yaml"), *SMALL)
    ],
    "plan --compare": lambda made: [
        *("plan", "--data", made.path("day2"), "--topology", str(CONFIGS / "topologies" / "laptop.yaml"), *SMALL),
        *("--compare", made.path("plan.yaml"), made.path("plan.yaml"), "--json", made.path("comparison.json")),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_the_data_of_another_lineage(
    name: str, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (DatasetCard.load(trained.path(day)) for day in ("day1", "day2"))
    assert first.features == second.features, "only vocabularies differ"
    message = trained.refusal(COMMANDS[name](trained), capsys)
    assert "lineage" in message
    assert "item_id encodes values differently" in message


def test_backfill_refuses_a_log_without_any_item_of_the_model(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """A raw log has no rows: a log of later days, with some items of the model, is accepted."""
    command = ["backfill", "generic", "--model", trained.path("model"), "--spec", trained.path("spec.yaml")]
    command += ["--event-store", trained.path("events.db"), "--raw"]
    message = trained.refusal([*command, trained.path("raw2")], capsys)
    assert "raw2, field 'item_id': none of its 40 items is known to the model" in message
    main([*command, trained.path("raw1")])
    assert "users" in capsys.readouterr().out


def test_an_experiment_refuses_data_exchanged_before_the_test(trained: Trained, tmp_path: Path) -> None:
    """A resumed experiment trains on exchanged data anew; runs of the former data are not tested on them."""
    shutil.copytree(trained.path("day1"), tmp_path / "data")
    settings = {"model.dim": 8, "model.num_heads": 2, "model.time_buckets": 8, "train.max_steps": 1}
    suite = {"datasets": {"log": {"data": "data", "settings": settings}}, "models": {"a2gen": {}}, "seeds": [0]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))

    def run_command(arguments: Sequence[str], log: str) -> int:
        Path(log).touch()
        try:
            main(list(arguments))
        except SystemExit:
            return 1
        if arguments[0] == "train":
            shutil.rmtree(tmp_path / "data")
            shutil.copytree(trained.path("day2"), tmp_path / "data")
        return 0

    out = str(tmp_path / "out")
    experiment = Experiment(read_suite(str(tmp_path / "suite.yaml")), out, str(tmp_path), run_command=run_command)
    results = experiment.run()
    (failure,) = results["failed"]
    assert failure["phase"] == "test"
    assert not results["runs"]
    assert not list((tmp_path / "out").rglob("test.*"))


@pytest.fixture
def later(trained: Trained, tmp_path: Path) -> Path:
    """An increment that continues the first day, with another vocabulary."""
    folder = Path(shutil.copytree(trained.path("day1"), tmp_path / "later"))
    card = DatasetCard.load(str(folder))
    inputs = card.identity.inputs | {"item_id": "0123456789abcdef"}
    replace(card, identity=DataIdentity([*card.identity.lineage, "b" * 32], inputs)).save(str(folder))
    return folder


def test_commands_accept_a_later_increment(
    trained: Trained, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lineage = DatasetCard.load(str(later)).identity.lineage
    for run in ("run", "trees"):
        main(["evaluate", "--run", trained.path(run), "--data", str(later), "--json", str(tmp_path / "result.json")])
        result = json.loads((tmp_path / "result.json").read_text())
        assert [result["training_data_digest"], result["data_digest"]] == lineage
    main(["rank", "--run", trained.path("run"), "--data", str(later), "--user", "user-1"])
    run = shutil.copytree(trained.path("run"), tmp_path / "run")
    main(["ensemble", "train", "--run", str(run), "--data", str(later), "--epochs", "1", "--formula-trials", "1"])
    assert EnsembleCard.read(str(run / "ensemble")).lineage == lineage
    main(["export", "--run", str(run), "--data", str(later), "--out", str(tmp_path / "model"), "--dtype", "fp32"])
    source = read_manifest(str(tmp_path / "model")).source
    assert (source["lineage"], source["training_lineage"]) == (lineage, lineage[:1])
    assert DatasetCard.load(str(tmp_path / "model")).identity == DatasetCard.load(str(later)).identity
    capsys.readouterr()


def state(run: Path) -> TrainState:
    return TrainState.read(RunDir(str(run)).latest_checkpoint() or "")


def test_training_continues_on_a_later_increment_between_epochs(
    trained: Trained, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best step and patience begin anew, as the metrics of other impressions are not comparable."""
    made = Trained(tmp_path)
    options = ["--run", made.path("run"), *SMALL]
    main(["train", "--data", trained.path("day1"), *options, "--train.max-steps", "2"])
    message = made.refusal(["train", "--data", str(later), *options, "--train.max-steps", "4"], capsys)
    assert f"cannot change to a later increment, {later}, in the middle of an epoch" in message
    main(["train", "--data", trained.path("day1"), *options, "--train.epochs", "1", "--train.max-steps", "0"])
    first = state(tmp_path / "run")
    assert first.windows == 0
    better = replace(first, best=-100.0, best_step=1, validations_since_best=3)
    Path(RunDir(made.path("run")).latest_checkpoint() or "", "state.json").write_text(json.dumps(asdict(better)))
    main(["train", "--data", str(later), *options, "--train.epochs", "2", "--train.max-steps", "0"])
    last = state(tmp_path / "run")
    assert last.step > first.step
    assert (last.best_step, last.validations_since_best) == (last.step, 0)
    assert last.card["identity"]["lineage"] == DatasetCard.load(str(later)).identity.lineage
    message = made.refusal(["train", "--data", trained.path("day1"), *options, "--train.epochs", "3"], capsys)
    assert "item_id encodes values differently" in message


@pytest.fixture(scope="module")
def increment(trained: Trained) -> Path:
    """The next day of the first day's dataset, on which all videos are new: they have the rows of retired ones."""
    write_log(trained.folder / "raw3", "video2", day=1)
    folder = trained.folder / "day3"
    config = PrepareConfig(threads=1, memory_limit_gb=0.5, ttl_days=0.6, valid_fraction=0.2, test_fraction=0.3)
    raw, spec = trained.path("raw3"), trained.path("spec.yaml")
    card = prepare("generic", raw, str(folder), config, spec, base=trained.path("day1"))
    assert card.vocabularies["item_id"].reused == 15
    return folder


def test_new_values_are_unknown_to_earlier_runs(trained: Trained, increment: Path, tmp_path: Path) -> None:
    """The result equals that of the same targets with row 0: no vector of a retired video is used for a new one."""
    zeros = Path(shutil.copytree(increment, tmp_path / "zeros"))
    for file in (zeros / "test").iterdir():
        table = pq.read_table(file)
        items = table["item_id"].combine_chunks()
        assert max(items.flatten().to_pylist()) > 0
        rows = pa.ListArray.from_arrays(items.offsets, pa.array(np.zeros(len(items.flatten()), np.int64)))
        pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", rows), file)
    for run in ("run", "trees"):
        results = []
        for data in (increment, zeros):
            command = ["evaluate", "--run", trained.path(run), "--data", str(data)]
            main([*command, "--json", str(tmp_path / "result.json")])
            results.append(json.loads((tmp_path / "result.json").read_text()))
        assert results[0]["actions"] == results[1]["actions"]
        assert results[0]["reference"]["item_rate"] == results[1]["reference"]["item_rate"]


def test_an_export_lacks_new_values(trained: Trained, increment: Path, tmp_path: Path) -> None:
    run, out = trained.path("run"), str(tmp_path / "model")
    main(["export", "--run", run, "--data", str(increment), "--out", out, "--dtype", "fp32", "--max-auc-drop", "1"])
    items = pq.read_table(f"{out}/items.parquet").to_pylist()
    assert {row["item_id"] for row in items} == {0}
    assert all(row["item"].startswith("video2") for row in items), "retired items are absent"
    (tmp_path / "ids").write_text("video2-1\nvideo2-2\n")
    main(["rank", "--run", run, "--data", str(increment), "--user", "user-1", "--candidates", str(tmp_path / "ids")])


def test_training_does_not_continue_on_reused_rows(
    trained: Trained, increment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Trained(tmp_path)
    command = ["train", "--run", made.path("run"), *SMALL]
    main([*command, "--data", trained.path("day1"), "--train.epochs", "1", "--train.max-steps", "0"])
    message = made.refusal([*command, "--data", str(increment), "--train.epochs", "2"], capsys)
    assert "15 rows of item_id had another value when they were trained" in message
