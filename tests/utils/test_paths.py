"""Local paths and a registered custom storage behave alike."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from iopath.common.file_io import g_pathmgr

from a2gen_rec.config import LoaderConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.utils import paths
from tests.helpers.cards import full_tables, make_card, small_config, write_dataset
from tests.helpers.storage import PREFIX, DirectoryStorage


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directory behind ``memtest://``, registered for one test."""
    root = tmp_path / "storage"
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(g_pathmgr, "_path_handlers", g_pathmgr._path_handlers.copy())
        g_pathmgr.register_handler(DirectoryStorage(root))
        yield root
    assert not any(prefix.startswith("memtest") for prefix in g_pathmgr._path_handlers)


@pytest.fixture(params=["local", "remote"])
def location(request: pytest.FixtureRequest, storage: Path) -> tuple[str, Path]:
    """A path as a user gives it, and its actual directory."""
    folder = storage / "home"
    folder.mkdir()
    return (str(folder) if request.param == "local" else f"{PREFIX}home"), folder


@pytest.fixture
def blocked(tmp_path: Path) -> str:
    """A path below a file, where not even root can write."""
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "below")


def test_join_and_is_local(storage: Path) -> None:
    assert paths.join("a", "b", "c") == "a/b/c"
    assert paths.join("a/", "b") == "a/b"
    assert paths.join("/", "b") == "/b"
    assert paths.join("s3://bucket/run/", "step", "x") == "s3://bucket/run/step/x"
    assert paths.join("a") == "a"
    assert paths.is_local("/a/b")
    assert paths.is_local("relative")
    assert not paths.is_local("memtest://a")


def test_write_read_list(location: tuple[str, Path]) -> None:
    base, folder = location
    text = "línea 1\n二\n"
    paths.write_text(paths.join(base, "b.txt"), text)
    paths.write_text(paths.join(base, "a.txt"), "first")
    paths.write_text(paths.join(base, "a.txt"), "second")
    assert (folder / "b.txt").read_text(encoding="utf-8") == text
    assert paths.read_text(paths.join(base, "b.txt")) == text
    assert paths.read_text(paths.join(base, "a.txt")) == "second"
    assert paths.listdir(base) == ["a.txt", "b.txt"], "names are sorted, and no temporary file remains"
    assert paths.exists(paths.join(base, "a.txt"))
    assert not paths.exists(paths.join(base, "c.txt"))
    assert paths.listdir(paths.join(base, "nowhere")) == []


def test_to_local_path(location: tuple[str, Path]) -> None:
    base, folder = location
    (folder / "a.bin").write_bytes(b"\x00\xff")
    assert Path(paths.to_local_path(paths.join(base, "a.bin"))).read_bytes() == b"\x00\xff"
    absent = paths.join(base, "nowhere")
    with pytest.raises(UserError, match="not found") as caught:
        paths.to_local_path(absent)
    assert str(caught.value).startswith(f"{absent}: ")


@pytest.mark.parametrize("problem", ["absent", "directory", "not text"])
def test_read_errors_name_the_file(problem: str, location: tuple[str, Path]) -> None:
    base, folder = location
    file = paths.join(base, "file")
    if problem == "directory":
        (folder / "file").mkdir()
    elif problem == "not text":
        (folder / "file").write_bytes(b"\xff\xfe\x00PAR1\x9f")
    with pytest.raises(UserError, match="cannot be read") as caught:
        paths.read_text(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_ensure_writable_dir(location: tuple[str, Path]) -> None:
    base, folder = location
    for _ in range(2):
        paths.ensure_writable_dir(paths.join(base, "x", "y"))
        assert list((folder / "x" / "y").iterdir()) == [], "the probe file is removed"


def test_write_errors_name_the_path(location: tuple[str, Path]) -> None:
    base, folder = location
    (folder / "file").write_text("kept")
    below = paths.join(base, "file", "below")
    for write, reason in (
        (lambda: paths.write_text(below, "x"), "cannot be written"),
        (lambda: paths.ensure_writable_dir(below), "cannot write to directory"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            write()
        assert str(caught.value).startswith(f"{below}: ")
        assert "\n" not in str(caught.value)
    assert (folder / "file").read_text() == "kept"
    assert paths.listdir(base) == ["file"]


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        paths.write_text(str(tmp_path / "taken"), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(UserError, match="cannot be written"):
        paths.write_text(str(tmp_path / "no" / "folder" / "x"), "x")
    assert not (tmp_path / "no").exists()


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    paths.write_text(str(file), "old")

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(UserError, match=r"settings\.yaml: cannot be written \(No space left on device\)"):
        paths.write_text(str(file), "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_atomic_writer(location: tuple[str, Path]) -> None:
    base, folder = location
    file = paths.join(base, "part.bin")
    with paths.atomic_writer(file) as stream:
        stream.write(b"old")
    assert (folder / "part.bin").read_bytes() == b"old"
    with pytest.raises(UserError, match=r"part\.bin: cannot be written \(No space left"), paths.atomic_writer(file):
        raise OSError(28, "No space left on device")
    assert paths.listdir(base) == ["part.bin"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_interrupted_writer_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "part.bin"
    file.write_bytes(b"old")

    def write() -> None:
        with paths.atomic_writer(str(file)) as stream:
            stream.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["part.bin"]


@pytest.mark.parametrize("before", ["absent", "empty", "below absent"])
def test_move_into_place(before: str, location: tuple[str, Path], tmp_path: Path) -> None:
    base, folder = location
    source = tmp_path / "source"
    (source / "train" / "deep").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "card.yaml").write_text("card")
    (source / "train" / "deep" / "part").write_bytes(b"\x01")
    name = "new/data" if before == "below absent" else "data"
    if before == "empty":
        (folder / "data").mkdir()
    paths.move_dir(str(source), paths.join(base, *name.split("/")))
    target = folder / name
    assert {path.relative_to(target).as_posix() for path in target.rglob("*")} == {
        "card.yaml",
        "empty",
        "train",
        "train/deep",
        "train/deep/part",
    }
    assert (target / "card.yaml").read_text() == "card"
    assert (target / "train" / "deep" / "part").read_bytes() == b"\x01"
    assert not source.exists()


def test_dataset_is_read_from_local_and_remote_paths(storage: Path) -> None:
    card = make_card()
    card = DatasetCard.load(str(write_dataset(storage / "data", card, windows=15, files=2)))
    config = LoaderConfig(max_impressions_per_batch=40, prefetch=False)
    keys = []
    for dataset in (str(storage / "data"), f"{PREFIX}data"):
        assert DatasetCard.load(dataset) == card
        stream = WindowDataset(Dataset(dataset, card), "train", config, full_tables(card, small_config()))
        keys.append(
            [batch.user_key.tolist() for batch in WindowDataLoader(stream, prefetch=False).iter_epoch(LoaderState())]
        )
    assert keys[0] == keys[1]
    assert sum(map(len, keys[0])) == 30
    with pytest.raises(DataError, match="memtest://data/nosuch: split 'nosuch' has no windows"):
        WindowDataset(Dataset(f"{PREFIX}data", card), "nosuch", config, {})
    with pytest.raises(UserError, match="memtest://nothing: directory not found"):
        DatasetCard.load(f"{PREFIX}nothing")


def test_card_is_written_to_local_and_remote_paths(location: tuple[str, Path], blocked: str) -> None:
    base, folder = location
    card = make_card()
    card.save(base)
    assert (folder / "dataset.yaml").is_file()
    assert DatasetCard.load(base) == card
    with pytest.raises(UserError, match="cannot be written"):
        card.save(blocked)


@pytest.mark.parametrize(
    ("path", "folder"),
    [("a", "."), ("/a", "/"), ("/a/b", "/a"), ("a/b/c", "a/b"), ("s3://a/b", "s3://a"), ("s3://a", "s3://")],
)
def test_dirname(path: str, folder: str) -> None:
    assert paths.dirname(path) == folder


def test_abspath_changes_local_paths_only(storage: Path) -> None:
    assert paths.abspath("memtest://bucket/a") == "memtest://bucket/a"
    assert paths.abspath("a/b") == str(Path.cwd() / "a" / "b")


def test_resolve_relative(storage: Path) -> None:
    assert paths.resolve_relative("some/folder", "../file") == "some/folder/../file"
    assert paths.resolve_relative("some/folder", "/file") == "/file"
    assert paths.resolve_relative("some/folder", "memtest://bucket/file") == "memtest://bucket/file"
    assert paths.resolve_relative("memtest://bucket", "file") == "memtest://bucket/file"


def test_several_processes_check_a_directory_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(paths.ensure_writable_dir, str(tmp_path)) for _ in range(400)]:
            future.result()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_text", [False, True])
def test_yaml_with_a_key_twice(tmp_path, as_text):
    file = tmp_path / "a.yaml"
    file.write_text("a: {b: 1, c: yes}\nb: 2\n")
    expected = {"a": {"b": "1", "c": "yes"}, "b": "2"} if as_text else {"a": {"b": 1, "c": True}, "b": 2}
    assert paths.read_yaml(str(file), as_text) == expected
    for text, where in (("a: 1\nb: 2\na: 3\n", "line 3, column 1"), ("a: {b: 1, b: 1}\n", "line 1, column 11")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"a.yaml: invalid YAML \({where}: duplicate key '[ab]'\)"):
            paths.read_yaml(str(file), as_text)
