"""`a2gen plan`: exit codes, printed summary and output files."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from a2gen_rec.cli.main import main
from a2gen_rec.cli.plan import PLANNER_SETTINGS
from a2gen_rec.config import ModelConfig
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.sharding.saved_plan import SavedPlan
from tests.helpers import CONFIGS
from tests.helpers.cards import make_card, write_dataset

SCALE = str(CONFIGS / "scale" / "short_video.yaml")
TABLES = {
    "features": {
        "user_id": {"level": "user", "rows": 1000},
        "item_id": {"level": "item", "rows": 50_000, "zipf_exponent": 0.9},
    },
    "workload": {"windows_per_batch": 16, "impressions_per_batch": 800, "targets_per_batch": 100, "num_actions": 6},
}


def topology(name: str) -> str:
    return str(CONFIGS / "topologies" / f"{name}.yaml")


def exit_code(*arguments: str) -> int:
    try:
        main(["plan", *arguments])
    except SystemExit as exited:
        return int(exited.code or 0)
    return 0


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "tables.yaml"
    file.write_text(yaml.safe_dump(TABLES))
    return str(file)


def test_shipped_scale_fits_64_hosts_but_not_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--config", SCALE, "--topology", topology("h200_64x8")) == 0
    assert capsys.readouterr().out.startswith("fits on h200_64x8: 512 ranks on 64 hosts")
    assert exit_code("--config", SCALE, "--topology", topology("h200_1x8")) == 1
    output = capsys.readouterr().out
    assert output.startswith("does not fit on h200_1x8")
    assert "item_id" in output
    assert "--ranks 32" in output
    assert exit_code("--config", SCALE, "--topology", topology("h200_1x8"), "--ranks", "32") == 0


def test_writes_all_output_files(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = {kind: str(out / f"plan.{kind}") for kind in ("json", "html", "save")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", file)]
    assert exit_code("--config", config, "--topology", topology("laptop"), "--sweep", "ranks=1,4", *options) == 0
    report = json.loads(Path(files["json"]).read_text())
    assert report["fits"]
    assert [(swept["world_size"], swept["ranks_per_host"]) for swept in report["sweep"]] == [(1, 1), (4, 2)]
    saved = SavedPlan.load(files["save"])
    assert saved.world_size == 2
    assert {name: len(table.ranks) for name, table in saved.tables.items()} == {
        table["name"]: len(table["shards"]) for table in report["tables"]
    }
    HTMLParser().feed(Path(files["html"]).read_text())


def test_saves_no_plan_if_tables_do_not_fit(config: str, tmp_path: Path) -> None:
    save = tmp_path / "plan.yaml"
    small = ["--config", config, "--topology", topology("laptop"), "--sharding.ddr-gb", "0.001"]
    for existing in (False, True):
        if existing:
            save.write_text("the plan of a former command")
        assert exit_code(*small, "--save", str(save), "--json", str(tmp_path / "no.json")) == 1
        assert not save.exists()
    assert not save.exists()
    assert not json.loads((tmp_path / "no.json").read_text())["fits"]


def test_plans_a_dataset_by_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data", make_card())
    out = tmp_path / "plan.json"
    jd = ["--config", str(CONFIGS / "jd.yaml"), "--data", str(data), "--topology", topology("laptop")]
    assert exit_code(*jd, "--num-rows.item_id", "77", "--json", str(out)) == 0
    rows = {table["name"]: table["rows"] for table in json.loads(out.read_text())["tables"]}
    cardinality = EmbeddingTables.from_card(make_card(), ModelConfig()).id_rows
    assert rows == cardinality | {"item_id": 77, "action": 5, "time_bucket": 64, "gap_bucket": 64}


def test_compares_topologies_and_saved_plans(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--config", config, "--compare", topology("laptop"), topology("h100_1x8")]
    assert exit_code(*both, "--json", str(tmp_path / "both.json")) == 0
    result = json.loads((tmp_path / "both.json").read_text())
    assert (result["a"]["cluster"], result["b"]["cluster"]) == ("laptop", "h100_1x8")
    assert capsys.readouterr().out.startswith("A: fits on laptop")
    saved = []
    for kind in ("table_wise", "row_wise"):
        saved.append(str(tmp_path / f"{kind}.yaml"))
        options = ["--topology", topology("laptop"), "--sharding.sharding-types", f"[{kind}]", "--save", saved[-1]]
        assert exit_code("--config", config, *options) == 0
    two = [
        "--config",
        config,
        "--topology",
        topology("laptop"),
        "--compare",
        *saved,
        "--json",
        str(tmp_path / "2.json"),
    ]
    assert exit_code(*two) == 0
    result = json.loads((tmp_path / "2.json").read_text())
    kinds = [{table["chosen"]["sharding"] for table in result[side]["tables"]} for side in ("a", "b")]
    assert kinds == [{"table_wise"}, {"row_wise"}]
    assert exit_code("--config", SCALE, *two[2:]) == 1  # plans for other tables


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--topology is missing"),
        (["--topology", topology("laptop"), "--sweep", "ranks=2,x"], "--sweep ranks=2,x: expected ranks=8,16,32"),
        (["--topology", topology("laptop"), "--sweep", "hosts=2"], "--sweep hosts=2: expected ranks=8,16,32"),
        (["--topology", topology("laptop"), "--sweep", "ranks=2,3"], "3 ranks do not fill hosts of 2"),
        (
            ["--compare", topology("laptop"), topology("h100_1x8"), "--save", "plan.yaml"],
            "--save cannot be combined with --compare",
        ),
        (["--topology", topology("h100_1x8"), "--ranks", "12"], "12 ranks do not fill hosts of 8"),
        (["--topology", topology("laptop"), "--sharding.compute-kernels", "[fused_uvm]"], "supports only fused"),
        (["--topology", topology("laptop"), "--num-rows.nothing", "5"], "unknown table 'nothing'"),
        (["--topology", topology("laptop"), "--num-rows.item_id", "0"], "rows 0 of table 'item_id' must be at least 1"),
        (["--topology", topology("laptop"), "--num-rows.item_id", str(10**18)], "and at most 10^14"),
        (["--topology", topology("laptop"), "--ranks", "-2"], "field 'ranks': -2 must be positive"),
        (["--topology", topology("laptop"), "--model.dim", "30"], "model.dim 30"),
        (["--topology", topology("laptop"), "--surprise", "1"], "surprise"),
        (["--topology", SCALE], "unknown field 'model'"),
    ],
)
def test_rejects_invalid_settings(
    arguments: list[str], reason: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("--config", config, *arguments) == 2
    printed = capsys.readouterr()
    assert reason in printed.err
    assert printed.err.startswith("a2gen: error: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_rejects_unreadable_input(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.yaml")
    for arguments in (["--topology", missing], ["--topology", topology("laptop"), "--data", str(tmp_path)]):
        assert exit_code("--config", config, *arguments) == 1
        assert capsys.readouterr().err.startswith(f"a2gen: error: {tmp_path}")
    assert exit_code("--config", missing, "--topology", topology("laptop")) == 1


def test_training_applies_a_saved_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_dataset(tmp_path / "data", make_card()))
    model = ["--model.dim", "8", "--model.num-heads", "2", "--model.time-buckets", "8"]
    plan, run = str(tmp_path / "plan.yaml"), str(tmp_path / "run")
    assert exit_code("--data", data, "--topology", topology("laptop"), "--ranks", "1", *model, "--save", plan) == 0
    steps: list[Any] = ["--train.max-steps", "2", "--train.device", "cpu"]
    main(["train", "--data", data, "--run", run, "--plan", plan, *model, *steps])
    assert yaml.safe_load(Path(run, "config.yaml").read_text())["sharding"]["plan_file"] == plan
    text = Path(plan).read_text().replace("world_size: 1", "world_size: 2")
    Path(plan).write_text(text)
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--run", run, "--train.max-steps", "4"])
    assert "blocks, kernel and ranks do not cover the table" in capsys.readouterr().err


def test_run_opens_where_its_plan_does_not_apply(tmp_path: Path) -> None:
    data, run, out = str(write_dataset(tmp_path / "data", make_card())), str(tmp_path / "run"), tmp_path / "out.json"
    steps = ["--train.max-steps", "2", "--train.device", "cpu"]
    main(["train", "--data", data, "--run", run, "--model.dim", "8", "--model.num-heads", "2", *steps])
    for state in Path(run).glob("checkpoints/*/state.json"):
        saved = json.loads(state.read_text())
        saved["config"]["sharding"] |= {"plan_file": "gone.yaml", "compute_kernels": ["fused", "fused_uvm_caching"]}
        state.write_text(json.dumps(saved))
    main(["evaluate", "--run", run, "--split", "valid", "--device", "cpu", "--json", str(out)])
    assert json.loads(out.read_text())["targets"] > 0


def test_help_lists_the_settings_that_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for setting in PLANNER_SETTINGS:
        assert f"  --{setting.replace('_', '-')}" in text
    for setting in ("--train.", "--evaluate.", "--loss.", "--model.num-heads", "--loader.prefetch", "--model CONFIG"):
        assert setting not in text
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--train.epochs", "0"])
    assert "train.epochs 0 must be positive" in capsys.readouterr().err, "other settings are read and checked"
