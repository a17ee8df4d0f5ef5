"""``a2gen prepare --sample``: impressions as they are read, with the counts of ``prepare``."""

import io
import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from a2gen_rec.cli.main import main
from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.prepare.sample import sample_log
from a2gen_rec.errors import ConfigError
from a2gen_rec.reporting.console.sample import sample_tables
from tests.helpers.raw_logs import write_files

CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)
SPEC = {
    "kind": "impressions",
    "time_unit": "timestamp",
    "time_zone": "Asia/Shanghai",
    "duration_unit": "ms",
    "columns": {"user": ["user", "device"], "item": "item", "time": "at", "dwell": "watched"},
    "actions": {"like": {"offset": "like_after"}, "follow": {"flag": "followed"}},
    "labels": {"click": "clicked"},
    "features": [
        {"name": "author", "level": "item"},
        {"name": "length", "level": "item", "kind": "buckets", "size": 4},
        {"name": "speed", "level": "context", "kind": "buckets", "size": 4},
    ],
    "duration_feature": "length",
}

LOG = """user,device,item,at,watched,like_after,followed,clicked,author,length,speed
,d9,v2,2024-05-01 08:00:01.250,,,0,,[red],35000,1.5
ann,d1,v1,2024-05-01 08:00:00,12500,4000,1,1,cats,20000,
ann,d1,v1,2024-05-01 08:00:00,12500,4000,1,1,cats,20000,
bob,d2,v3,2024-05-02 08:00:00,1000,,0,0,,20000,1
"""
EVENTS = """visitor,product,happened_at,event
eva,p1,1714521600,view
eva,p1,1714521620,cart
eva,p1,1714521640,leave
eva,p2,1714521700,cart
"""
EVENTS_SPEC = {
    "kind": "events",
    "time_unit": "s",
    "columns": {"user": "visitor", "item": "product", "time": "happened_at", "action": "event"},
    "open_event": "view",
    "close_event": "leave",
    "actions": {"cart": "cart"},
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    return write_files(tmp_path / "raw", {"log.csv": LOG})


def shown(log: Path, number: int, width: int = 100) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width)
    for table in sample_tables(sample_log("generic", str(log), CONFIG, number, str(log.parent / "spec.yaml"))):
        console.print(table)
    return output.getvalue()


def test_impressions_as_they_were_read(log: Path) -> None:
    sample = sample_log("generic", str(log), CONFIG, 2, str(log.parent / "spec.yaml"))
    assert (sample.kept, sample.dropped) == (3, {"duplicate": 1})
    first, second = sample.impressions
    assert (first["user_id"], first["item_id"], first["ts_ms"]) == ("ann", "v1", 1_714_521_600_000)
    assert (first["dwell_s"], first["length"], first["at_like"]) == (12.5, 20.0, 4.0)
    assert math.isnan(first["at_follow"])
    assert (first["label_click"], first["author"]) == (1.0, "cats")
    assert (second["user_id"], second["ts_ms"], second["label_click"]) == ("d9", 1_714_521_601_250, None)
    assert second["hour_of_day"] == "8"


def test_tables(log: Path) -> None:
    lines = [" ".join(line.split()) for line in shown(log, 5).splitlines()]
    for line in (
        "read 4",
        "dropped: duplicate 1",
        "kept as impressions 3",
        "the first 3 impressions in the order of time",
        "1 ann v1 2024-05-01 00:00:00 12.5 s 20 s like@4, follow@? click=1",
        "2 d9 v2 2024-05-01 00:00:01.250 – 35 s",
        "3 bob v3 2024-05-02 00:00:00 1 s 20 s click=0",
        "time zone of the log: Asia/Shanghai",
        "1 author=cats · speed=– · hour_of_day=8 · day_of_week=2",
        "2 author=[red] · speed=1.5 · hour_of_day=8 · day_of_week=2",
    ):
        assert line in lines, f"{line}\n\n" + "\n".join(lines)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_the_terminal(log: Path, width: int) -> None:
    text = (log / "log.csv").read_text()
    (log / "log.csv").write_text(text.replace("cats", "cats" * 40).replace("ann", "ann-" + "0123456789abcdef" * 2))
    assert max(map(len, shown(log, 5, width).splitlines())) <= width


def test_events(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(EVENTS_SPEC))
    raw = write_files(tmp_path / "raw", {"events.csv": EVENTS})
    sample = sample_log("generic", str(raw), CONFIG, 5, str(tmp_path / "spec.yaml"))
    assert (sample.kept, sample.dropped) == (1, {"cart with no open impression": 1})
    (row,) = sample.impressions
    assert (row["ts_ms"], row["dwell_s"], row["at_cart"]) == (1_714_521_600_000, 40.0, 20.0)
    assert "time zone of the log: UTC" in shown(raw, 5)


def test_counts_are_those_of_prepare(tmp_path: Path) -> None:
    rows = "".join(f"u{row % 3},,v{row % 4},2024-05-{1 + row % 9:02d} 08:00:00,,,0,,a,1,1\n" for row in range(80))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    raw = write_files(tmp_path / "raw", {"log.csv": LOG.split("\n", 1)[0] + "\n" + rows})
    sample = sample_log("generic", str(raw), CONFIG, 1, str(tmp_path / "spec.yaml"))
    card = prepare("generic", str(raw), str(tmp_path / "out"), CONFIG, str(tmp_path / "spec.yaml"))
    assert sample.dropped == card.dropped_rows != {}
    assert sample.kept == sum(split.targets for split in card.splits.values())


def test_command_writes_nothing(log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    temporary = log.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(log.parent.rglob("*"))
    main(["prepare", "generic", "--raw", str(log), "--spec", str(log.parent / "spec.yaml"), "--sample", "2"])
    assert "like@4" in capsys.readouterr().out
    assert sorted(log.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--sample", "2", "--out", "out"], "--sample writes nothing; remove --out"),
        (["--sample", "-2"], "sample -2 must be at least 1"),
        ([], "required, but missing: --out"),
    ],
)
def test_invalid_options(options: list[str], reason: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["prepare", "generic", "--raw", str(log), "--spec", str(log.parent / "spec.yaml"), *options])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"a2gen: error: {reason}\n"


def test_invalid_rows_are_reported(log: Path) -> None:
    (log / "log.csv").write_text(LOG.replace("2024-05-02 08:00:00", "soon"))
    with pytest.raises(Exception, match=r"log.csv, row 5, field 'at': 'soon' is not a time in timestamp"):
        sample_log("generic", str(log), CONFIG, 2, str(log.parent / "spec.yaml"))


def test_rejects_no_impressions() -> None:
    with pytest.raises(ConfigError, match="sample 0 must be at least 1"):
        sample_log("generic", "raw", CONFIG, 0)
