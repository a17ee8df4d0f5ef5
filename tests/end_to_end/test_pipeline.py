"""The command line from simulation to a ranked list, with all paths on remote storage."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from iopath.common.file_io import g_pathmgr

from a2gen_rec.cli.main import main
from tests.helpers.storage import PREFIX, DirectoryStorage

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    handler = DirectoryStorage(tmp_path_factory.mktemp("remote"))
    g_pathmgr.register_handler(handler)
    yield handler.root
    g_pathmgr._path_handlers.pop(PREFIX)


@pytest.fixture(scope="module")
def trained(remote: Path) -> Path:
    main(["simulate", "--out", "memtest://log", "--users", "60", "--items", "40", "--impressions-per-user", "30"])
    main(["prepare", "simulated", "--raw", "memtest://log", "--out", "memtest://data", "--num-partitions", "2"])
    small = [
        "--model.dim",
        "8",
        "--model.num-heads",
        "2",
        "--train.max-steps",
        "12",
        "--loader.max-impressions-per-batch",
        "300",
    ]
    main(["train", "--data", "memtest://data", "--run", "memtest://run", "--train.keep-latest-k", "1", *small])
    return remote


def test_all_files_are_on_remote_storage(trained: Path) -> None:
    assert (trained / "log" / "simulation.yaml").exists()
    assert (trained / "data" / "dataset.yaml").exists()
    assert (trained / "run" / "config.yaml").exists()
    assert list((trained / "run" / "checkpoints").glob("step-*/.metadata"))
    assert not list((trained / "run" / "checkpoints").glob("*.writing"))
    assert not Path("memtest:").exists()


def test_resumes_a_finished_run_with_its_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--run", "memtest://run", "--train.max-steps", "14"])
    printed = capsys.readouterr()
    assert "resuming at step 12" in printed.err
    assert "memtest://run: best checkpoint is step " in printed.out
    assert "to evaluate: a2gen evaluate --run memtest://run" in printed.out
    assert (trained / "run" / "checkpoints" / "step-00000014").exists()


def test_evaluation_keys(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--run", "memtest://run", "--split", "test", "--json", "memtest://evaluation.json"])
    result = json.loads((trained / "evaluation.json").read_text())
    names = {"like", "comment", "follow", "collect", "forward", "long_view"}
    assert result["split"] == "test"
    assert result["targets"] > 0
    assert set(result["actions"]) == names
    for row in result["actions"].values():
        assert set(row) == {"auc", "gauc", "ne", "calibration", "positives"}
    assert set(result["time"]) == names - {"long_view"} | {"exit"}
    assert set(result["time_given_prefix"]) == set(result["time"])
    for row in [*result["time"].values(), *result["time_given_prefix"].values()]:
        assert set(row) == {"mae_log", "mae_s", "rank_correlation", "count"}
    reference = result["reference"]
    assert set(reference) == {"base_rate", "item_rate", "oracle", "median_time"}
    assert set(reference["base_rate"]) == set(reference["item_rate"]) == set(reference["oracle"]) == names
    assert reference["oracle"]["long_view"]["auc"] > reference["base_rate"]["long_view"]["auc"] == 0.5
    assert "long_view" in capsys.readouterr().out


def test_ranks_candidates_of_a_user(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "candidates.txt").write_text("3\n5\n8\nunknown-item\n")
    main(["rank", "--run", "memtest://run", "--user", "7", "--candidates", "memtest://candidates.txt"])
    output = capsys.readouterr().out
    assert "unknown-item" in output
    assert "exit" in output


@pytest.fixture(scope="module")
def ensemble(trained: Path) -> Path:
    small = ["--epochs", "2", "--dim", "4", "--hidden-dims", "[4]", "--quadrature-degree", "8"]
    small += ["--formula-trials", "4"]
    main(["ensemble", "train", "--run", "memtest://run", *small])
    return trained / "run" / "ensemble"


def test_trains_and_evaluates_an_ensemble(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in ensemble.iterdir()}
    assert {"ensemble.yaml", "ensemble.safetensors", "transforms.png", "baseline-mlp.safetensors"} <= names
    main(["evaluate", "--run", "memtest://run", "--split", "valid", "--json", "memtest://lists.json"])
    lists = json.loads((ensemble.parents[1] / "lists.json").read_text())["lists"]
    reported = yaml.safe_load((ensemble / "ensemble.yaml").read_text())["metrics"]
    assert lists == reported
    assert "long_view alone" in lists["methods"]
    summary = capsys.readouterr().out
    assert "NDCG@3" in summary
    assert "AUC" in summary
    assert 10 <= len(summary.splitlines()) <= 40
    assert max(map(len, summary.splitlines())) <= 100
    main(["evaluate", "--run", "memtest://run", "--split", "valid", "--full"])
    full = capsys.readouterr().out
    assert len(full.splitlines()) > len(summary.splitlines())
    assert "long_view alone" in full


def test_explains_a_ranking(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["rank", "--run", "memtest://run", "--user", "7", "--k", "3", "--explain"])
    output = capsys.readouterr().out
    assert "by ensemble score" in output
    assert "× weight" in output
    assert "lead over 2" in output
