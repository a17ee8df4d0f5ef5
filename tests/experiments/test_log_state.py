"""State of a raw log: changes of path, files and spec, and datasets of an experiment bound to it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from a2gen_rec.experiments.log_state import differing, read_log_state
from a2gen_rec.experiments.runner import Experiment
from tests.experiments.test_runner import CARD, SUITE, TINY, FakeCommands, run_experiment, write_suite
from tests.helpers.cards import write_dataset


class PreparingCommands(FakeCommands):
    """Also fakes ``a2gen prepare``: the dataset depends on the content of the log's files and of the spec."""

    def __call__(self, arguments: list[str], log: str) -> int:
        if arguments[0] != "prepare":
            return super().__call__(arguments, log)
        options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        self.calls.append(("prepare", options["--raw"]))
        files = [*sorted(Path(options["--raw"]).rglob("*.csv")), Path(options["--spec"])]
        seed = sum(b"".join(file.read_bytes() for file in files))
        write_dataset(Path(options["--out"]), CARD, windows=12, files=1, seed=seed)
        return 0


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two equal logs in ``first/log`` and ``second/log``, a link ``linked`` to the first, and a spec."""
    folder = tmp_path / "first" / "log"
    (folder / "day=1").mkdir(parents=True)
    for name in ("a.csv", "day=1/b.csv"):
        (folder / name).write_text("user,item\n1,2\n")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "linked").symlink_to("first")
    (tmp_path / "spec.yaml").write_text("kind: impressions\n")
    return tmp_path


def run(logs: Path, raw: str = "first") -> tuple[dict[str, Any], PreparingCommands]:
    dataset = {
        "source": "generic",
        "raw": "log",
        "spec": str(logs / "spec.yaml"),
        "settings": TINY | {"optim.dense_lr": 0.5},
    }
    content = {name: SUITE[name] for name in ("models", "seeds")} | {"datasets": {"one": dataset}}
    commands = PreparingCommands()
    return run_experiment(write_suite(logs, content), logs, logs / raw, commands)[0], commands


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "size": (lambda logs: (logs / "first/log/a.csv").write_text("user,item\n1,23\n"), "files a.csv"),
    "time": (lambda logs: touch(logs / "first/log/day=1/b.csv"), "files day=1/b.csv"),
    "new file": (lambda logs: (logs / "first/log/c.csv").write_text(""), "files c.csv"),
    "removed file": (lambda logs: (logs / "first/log/a.csv").unlink(), "files a.csv"),
    "renamed file": (lambda logs: (logs / "first/log/a.csv").rename(logs / "first/log/d.csv"), "files a.csv"),
    "spec": (lambda logs: (logs / "spec.yaml").write_text("kind: events\n"), "spec_digest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rejects_a_changed_log_or_spec(logs: Path, change: str) -> None:
    before, _ = run(logs)
    assert len(before["runs"]) == 4
    apply, difference = CHANGES[change]
    apply(logs)
    results, commands = run(logs)
    (failed,) = results["failed"]
    assert f"was prepared with other settings (see {logs}/out/data/one.json; {difference})" in failed["error"]
    assert results["runs"] == []
    assert commands.calls == []


def test_rejects_another_raw_directory(logs: Path) -> None:
    run(logs)
    results, commands = run(logs, "second")
    assert "one.json; raw)" in results["failed"][0]["error"]
    assert results["runs"] == commands.calls == []


def test_rejects_a_link_that_leads_elsewhere(logs: Path) -> None:
    assert not run(logs, "linked")[0]["failed"]
    assert not run(logs, "first")[0]["failed"], "the same log under its own path"
    (logs / "linked").unlink()
    (logs / "linked").symlink_to("second")
    assert "one.json; raw)" in run(logs, "linked")[0]["failed"][0]["error"]


def test_prepares_again_when_the_dataset_was_removed(logs: Path) -> None:
    """Equal data keep their runs, other data get their own."""
    before, _ = run(logs)

    def remove_dataset() -> None:
        shutil.rmtree(logs / "out/data/one")
        (logs / "out/data/one.json").unlink()

    touch(logs / "first/log/a.csv")
    remove_dataset()
    same, commands = run(logs)
    assert [name for name, _ in commands.calls] == ["prepare"]
    assert same["runs"] == before["runs"]
    (logs / "first/log/a.csv").write_text("user,item\n1,3\n")
    remove_dataset()
    other, commands = run(logs)
    assert (commands.count("train"), commands.count("evaluate")) == (4, 4)
    assert {row["folder"] for row in other["runs"]}.isdisjoint(row["folder"] for row in before["runs"])


def test_a_dataset_outlives_its_log(logs: Path) -> None:
    before, _ = run(logs)
    shutil.rmtree(logs / "first" / "log")
    after, commands = run(logs)
    assert commands.calls == []
    assert after["runs"] == before["runs"]


def test_damaged_settings_are_one_line(logs: Path) -> None:
    run(logs)
    for text in ("{", "[]", "3"):
        (logs / "out/data/one.json").write_text(text)
        (failed,) = run(logs)[0]["failed"]
        assert f"{logs}/out/data/one.json: not the settings of a dataset" in failed["error"]


def test_a_dataset_without_settings_is_not_reused(logs: Path) -> None:
    run(logs)
    (logs / "out/data/one.json").unlink()
    results, commands = run(logs)
    (failed,) = results["failed"]
    assert f"{logs}/out/data/one: {logs}/out/data/one.json is missing" in failed["error"]
    assert commands.calls == []


def test_other_simulated_logs_are_not_reused(tmp_path: Path) -> None:
    """Removing the dataset and its settings suffices; the log of the earlier settings is left alone."""
    raws = []

    def commands(arguments: list[str], log: str) -> int:
        if arguments[0] == "simulate":
            Path(arguments[arguments.index("--out") + 1]).mkdir(parents=True)
            return 0
        if arguments[0] == "prepare":
            raws.append(arguments[arguments.index("--raw") + 1])
            write_dataset(Path(arguments[arguments.index("--out") + 1]), CARD, windows=12, files=1)
            return 0
        return FakeCommands()(arguments, log)

    for users in (30, 31):
        content = {name: SUITE[name] for name in ("models", "seeds")}
        content |= {"datasets": {"made": {"simulate": {"users": users}, "settings": TINY | {"optim.dense_lr": 0.5}}}}
        results = Experiment(
            write_suite(tmp_path, content),
            str(tmp_path / "out"),
            run_command=commands,  # type: ignore[arg-type]
        ).run()
        assert not results["failed"]
        shutil.rmtree(tmp_path / "out/data/made")
        (tmp_path / "out/data/made.json").unlink()
    assert len(set(raws)) == 2


def test_files_of_the_experiment_are_not_part_of_the_log(logs: Path) -> None:
    """An output directory inside the log, and a link to a parent."""
    out = logs / "first" / "log" / "out"
    out.mkdir()
    (logs / "first/log/loop").symlink_to(".")
    before = read_log_state(str(logs / "first/log"), "", str(out))
    (out / "record.json").write_text("{}")
    assert read_log_state(str(logs / "first/log"), "", str(out)) == before
    assert set(before["files"]) == {"a.csv", "day=1/b.csv"}
    assert json.loads(json.dumps(before)) == before


def test_state_of_one_file(logs: Path) -> None:
    file = logs / "first/log/a.csv"
    before = read_log_state(str(file), "", "")
    assert before["raw"] == str(file)
    touch(file)
    assert differing(before, read_log_state(str(file), "", "")) == ["files a.csv"]
