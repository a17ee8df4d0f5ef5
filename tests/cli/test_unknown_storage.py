"""Paths of a storage that nobody serves: one line, and no local directory of that name."""

from pathlib import Path

import pytest

from a2gen_rec.cli.main import main
from tests.helpers import CONFIGS

REMOTE = "s3://bucket/folder"
COMMANDS = {
    "simulate --out": ["simulate", "--out", REMOTE, "--users", "10"],
    "spec --raw": ["spec", "--raw", REMOTE],
    "spec --out": ["spec", "--raw", "log.csv", "--out", REMOTE],
    "prepare --raw": ["prepare", "kuairand", "--raw", REMOTE, "--out", "data"],
    "prepare --out": ["prepare", "kuairand", "--raw", "log.csv", "--out", REMOTE],
    "prepare --base": ["prepare", "kuairand", "--raw", "log.csv", "--out", "data", "--base", REMOTE],
    "train --data": ["train", "--data", REMOTE, "--run", "run"],
    "train --run": ["train", "--data", "data", "--run", REMOTE],
    "train --init-from": ["train", "--data", "data", "--run", "run", "--init-from", REMOTE],
    "train --config": ["train", "--config", REMOTE, "--data", "data", "--run", "run"],
    "ensemble train --run": ["ensemble", "train", "--run", REMOTE],
    "evaluate --run": ["evaluate", "--run", REMOTE],
    "evaluate --json": ["evaluate", "--run", "run", "--json", f"{REMOTE}/x.json"],
    "export --run": ["export", "--run", REMOTE, "--out", "model"],
    "export --out": ["export", "--run", "run", "--out", REMOTE],
    "rank --run": ["rank", "--run", REMOTE, "--user", "1"],
    "rank --model": ["rank", "--model", REMOTE, "--user", "1", "--candidates", "log.csv"],
    "serve --model": ["serve", "--model", REMOTE],
    "backfill --raw": ["backfill", "kuairand", "--raw", REMOTE, "--model", REMOTE],
    "experiment --suite": ["experiment", "--suite", REMOTE, "--out", "out"],
    "experiment --out": ["experiment", "--suite", str(CONFIGS / "experiments" / "quick.yaml"), "--out", REMOTE],
    "backtest --raw": [
        *("backtest", "--source", "kuairand", "--raw", REMOTE, "--out", "out"),
        *("--from", "2022-05-01", "--to", "2022-05-02"),
    ],
    "report experiment": ["report", "experiment", REMOTE],
    "report dataset": ["report", "dataset", REMOTE],
    "plan --data": ["plan", "--data", REMOTE, "--topology", str(CONFIGS / "topologies" / "laptop.yaml")],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_the_storage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("user,item\n")
    with pytest.raises(SystemExit) as exit_:
        main(COMMANDS[name])
    assert exit_.value.code in (1, 2)
    output = capsys.readouterr()
    assert "no storage is registered for s3://" in output.err
    assert len(output.err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]
