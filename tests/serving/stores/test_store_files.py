"""SQLite stores whose files are moved, removed, replaced or overwritten, and deletions while a reader uses the log."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.stores.base import StoreError, StoreUnavailable
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers.fake_ranker import make_model
from tests.helpers.service import running, serve_process, wait_until

BEFORE = [Impression("before", 1)]


def remove(file: Path, backup: Path) -> None:
    file.unlink()


def remove_all(file: Path, backup: Path) -> None:
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()


def remove_log(file: Path, backup: Path) -> None:
    file.with_name(f"{file.name}-wal").unlink()


def remove_log_index(file: Path, backup: Path) -> None:
    file.with_name(f"{file.name}-shm").unlink()


def move(file: Path, backup: Path) -> None:
    file.rename(file.with_name("events.db.1"))


def move_folder(file: Path, backup: Path) -> None:
    file.parent.rename(file.parent.with_name("moved"))


def rotate(file: Path, backup: Path) -> None:
    move(file, backup)
    file.touch()


def copy_and_truncate(file: Path, backup: Path) -> None:
    shutil.copy(file, file.with_name("events.db.1"))
    os.truncate(file, 0)


def rename_backup_over(file: Path, backup: Path) -> None:
    backup.replace(file)


def copy_backup_over(file: Path, backup: Path) -> None:
    shutil.copyfile(backup, file)


def remove_and_copy_backup(file: Path, backup: Path) -> None:
    remove_all(file, backup)
    shutil.copyfile(backup, file)


def copy_other_store_over(file: Path, backup: Path) -> None:
    other = file.with_name("other.db")
    store = SqliteStore(str(other))
    store.put("other", BEFORE).result(5)
    store.close()
    shutil.copyfile(other, file)


def write_text_over(file: Path, backup: Path) -> None:
    file.write_text("no database " * 1000)


def retarget_link(file: Path, backup: Path) -> None:
    other = file.with_name("other.db")
    shutil.copyfile(backup, other)
    file.unlink()
    file.symlink_to(other)


CHANGES = [
    remove,
    remove_all,
    remove_log,
    remove_log_index,
    move,
    move_folder,
    rotate,
    copy_and_truncate,
    rename_backup_over,
    copy_backup_over,
    remove_and_copy_backup,
    copy_other_store_over,
    write_text_over,
    retarget_link,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def make_store(folder: Path) -> tuple[SqliteStore, Path, Path]:
    """Return a store with acknowledged impressions after a backup, the last ones only in the log, and both paths."""
    file, backup = folder / "events.db", folder.parent / "backup.db"
    store = SqliteStore(str(file))
    store.put("u", BEFORE).result(5)
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    for number in range(50):
        store.put(f"late{number}", [Impression("v" * 2000, number)]).result(5)
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.put("u", [Impression("after", 2)]).result(5)
    return store, file, backup


@pytest.mark.parametrize("change", CHANGES)
def test_acknowledges_nothing_that_a_restart_loses(folder: Path, change: Callable[[Path, Path], None]) -> None:
    store, file, backup = make_store(folder)
    change(file, backup)
    with pytest.raises(StoreUnavailable) as error:
        store.put("u", [Impression("lost", 3)]).result(5)
    assert "event store was" in str(error.value)
    for read in (store.check, lambda: store.get_recent("u", 9), lambda: store.sample_users(9)):
        with pytest.raises(StoreUnavailable):
            read()
    with pytest.raises(StoreUnavailable):
        store.delete_user("u").result(5)
    kept = file.read_bytes() if file.is_file() else b""
    store.close()
    if change not in (remove_log, remove_log_index):
        assert (file.read_bytes() if file.is_file() else b"") == kept, "the file of another program is unchanged"


@pytest.mark.parametrize("change", [rename_backup_over, copy_backup_over, remove_and_copy_backup, retarget_link])
def test_restored_backup_is_complete_after_a_restart(folder: Path, change: Callable[[Path, Path], None]) -> None:
    store, file, backup = make_store(folder)
    change(file, backup)
    with pytest.raises(StoreUnavailable):
        store.put("u", [Impression("lost", 3)]).result(5)
    store.close()
    again = SqliteStore(str(file))
    assert again.get_recent("u", 9)[1] == [Impression("before", 1, actions=[])]
    assert again.sample_users(9) == ["u"]
    assert again._reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    again.close()


@pytest.mark.parametrize("change", [move, move_folder, remove_log, remove_log_index, rotate])
def test_moved_file_contains_all_acknowledged_impressions(folder: Path, change: Callable[[Path, Path], None]) -> None:
    store, file, backup = make_store(folder)
    change(file, backup)
    with pytest.raises(StoreUnavailable):
        store.check()
    store.close()
    moved = next(
        path
        for path in (file.with_name("events.db.1"), folder.with_name("moved") / file.name, file)
        if path.exists() and path.stat().st_size
    )
    again = SqliteStore(str(moved))
    assert [impression.item for impression in again.get_recent("u", 9)[1]] == ["before", "after"]
    assert len(again.sample_users(99)) == 51
    again.close()


def test_store_is_available_again_once_its_file_is_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    store, file, _ = make_store(folder)
    aside = file.with_name("aside")
    file.rename(aside)
    with pytest.raises(StoreUnavailable):
        store.put("u", [Impression("lost", 3)]).result(5)
    aside.rename(file)
    store.put("u", [Impression("recorded", 4)]).result(5)
    assert [impression.item for impression in store.get_recent("u", 9)[1]] == ["before", "after", "recorded"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    store.close()
    again = SqliteStore(str(file))
    assert [impression.item for impression in again.get_recent("u", 9)[1]] == ["before", "after", "recorded"]
    again.close()


def test_checkpoints_of_other_processes_are_no_change(folder: Path) -> None:
    """Threads stand for processes, as in test_stores.py."""
    file = str(folder / "events.db")
    stores = [SqliteStore(file) for _ in range(3)]
    for store in stores:
        store._writer.execute("PRAGMA wal_autocheckpoint = 1")
        store._writer.execute("PRAGMA synchronous = OFF")

    def write(store: SqliteStore, name: int) -> None:
        for number in range(60):
            store.put(f"u{name}", [Impression("v" * 3000, number)]).result(10)
            store.check()
            assert len(store.get_recent(f"u{name}", 999)[1]) == number + 1

    failures: list[BaseException] = []

    def run(store: SqliteStore, name: int) -> None:
        try:
            write(store, name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(store, name)) for name, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for store in stores:
        store.close()


def test_store_closed_by_another_process_stays_available(folder: Path) -> None:
    file = folder / "events.db"
    store = SqliteStore(str(file))
    store.put("u", BEFORE).result(5)
    other = SqliteStore(str(file))
    other.put("u", [Impression("other", 2)]).result(5)
    other.close()
    store.put("u", [Impression("after", 3)]).result(5)
    assert len(store.get_recent("u", 9)[1]) == 3
    store.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["put", "delete", "checkpoint", "other", *CHANGES]), min_size=1, max_size=8))
def test_every_acknowledged_impression_survives(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    """After any changes of the files: the impressions acknowledged since then are there after a restart."""
    folder = tmp_path_factory.mktemp("steps") / "store"
    folder.mkdir()
    store, file, backup = make_store(folder)
    acknowledged: list[int] = []
    for number, step in enumerate(steps, 10):
        with suppress(StoreError, UserError, OSError):
            if step == "put":
                store.put("new", [Impression("v", number)]).result(5)
                acknowledged.append(number)
            elif step == "delete":
                store.delete_user("new").result(5)
                acknowledged = []
            elif step == "checkpoint":
                store.check()
                store._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
            elif step == "other":
                other = SqliteStore(str(file))
                other.put("other", [Impression("v", number)]).result(5)
                other.close()
            else:
                step(file, backup)
                acknowledged = []
    store.close()
    if acknowledged:
        again = SqliteStore(str(file))
        recorded = {impression.ts_ms for impression in again.get_recent("new", 99)[1]}
        assert set(acknowledged) <= recorded
        again.close()


def holds(folder: Path, text: bytes) -> bool:
    return any(text in path.read_bytes() for path in folder.glob("events.db*"))


@pytest.fixture
def busy(folder: Path) -> Iterator[tuple[SqliteStore, sqlite3.Connection]]:
    """A store, and a reader with an open transaction, like a backup."""
    store = SqliteStore(str(folder / "events.db"))
    store.put("secret", [Impression("hidden", 1)]).result(5)
    reader = sqlite3.connect(folder / "events.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM users").fetchall()
    yield store, reader
    reader.close()
    store.close()


def test_deletion_while_the_log_is_read(
    folder: Path, busy: tuple[SqliteStore, sqlite3.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reader = busy
    start = time.monotonic()
    assert store.delete_user("secret").result(5) == 1
    assert store.is_overwritten is False
    for number in range(20):
        store.put("other", [Impression("v", number)]).result(5)
    assert time.monotonic() - start < 2, "no write waits for the reader"
    assert store.get_recent("secret", 9) == (0, [])
    assert holds(folder, b"secret")
    reader.execute("ROLLBACK")
    store.put("other", [Impression("v", 99)]).result(5)
    wait_until(lambda: store.is_overwritten, 0.5)
    assert not holds(folder, b"secret")
    assert not holds(folder, b"hidden")


def test_deleted_content_is_overwritten_at_a_tick(folder: Path, busy: tuple[SqliteStore, sqlite3.Connection]) -> None:
    store, reader = busy
    assert store.delete_user("secret").result(5) == 1
    assert store.delete_user("secret").result(5) == 0
    assert not store.is_overwritten
    reader.execute("ROLLBACK")
    wait_until(lambda: store.is_overwritten, 5)
    assert not holds(folder, b"secret")


def test_deleted_content_is_overwritten_after_a_crash(
    folder: Path, busy: tuple[SqliteStore, sqlite3.Connection], tmp_path: Path
) -> None:
    store, _ = busy
    store.delete_user("secret").result(5)
    crashed = tmp_path / "crashed"
    shutil.copytree(folder, crashed)
    assert holds(crashed, b"secret")
    again = SqliteStore(str(crashed / "events.db"))
    wait_until(lambda: again.is_overwritten, 5)
    assert not holds(crashed, b"secret")
    again.close()


def test_service_reports_an_unavailable_store(folder: Path) -> None:
    with running(folder) as service:
        event = {"item": "v1", "ts_ms": 1}
        assert service.post("u", event).status_code == 200
        assert service.client.get("/readyz").status_code == 200
        file = folder / "events.db"
        file.rename(folder / "events.db.1")
        response = service.post("u", event)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
        for path in ("/readyz", "/v1/users", "/v1/users/u/history"):
            response = service.client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable"), path
        assert service.client.get("/healthz").status_code == 200
        assert service.client.delete("/v1/users/u/history").status_code == 503
        assert service.rank("u").json()["fallbacks"] == ["empty_history", "history_unavailable"]
        (folder / "events.db.1").rename(file)
        assert service.client.get("/readyz").status_code == 200
        assert service.post("u", event).status_code == 200


def test_service_reports_deletions_that_are_not_overwritten(folder: Path) -> None:
    with running(folder) as service:
        service.post("secret", {"item": "v1", "ts_ms": 1})
        with closing(sqlite3.connect(folder / "events.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM users").fetchall()
            path = "/v1/users/secret/history"
            assert service.client.delete(path).json() == {"num_deleted": 1, "overwritten": False}
            assert service.client.delete(path).json() == {"num_deleted": 0, "overwritten": False}
        assert service.client.delete(path).json() == {"num_deleted": 0, "overwritten": True}
        assert not holds(folder, b"secret")


@pytest.mark.processes
def test_worker_processes_notice_a_moved_file(tmp_path: Path) -> None:
    file = tmp_path / "e.db"
    arguments = ["--model", str(make_model(tmp_path / "model")), "--event-store", str(file), "--port", "0"]
    with (
        serve_process(*arguments, "--num-workers", "2") as (_, address),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        body = {"user": "u", "impressions": [{"item": "v1", "ts_ms": 1}]}
        assert client.post("/v1/events", json=body).status_code == 200
        ranked = client.post("/v1/rank", json={"user": "u", "candidates": ["v1"]}).json()
        assert ranked["history_length"] == 1
        file.rename(tmp_path / "moved")
        assert client.post("/v1/events", json=body).status_code == 503
        ranked = client.post("/v1/rank", json={"user": "u", "candidates": ["v1"]}).json()
        assert "history_unavailable" in ranked["fallbacks"]
