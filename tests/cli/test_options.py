"""Spelling of options, subcommands, and the text of every setting in the help of its command."""

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from a2gen_rec import __version__
from a2gen_rec import config as config_package
from a2gen_rec.cli import main as cli
from a2gen_rec.cli.main import COMMANDS, GROUPS, main
from a2gen_rec.cli.options import normalize_option_names
from a2gen_rec.config import (
    BacktestConfig,
    Config,
    EnsembleConfig,
    EvaluateConfig,
    ForkMergeConfig,
    PlannerFeature,
    PrepareConfig,
    ServeConfig,
    SimulateConfig,
    WorkloadConfig,
)

PARSERS = cli._parsers()[1]
TRAIN_SECTIONS = {field.name: field.default_factory for field in fields(Config)}


def settings_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the settings that a command prints with ``--print-config``."""
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--print-config"])
    assert not ended.value.code
    return capsys.readouterr().out


def help_text(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def field_texts(config_class: type) -> dict[str, str]:
    """Return the string below each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        assert isinstance(statement.target, ast.Name)
        if isinstance(following.value, ast.Constant):
            texts[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return texts


def without_spaces(text: str) -> str:
    """Remove line breaks and quotes, which help places differently."""
    return re.sub(r"[\s`]+", "", text)


@pytest.mark.parametrize(
    ("command", "hyphens", "underscores"),
    [
        (
            ["train", "--run", "r-u_n"],
            ["--loader.max-impressions-per-batch", "7", "--train.forkmerge.merge-interval-epochs=2"],
            ["--loader.max_impressions_per_batch", "7", "--train.forkmerge.merge_interval_epochs=2"],
        ),
        (
            ["train", "--run", "r-u_n"],
            ["--loss.objective-weights.effective-view", "0.5", "--sharding.plan-file=a-b_c"],
            ["--loss.objective_weights.effective-view", "0.5", "--sharding.plan_file=a-b_c"],
        ),
        (
            ["serve", "--model", "m-o_d"],
            ["--event-store", "e-v_e", "--num-workers=2", "--api-key-file", "k-e_y"],
            ["--event_store", "e-v_e", "--num_workers=2", "--api_key_file", "k-e_y"],
        ),
        (
            ["ensemble", "train", "--run", "r"],
            ["--behavior-weights.like", "10", "--hidden-dims", "[4, 2]", "--session-gap-s=3"],
            ["--behavior_weights.like", "10", "--hidden_dims", "[4, 2]", "--session_gap_s=3"],
        ),
        (
            ["plan"],
            [
                "--num-rows.my-table",
                "5",
                "--features.my-feature.zipf-exponent",
                "1",
                "--features.my-feature.level=item",
                "--features.my-feature.rows=3",
            ],
            [
                "--num_rows.my-table",
                "5",
                "--features.my-feature.zipf_exponent",
                "1",
                "--features.my-feature.level=item",
                "--features.my-feature.rows=3",
            ],
        ),
    ],
)
def test_hyphens_and_underscores_are_equivalent(
    command: list[str], hyphens: list[str], underscores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(capsys, *command, *hyphens)
    assert settings == settings_of(capsys, *command, *underscores)
    for value in ("effective-view", "a-b_c", "e-v_e", "k-e_y", "my-table", "my-feature"):
        if any(value in word for word in hyphens):
            assert value in settings, "values and keys of mappings stay unchanged"


def test_only_names_of_known_options_are_normalized() -> None:
    words = [
        "--num-rows.a-b",
        "--a-value",
        "-2-d",
        "x--y-z",
        "--unknown-option",
        "--max-history=--a-b",
        "--",
        "--sort-by",
    ]
    expected = ["--num_rows.a-b", "--a-value", "-2-d", "x--y-z", "--unknown-option", "--max-history=--a-b"]
    assert normalize_option_names(words, PARSERS["plan"]) == [*expected, "--", "--sort-by"]
    assert normalize_option_names(["--max-history=--a-b"], PARSERS["prepare"]) == ["--max_history=--a-b"]


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPS])
def test_help_shows_no_underscore_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, command)
    assert "--help" in text
    assert re.findall(r"(?<![\w.])--[\w.-]*_[\w.-]*", text) == []


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPS])
def test_help_is_narrow_and_without_redundant_details(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(capsys, command)
    assert re.search(rf"^usage: a2gen {command}\s", text)
    assert [line for line in text.splitlines() if len(line) > 100 and "[ITEM,...]" not in line] == []
    for redundant in ("(type: Literal", "default: )", "default: null", "()", "``", "[options]"):
        assert redundant not in text


def test_main_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "")
    assert re.findall(r"^  ([a-z]+) ", text, re.MULTILINE) == list(dict.fromkeys(name.split()[0] for name in COMMANDS))


def test_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"a2gen {__version__}\n"


CONFIGS_OF_COMMANDS = [
    *(("train", section) for section in TRAIN_SECTIONS.values()),
    ("train", ForkMergeConfig),
    ("evaluate", EvaluateConfig),
    ("ensemble train", EnsembleConfig),
    ("prepare", PrepareConfig),
    ("serve", ServeConfig),
    ("simulate", SimulateConfig),
    ("plan", WorkloadConfig),
    ("backtest", BacktestConfig),
]


@pytest.mark.parametrize(("command", "config_class"), CONFIGS_OF_COMMANDS)
def test_help_shows_the_text_of_every_field(
    command: str, config_class: type, capsys: pytest.CaptureFixture[str]
) -> None:
    text = without_spaces(help_text(capsys, command))
    for name, field_text in field_texts(config_class).items():
        if config_class is TRAIN_SECTIONS["train"] and name == "forkmerge":
            continue  # a section: help shows the text of its class
        assert without_spaces(field_text) in text, name


def test_every_field_of_every_config_has_a_text() -> None:
    classes = [value for value in vars(config_package).values() if is_dataclass(value)]
    assert len(classes) == len(config_package.__all__)
    for config_class in classes:
        texts = field_texts(config_class)
        assert texts.keys() == {field.name for field in fields(config_class)}, config_class
        assert all(text.endswith(".") or text.endswith("]") for text in texts.values()), config_class
    tested = {config_class for _, config_class in CONFIGS_OF_COMMANDS}
    assert set(classes) - tested == {Config, PlannerFeature}, "sections of train, and values of `plan --features`"


def test_help_of_plan_names_the_fields_of_a_feature(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "plan")
    assert all(field.name in text for field in fields(PlannerFeature))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["report"], "report requires a command; choose one of experiment, dataset"),
        (["report", "nothing"], "unknown command 'nothing'; choose one of experiment, dataset"),
        (["ensemble"], "ensemble requires a command"),
        (["train-ensemble"], "unknown command 'train-ensemble'"),
        (["rank", "--user", "u"], "exactly one of --run and --model is required"),
        (["rank", "--user", "u", "--run", "r", "--by", "watch"], "--by"),
        (["train", "--run", "r", "--model.num-headz", "2"], "num-headz 2; did you mean --model.num-heads?"),
        (["train", "--run", "r", "--train.epoch", "2"], "--train.epoch 2; did you mean --train.epochs?"),
        (["train", "--run", "r", "--train.epochs", "two"], "train.epochs: must be an integer, not 'two'"),
        (["evaluate", "--run", "r", "--split", "all"], "split: unknown value 'all'; choose one of train, valid, test"),
        (["export"], "required, but missing: --run, --out"),
        (["ensemble", "train"], "required, but missing: --run"),
        (["prepare", "--raw", "r", "--out", "o"], "required, but missing: source"),
        ([], "a2gen requires a command; choose one of simulate, spec, prepare"),
    ],
)
def test_invalid_commands_exit_with_2(argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("a2gen: error: ")
    assert error.count("\n") == 1
    assert reason in error


def test_experiment_reports_missing_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "experiment", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"a2gen: error: {tmp_path}")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_config_files_are_merged(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    (tmp_path / "a.yaml").write_text("model: {dim: 24}\nloss: {objective_weights: {glance: 2, effective: 1}}\n")
    (tmp_path / "b.yaml").write_text("model: {num_heads: 2}\nloss: {objective_weights: {effective: 3, long_view: 4}}\n")
    files = [word for name in ("a.yaml", "b.yaml") for word in ("--config", str(tmp_path / name))]
    run = ["--run", str(tmp_path / "run")] if command == "train" else []
    settings = yaml.safe_load(settings_of(capsys, command, *files, *run, "--loss.objective-weights.glance", "5"))
    assert (settings["model"]["dim"], settings["model"]["num_heads"]) == (24, 2)
    assert settings["loss"]["objective_weights"] == {"glance": 5, "effective": 3, "long_view": 4}


def test_weights_of_behaviors_are_merged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("behavior_weights: {like: 2, follow: 1}\ntop_k: 7\n")
    (tmp_path / "b.yaml").write_text("behavior_weights: {follow: 3}\n")
    files = [word for name in ("a.yaml", "b.yaml") for word in ("--config", str(tmp_path / name))]
    settings = yaml.safe_load(settings_of(capsys, "ensemble", "train", "--run", "run", *files))
    assert (settings["behavior_weights"], settings["top_k"]) == ({"like": 2, "follow": 3}, 7)
