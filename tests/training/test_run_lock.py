"""Two trainings of one run: the second is refused on local storage; on remote storage, the first stops."""

import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from iopath.common.file_io import g_pathmgr

from a2gen_rec.cli.main import main
from a2gen_rec.errors import UserError
from a2gen_rec.training.checkpoint import TrainState
from a2gen_rec.training.run_lock import lock_run
from a2gen_rec.training.trainer import Trainer
from tests.helpers.cards import make_card, write_dataset
from tests.helpers.storage import PREFIX, DirectoryStorage

OPTIONS = ["--model.dim", "8", "--model.num-heads", "2", "--model.time-buckets", "8", "--loader.prefetch", "false"]
OPTIONS += ["--loader.max-impressions-per-batch", "100", "--train.max-steps", "4", "--train.checkpoint-interval", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data") / "data", make_card(), windows=30, files=1))


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Path]:
    handler = DirectoryStorage(tmp_path / "remote")
    g_pathmgr.register_handler(handler)
    yield handler.root
    g_pathmgr._path_handlers.pop(PREFIX)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def train(data: str, run: str, *options: str) -> None:
    main(["train", "--data", data, "--run", run, *OPTIONS, *options])


def fails(capsys: pytest.CaptureFixture[str], data: str, run: str, *options: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train(data, run, *options)
    assert exit_info.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a2gen: error: ")]
    return line


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_training_is_refused(
    resumed: bool, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also through a link and with other settings; no file of the run changes."""
    run = tmp_path / "run"
    if resumed:
        train(data, str(run))
        assert not (run / "lock").exists()
    (tmp_path / "link").symlink_to(run)
    with lock_run(str(run)):
        before = content(run)
        for path in (run, tmp_path / "link"):
            line = fails(capsys, data, str(path), "--train.max-steps", "6", "--optim.dense-lr", "0.1")
            assert f"{path}: another `a2gen train` uses this run (process " in line
        assert content(run) == before
    train(data, str(run), "--train.max-steps", "6")


def test_a_refused_training_leaves_no_directory(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_history" in fails(capsys, data, str(tmp_path / "run"), "--model.max-history", "99")
    assert not list(tmp_path.iterdir())


def test_the_last_training_owns_a_remote_run(remote: Path) -> None:
    with lock_run("memtest://run") as first:
        first.check()
        with lock_run("memtest://run") as second:
            second.check()
            with pytest.raises(UserError, match="memtest://run: another `a2gen train` took over this run"):
                first.check()
        with pytest.raises(UserError, match="took over"):
            first.check()
    assert not list((remote / "run").iterdir())


def test_an_earlier_training_of_a_remote_run_stops_without_saving(
    data: str, remote: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first training loses the run between two checkpoints; the next training continues from its last one."""
    validate = Trainer.validate

    def take_over(trainer: Trainer) -> dict[str, float]:
        monkeypatch.setattr(Trainer, "validate", validate)
        owner = (remote / "run" / "lock").read_text()
        assert owner.startswith("process ")
        (remote / "run" / "lock").write_text("process 1 elsewhere")
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", take_over)
    line = fails(capsys, data, "memtest://run")
    assert "memtest://run: another `a2gen train` took over this run, or it was removed; stopping without saving" in line
    assert (remote / "run" / "lock").read_text() == "process 1 elsewhere"
    assert sorted(path.name for path in (remote / "run" / "checkpoints").iterdir()) == ["step-00000002"]
    train(data, "memtest://run")
    assert TrainState.read("memtest://run/checkpoints/step-00000004").step == 4
    assert not (remote / "run" / "lock").exists()


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_run(str(tmp_path / "run")) as first, lock_run(str(tmp_path / "run")) as second:
        second.check()
        assert not first.is_held()


def test_a_removed_or_replaced_run_is_not_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock_run(str(run)) as first:
        run.rename(tmp_path / "moved")
        assert not first.is_held()
        with lock_run(str(run)) as second:
            second.check()
            assert not first.is_held()
        with pytest.raises(UserError, match="or it was removed; stopping without saving"):
            first.check()


def test_partial_checkpoints_of_killed_trainings_are_removed(data: str, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "checkpoints" / "step-00000002.0123abcd.writing"
    partial.mkdir(parents=True)
    (partial / "file").write_text("")
    train(data, str(tmp_path / "run"))
    assert sorted(path.name for path in partial.parent.iterdir()) == [f"step-{step:08d}" for step in (3, 4)]
