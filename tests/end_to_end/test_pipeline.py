"""From nothing to a ranked list, by the commands users type, with every path on remote storage."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from iopath.common.file_io import PathHandler, g_pathmgr

from a2gen_rec.cli import main


class FakeRemote(PathHandler):
    """Storage that only iopath can reach: ``remote://`` is a local folder under another name."""

    prefix = "remote://"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self) -> list[str]:
        return [self.prefix]

    def _local(self, path: str) -> Path:
        return self.root / path.removeprefix(self.prefix)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[Any]:
        return open(self._local(path), mode)

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(self._local(path))

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        shutil.copyfile(local_path, self._local(dst_path))
        return True

    def _exists(self, path: str, **_: Any) -> bool:
        return self._local(path).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self._local(path).is_file()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self._local(path).is_dir()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._local(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        self._local(path).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self._local(path).unlink()

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        self._local(src_path).rename(self._local(dst_path))
        return True


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    handler = FakeRemote(tmp_path_factory.mktemp("remote"))
    g_pathmgr.register_handler(handler)
    yield handler.root
    g_pathmgr._path_handlers.pop(FakeRemote.prefix)


@pytest.fixture(scope="module")
def trained(remote: Path) -> Path:
    main(["simulate", "--out", "remote://log", "--users", "60", "--items", "40", "--impressions_per_user", "30"])
    main(["prepare", "simulated", "--raw", "remote://log", "--out", "remote://data", "--partitions", "2"])
    small = ["--model.dim", "8", "--model.heads", "2", "--train.max_steps", "12", "--loader.max_impressions", "300"]
    main(["train", "--data", "remote://data", "--run", "remote://run", "--train.keep", "1", *small])
    return remote


def test_everything_lies_on_the_remote_storage(trained: Path) -> None:
    assert (trained / "log" / "world.yaml").exists()
    assert (trained / "data" / "dataset.yaml").exists()
    assert (trained / "run" / "config.yaml").exists()
    assert list((trained / "run" / "checkpoints").glob("step-*/.metadata"))
    assert not list((trained / "run" / "checkpoints").glob("*.writing"))
    assert not Path("remote:").exists()


def test_a_finished_run_is_resumed_with_its_own_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--run", "remote://run", "--train.max_steps", "14"])
    assert "resuming at step 12" in capsys.readouterr().err
    assert (trained / "run" / "checkpoints" / "step-00000014").exists()


def test_evaluation_has_the_promised_keys(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--run", "remote://run", "--split", "test", "--json", "remote://evaluation.json"])
    result = json.loads((trained / "evaluation.json").read_text())
    names = {"like", "comment", "follow", "collect", "forward", "long_view"}
    assert result["split"] == "test"
    assert result["targets"] > 0
    assert set(result["actions"]) == names
    for row in result["actions"].values():
        assert set(row) == {"auc", "gauc", "ne", "calibration", "positives"}
    assert set(result["time"]) == names - {"long_view"} | {"exit"}
    for row in result["time"].values():
        assert set(row) == {"mae_log", "mae_s", "count"}
    reference = result["reference"]
    assert set(reference) == {"base_rate", "item_rate", "oracle", "median_time"}
    assert set(reference["base_rate"]) == set(reference["item_rate"]) == set(reference["oracle"]) == names
    assert reference["oracle"]["long_view"]["auc"] > reference["base_rate"]["long_view"]["auc"] == 0.5
    assert "long_view" in capsys.readouterr().out


def test_ranking_a_user(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "candidates.txt").write_text("3\n5\n8\nnobody-knows-this\n")
    main(["rank", "--run", "remote://run", "--user", "7", "--candidates", "remote://candidates.txt"])
    output = capsys.readouterr().out
    assert "nobody-knows-this" in output
    assert "exit" in output
