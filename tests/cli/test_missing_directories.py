"""Missing directories of runs, datasets and models: one line, and nothing is written."""

from pathlib import Path

import pytest

from a2gen_rec.cli.main import main
from tests.helpers.cards import make_card, write_dataset


@pytest.mark.parametrize(
    "command",
    [
        "train --run run --data missing",
        "evaluate --run missing",
        "export --run missing --out out",
        "rank --run missing --user 1",
        "rank --model missing --user 1 --candidates items",
        "ensemble train --run missing",
        "serve --model missing --port 0",
        "backfill simulated --raw items --model missing --event-store events.db",
        "plan --data missing --topology topology.yaml",
        "report dataset missing",
        "report experiment missing",
    ],
)
def test_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("items").write_text("1\n")
    with pytest.raises(SystemExit) as exit_info:
        main(command.split())
    assert exit_info.value.code == 1
    error = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert error == "a2gen: error: missing: directory not found\n"
    assert [path.name for path in tmp_path.iterdir()] == ["items"]


@pytest.mark.parametrize("command", ["evaluate --run data", "serve --model data --port 0", "report experiment data"])
def test_directory_of_another_kind(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_card(), windows=2)
    with pytest.raises(SystemExit):
        main(command.split())
    error = capsys.readouterr().err
    assert "not found" not in error.replace("no exported model found", "").replace("no results.json found", "")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_file_is_not_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit):
        main(["evaluate", "--run", str(file)])
    assert capsys.readouterr().err == f"a2gen: error: {file}: is a file, not a directory\n"
