"""Errors of `--config` files: the file is named if its value is at fault."""

from pathlib import Path

import pytest

from a2gen_rec.cli.main import main

TRAIN = ["train", "--run", "run", "--data", "data"]
SERVE = ["serve", "--model", "model"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == code
    return capsys.readouterr().err.removeprefix("a2gen: error: ").removesuffix("\n")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("settings.yaml")


@pytest.mark.parametrize(
    ("command", "content", "reason"),
    [
        (TRAIN, "train: {epochs: many}", "train.epochs: must be an integer, not 'many'"),
        (TRAIN, "train: {epochs: -1}", "train.epochs -1 must be positive"),
        (TRAIN, "model: {dim: 7}", "model.dim 7 must be a positive multiple of 4 and of model.num_heads 4"),
        (TRAIN, "model: {depth: 3}", "unknown setting 'model.depth'"),
        (TRAIN, "modle: {dim: 8}", "unknown setting 'modle.dim'"),
        (TRAIN, "model: 3", "model: must be a mapping of settings, not 3"),
        (TRAIN, "model:\ntrain: {}", "model: must be a mapping of settings, not None"),
        (TRAIN, "train: {forkmerge: {merge_interval_epochs: x}}", "train.forkmerge.merge_interval_epochs: must be"),
        (TRAIN, "- train", "must be a mapping of settings"),
        (TRAIN, "train: [1", "invalid YAML (line 1, column 10: expected"),
        (SERVE, "port: x", "port: must be an integer, not 'x'"),
        (SERVE, "port: -1", "serve.port -1 must be from 0 to 65535"),
        (SERVE, "prot: 1", "unknown setting 'prot'"),
        (["plan"], "features: {item: {levl: item}}", "features: unknown key 'levl'"),
        (["ensemble", "train", "--run", "run"], "lr: -1", "ensemble.lr -1.0 must be positive"),
    ],
)
def test_names_file_and_key(
    command: list[str], content: str, reason: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(content)
    for option in (["--config", str(file)], [f"--config={file}"]):
        assert error_of(capsys, *command, *option).startswith(f"{file}: {reason}")


def test_missing_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, code in ((TRAIN, 1), (SERVE, 2)):
        assert error_of(capsys, *command, "--config", str(file), code=code) == f"{file}: not found"


def test_saved_config_of_a_resumed_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: {depth: 3}")
    assert error_of(capsys, *TRAIN) == "run/config.yaml: unknown setting 'model.depth'"


@pytest.mark.parametrize(
    ("command", "content", "option", "reason"),
    [
        (TRAIN, "train: {epochs: 2}", ["--train.epochs", "-3"], "train.epochs -3 must be positive"),
        (TRAIN, "train: {epochs: 2}", ["--train.epochs=many"], "train.epochs: must be an integer, not 'many'"),
        (TRAIN, "train: {epochs: 2}", ["--model.dim", "7"], "model.dim 7 must be a positive multiple"),
        (SERVE, "port: 1", ["--port", "-5"], "serve.port -5 must be from 0 to 65535"),
    ],
)
def test_errors_of_options_do_not_name_the_file(
    command: list[str],
    content: str,
    option: list[str],
    reason: str,
    file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file.write_text(content)
    assert error_of(capsys, *command, "--config", str(file), *option).startswith(reason)


def test_names_the_file_at_fault_among_several(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("train: {epochs: 2}\nmodel: {dim: 7}")
    Path("other.yaml").write_text("train: {epochs: -1}")
    first, other = ["--config", str(file)], ["--config", "other.yaml"]
    assert error_of(capsys, *TRAIN, *other, *first).startswith(f"{file}: model.dim 7 must be")
    file.write_text("train: {epochs: many}")
    for files in ([*first, *other], [*other, *first]):
        assert error_of(capsys, *TRAIN, *files).startswith(f"{file}: train.epochs: must be an integer, not 'many'")
    file.write_text("train: {epochs: 2}")
    assert error_of(capsys, *TRAIN, *first, *other).startswith("other.yaml: train.epochs -1 must be positive")
    assert error_of(capsys, *TRAIN, *other, *first, "--train.epochs", "-3").startswith("train.epochs -3 must be")
