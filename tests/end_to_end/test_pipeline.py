"""From nothing to a ranked list, by the commands users type, with every path on remote storage."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from iopath.common.file_io import g_pathmgr

from a2gen_rec.cli.main import main
from tests.helpers.storage import PREFIX, DirectoryStorage


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    handler = DirectoryStorage(tmp_path_factory.mktemp("remote"))
    g_pathmgr.register_handler(handler)
    yield handler.root
    g_pathmgr._path_handlers.pop(PREFIX)


@pytest.fixture(scope="module")
def trained(remote: Path) -> Path:
    main(["simulate", "--out", "memtest://log", "--users", "60", "--items", "40", "--impressions_per_user", "30"])
    main(["prepare", "simulated", "--raw", "memtest://log", "--out", "memtest://data", "--partitions", "2"])
    small = [
        "--model.dim",
        "8",
        "--model.num_heads",
        "2",
        "--train.max_steps",
        "12",
        "--loader.max_impressions_per_batch",
        "300",
    ]
    main(["train", "--data", "memtest://data", "--run", "memtest://run", "--train.keep_latest_k", "1", *small])
    return remote


def test_everything_lies_on_the_remote_storage(trained: Path) -> None:
    assert (trained / "log" / "simulation.yaml").exists()
    assert (trained / "data" / "dataset.yaml").exists()
    assert (trained / "run" / "config.yaml").exists()
    assert list((trained / "run" / "checkpoints").glob("step-*/.metadata"))
    assert not list((trained / "run" / "checkpoints").glob("*.writing"))
    assert not Path("memtest:").exists()


def test_a_finished_run_is_resumed_with_its_own_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--run", "memtest://run", "--train.max_steps", "14"])
    assert "resuming at step 12" in capsys.readouterr().err
    assert (trained / "run" / "checkpoints" / "step-00000014").exists()


def test_evaluation_has_the_promised_keys(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_ranking_a_user(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "candidates.txt").write_text("3\n5\n8\nnobody-knows-this\n")
    main(["rank", "--run", "memtest://run", "--user", "7", "--candidates", "memtest://candidates.txt"])
    output = capsys.readouterr().out
    assert "nobody-knows-this" in output
    assert "exit" in output


@pytest.fixture(scope="module")
def fused(trained: Path) -> Path:
    small = ["--epochs", "2", "--dim", "4", "--hidden", "[4]", "--degree", "8", "--formula_trials", "4"]
    main(["ensemble", "train", "--run", "memtest://run", *small])
    return trained / "run" / "ensemble"


def test_an_ensemble_is_trained_and_evaluated(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in fused.iterdir()}
    assert {"ensemble.yaml", "ensemble.safetensors", "transforms.png", "baseline-mlp.safetensors"} <= names
    main(["evaluate", "--run", "memtest://run", "--split", "valid", "--json", "memtest://lists.json"])
    lists = json.loads((fused.parents[1] / "lists.json").read_text())["lists"]
    reported = yaml.safe_load((fused / "ensemble.yaml").read_text())["metrics"]
    assert lists == reported
    assert "long_view alone" in lists["methods"]
    assert "NDCG@3" in capsys.readouterr().out


def test_a_ranking_explained(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["rank", "--run", "memtest://run", "--user", "7", "--k", "3", "--explain"])
    output = capsys.readouterr().out
    assert "by ensemble score" in output
    assert "why this order" in output
    assert "ahead of 2" in output
