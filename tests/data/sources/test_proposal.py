"""Proposed specs: hand-written logs with the expected keys, public logs, and drawn tables."""

import gzip
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import yaml
from hypothesis import Phase, given
from hypothesis import strategies as st

from a2gen_rec.cli.main import main
from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.prepare.sample import sample_log
from a2gen_rec.data.sources import open_source
from a2gen_rec.data.sources.proposal import Proposal, propose_spec
from a2gen_rec.data.sources.proposal.words import words
from a2gen_rec.data.sources.spec import load_spec
from a2gen_rec.errors import DataError
from tests.helpers import SAMPLES
from tests.helpers.properties import examples
from tests.helpers.raw_logs import Content, machine_time_zone, write_files

needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="public samples not found")
START_S = 1_714_521_600
"""1 May 2024, 00:00 UTC."""
CONFIG = PrepareConfig(num_partitions=1, threads=1, memory_limit_gb=0.5)


def table(rows: int = 200, separator: str = ",", **columns: Any) -> str:
    """Return CSV with 7 users and 11 items; further columns are functions of the row."""
    columns = {
        "user_id": lambda row: f"u{row % 7}",
        "video_id": lambda row: f"v{row % 11}",
        "time": lambda row: START_S + 3000 * row,
        **columns,
    }
    lines = [separator.join(columns)]
    lines += [separator.join(str(value(row)) for value in columns.values()) for row in range(rows)]
    return "\n".join(lines) + "\n"


def timestamps(kind: pa.DataType) -> pa.Table:
    times = [datetime(2024, 5, 1) + timedelta(seconds=3000 * row) for row in range(200)]
    return pa.table(
        {
            "user": [f"u{row % 7}" for row in range(200)],
            "item": [row % 11 for row in range(200)],
            "start_time": pa.array(times, pa.timestamp("us")).cast(kind),
        }
    )


def propose(folder: Path, files: Mapping[str, Content]) -> tuple[Proposal, dict[str, Any]]:
    """Return the proposal for files, and its keys."""
    raw = write_files(folder / "raw", files)
    proposal = propose_spec(str(raw), 0.5, 1)
    (folder / "spec.yaml").write_text(proposal.text)
    return proposal, yaml.load(proposal.text, yaml.BaseLoader)


def prepared(folder: Path, raw: Path | None = None) -> Any:
    """Return the card of a dataset that is prepared with the proposed spec, without any edit."""
    spec = str(folder / "spec.yaml")
    return prepare("generic", str(raw or folder / "raw"), str(folder / "out"), CONFIG, spec)


WATCH = {"watch_s": lambda row: row % 13, "is_like": lambda row: row % 2}
USER_ITEM_TIME = {"user": "user_id", "item": "video_id", "time": "time"}
LOGS: dict[str, tuple[Mapping[str, Content], dict[str, Any]]] = {
    "impressions": (
        {
            "views.csv": table(
                watch_s=lambda row: row % 13,
                is_like=lambda row: row % 2,
                clicked=lambda row: row % 3 // 2,
                comment_after_s=lambda row: row % 9 if row % 4 == 0 else "",
                is_hate=lambda row: int(row % 50 == 0),
                duration_s=lambda row: 10 + row % 11,
                author=lambda row: f"a{row % 11 // 3}",
                country=lambda row: "DE" if row % 7 < 3 else "FR",
                network=lambda row: "wifi" if row % 5 else "4g",
            )
        },
        {
            "kind": "impressions",
            "files": "*.csv",
            "time_unit": "s",
            "duration_unit": "s",
            "columns": {**USER_ITEM_TIME, "dwell": "watch_s"},
            "actions": {
                "like": {"flag": "is_like"},
                "comment": {"offset": "comment_after_s"},
                "hate": {"flag": "is_hate"},
            },
            "labels": {"clicked": "clicked"},
            "negative_actions": ["hate"],
            "features": [
                {"name": "duration", "column": "duration_s", "level": "item", "kind": "buckets", "size": "16"},
                {"name": "author", "level": "item"},
                {"name": "country", "level": "user"},
                {"name": "network", "level": "context"},
            ],
            "duration_feature": "duration",
        },
    ),
    "events": (
        {
            "events.csv": "".join(
                ["visitor,product,happened_at,event\n"]
                + [
                    f"u{row % 7},p{row % 5},2024-05-{1 + row // 24:02d} {row % 24:02d}:{minute:02d}:00,{event}\n"
                    for row in range(240)
                    for minute, event in [(0, "view"), (1, "add_to_cart"), (2, "purchase"), (3, "leave")]
                    if (row + minute) % 3 or minute in (0, 3)
                ]
            )
        },
        {
            "kind": "events",
            "time_unit": "timestamp",
            "columns": {"user": "visitor", "item": "product", "time": "happened_at", "action": "event"},
            "open_event": "view",
            "close_event": "leave",
            "actions": {"add_to_cart": "add_to_cart", "purchase": "purchase"},
        },
    ),
    "events with durations": (
        {
            "log.csv": table(
                event=lambda row: ["show", "show", "Add to Cart"][row % 3],
                video_duration=lambda row: 20_000 + row % 11,
                dwell_ms=lambda row: row,
            )
        },
        {
            "kind": "events",
            "open_event": "show",
            "actions": {"Add_to_Cart": "Add to Cart"},
            "duration_unit": "ms",
            "duration_feature": "duration",
        },
    ),
    "codes of events": (
        {"log.csv": table(behavior_type=lambda row: [1, 1, 1, 2, 3][row % 5], category=lambda row: row % 11 // 4)},
        {
            "kind": "events",
            "open_event": "1",
            "actions": {"event_2": "2", "event_3": "3"},
            "features": [{"name": "category", "level": "item"}],
        },
    ),
    "milliseconds": (
        {"log.csv": table(play=lambda row: 900 * (row % 13), runtime=lambda row: 20_000 + row % 11)},
        {"duration_unit": "ms", "columns": {**USER_ITEM_TIME, "dwell": "play"}, "duration_feature": "duration"},
    ),
    "microseconds": (
        {"log.csv": table(time=lambda row: (START_S + 3000 * row) * 10**6)},
        {"time_unit": "us", "columns": USER_ITEM_TIME},
    ),
    "zones in text": (
        {"log.csv": table(time=lambda row: f"2024-05-{1 + row // 24:02d}T{row % 24:02d}:00:00+08:00")},
        {"time_unit": "timestamp", "utc_offset_hours": "0"},
    ),
    "slashes in dates": (
        {"log.csv": table(time=lambda row: f"2024/5/{1 + row // 24} {row % 24}:05")},
        {"time_unit": "timestamp"},
    ),
    "start among other times": (
        {
            "log.csv": table(
                time=lambda row: "",
                upload_time=lambda row: START_S - 86_400 * (1 + row % 11),
                date=lambda row: 20240501 + row // 30,
                begin_time=lambda row: START_S + 3000 * row,
                end_time=lambda row: START_S + 3000 * row + 60,
            )
        },
        {"columns": {"user": "user_id", "item": "video_id", "time": "begin_time"}, "features": []},
    ),
    "no calendar": (
        {"log.csv": table(user_id=lambda row: f"u{row // 20}", time=lambda row: row % 20 * 7)},
        {"has_calendar_time": "false", "split": {"method": "last", "valid_fraction": "0.1", "test_fraction": "0.1"}},
    ),
    "fallback column": (
        {"log.csv": table(user_id=lambda row: f"u{row % 7}" if row % 3 else "", device_id=lambda row: f"d{row % 7}")},
        {"columns": {**USER_ITEM_TIME, "user": ["user_id", "device_id"]}},
    ),
    "renamed columns": (
        {"a.csv": table(100), "b.csv": table(100).replace("user_id", "uid").replace("video_id", "item_id")},
        {"columns": {"user": ["user_id", "uid"], "item": ["item_id", "video_id"], "time": "time"}, "files": "*.csv"},
    ),
    "partitions": (
        {
            f"dt=2024-05-0{day}/country={name}/part-0.csv": table(20, user_id=lambda row, name=name: f"{name}{row % 7}")
            for day in (1, 2)
            for name in ("DE", "FR")
        },
        {
            "files": "**/*.csv",
            "partition_columns": ["country"],
            "features": [{"name": "country", "level": "user"}],
        },
    ),
    "other files": (
        {
            "data/log_1.csv": table(100),
            "data/log_2.csv": table(100, time=lambda row: START_S + 3000 * row + 1),
            "data/users.csv": "user_id,age\nu1,30\n",
            "data/videos.csv": "video_id,upload_time\nv1,2024-01-01\n",
            "LICENSE": "Permission is granted\n",
            "_SUCCESS": "",
        },
        {"files": "data/log_*.csv", "columns": USER_ITEM_TIME},
    ),
    "gzip with tabs": ({"log.gz": gzip.compress(table(separator="\t").encode())}, {"delimiter": "\t"}),
    "semicolons": ({"log.csv": table(separator=";")}, {"delimiter": ";"}),
    "bars": ({"log.txt": table(separator="|")}, {"delimiter": "|", "files": "*.txt"}),
    "double quotes": ({"log.csv": table(tag=lambda row: f'"a, ""{row % 3}"""')}, {"columns": USER_ITEM_TIME}),
    "single quotes": ({"log.csv": table(tag=lambda row: f"'a, ''{row % 3}'''")}, {"quote": "'", "escape": "'"}),
    "single quotes only": (
        {"log.csv": "'user','item','time'\n" + "".join(f"'u{x % 7}','v{x % 5}','{START_S + x}'\n" for x in range(99))},
        {"quote": "'", "columns": {"user": "user", "item": "item", "time": "time"}},
    ),
    "escapes": ({"log.csv": table(tag=lambda row: f'"a \\"{row % 3}\\", b"')}, {"escape": "\\"}),
    "no quotes": ({"log.tsv": table(separator="\t", size=lambda row: f'"{row % 3} wide')}, {"quote": ""}),
    "line ends and mark": (
        {"log.csv": ("\ufeff" + table(**WATCH)).replace("\n", "\r\n")},
        {"columns": USER_ITEM_TIME | {"dwell": "watch_s"}},
    ),
    "timestamps": ({"log.parquet": timestamps(pa.timestamp("ms"))}, {"time_unit": "timestamp"}),
    "timestamps with a zone": ({"log.parquet": timestamps(pa.timestamp("ns", "UTC"))}, {"time_unit": "timestamp"}),
    "dates": (
        {"log.parquet": timestamps(pa.date32())},
        {"columns": {"user": "user", "item": "item", "time": "start_time"}},
    ),
    "nested columns": (
        {
            "log.parquet": timestamps(pa.timestamp("ms"))
            .append_column("tags", pa.array([["a", "b"]] * 200))
            .append_column("place", pa.array([{"x": 1}] * 200))
        },
        {"features": []},
    ),
    "lists": (
        {
            "log.parquet": timestamps(pa.timestamp("ms"))
            .append_column("tags", pa.array([[f"t{row % 11}", "b"][: 1 + row % 11 % 2] for row in range(200)]))
            .append_column("scenes", pa.array([[row % 3, row % 4] for row in range(200)]))
            .append_column("embedding", pa.array([[row % 11 / 7, 0.5, -1.0] for row in range(200)]))
            .append_column("clicks", pa.array([[row % 3] for row in range(200)]))
            .append_column("weather", pa.array([[float(row), 1.0] for row in range(200)]))
            .append_column("scores", pa.array([[0.5] * (row % 3) for row in range(200)]))
        },
        {
            "features": [
                {"name": "tags", "level": "item", "min_count": "2", "multi_valued": "true"},
                {"name": "scenes", "level": "context", "min_count": "2", "multi_valued": "true"},
            ],
            "vectors": [{"name": "embedding", "width": "3"}],
        },
    ),
    "text with a delimiter": (
        {
            "log.csv": table(
                tag=lambda row: f"a|{row % 7}" if row % 5 else "b",
                keywords=lambda row: ";".join(f"word number {row + x}" for x in range(5)),
                place=lambda row: f"x|{row % 3}",
            )
        },
        {
            "features": [
                {"name": "tag", "level": "context", "multi_valued": "true", "delimiter": "|"},
                {"name": "keywords", "level": "context", "multi_valued": "true", "delimiter": ";"},
                {"name": "place", "level": "context"},
            ]
        },
    ),
    "names like YAML": (
        {"log.csv": table(**{"yes": lambda row: row % 3, "a: b": lambda row: row % 5, "#c": lambda row: row % 2 + 4})},
        {
            "features": [
                {"name": "yes", "level": "context"},
                {"name": "a__b", "column": "a: b", "level": "context"},
                {"name": "c", "column": "#c", "level": "context"},
            ]
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_proposed_spec_prepares_without_edits(name: str, tmp_path: Path) -> None:
    files, expected = LOGS[name]
    proposal, keys = propose(tmp_path, files)
    assert {key: keys.get(key) for key in expected} == expected, proposal.text
    assert proposal.missing == ()
    card = prepared(tmp_path)
    assert all(card.splits[split].targets for split in card.splits)


def test_single_file(tmp_path: Path) -> None:
    raw = write_files(tmp_path, {"log.csv": table()}) / "log.csv"
    (tmp_path / "spec.yaml").write_text(propose_spec(str(raw), 0.5, 1).text)
    assert load_spec(str(tmp_path / "spec.yaml")).name == "log"
    assert prepared(tmp_path, raw).splits["train"].targets == 160


def test_guesses_are_marked_as_guesses(tmp_path: Path) -> None:
    text = propose(tmp_path, LOGS["impressions"][0])[0].text
    lines = text.splitlines()
    for key in (
        "kind:",
        "time_unit:",
        "duration_unit:",
        "  user:",
        "  item:",
        "  time:",
        "  dwell:",
        "duration_feature:",
    ):
        (index,) = (index for index, line in enumerate(lines) if line.startswith(key))
        assert "# guess" in lines[index] or "# guess" in lines[index - 1], key
    assert "guess: time is then from 2024-05-01 00:00 to 2024-05-07 21:50 UTC" in text
    assert "guess: UTC." in text
    assert "in 100 rows" in text, "likes"


def test_timestamps_without_zone_are_noted(tmp_path: Path) -> None:
    text = propose(tmp_path, LOGS["events"][0])[0].text
    assert "happened_at has no time zone and is read as local time of this zone" in " ".join(text.split())


def test_dates_without_time_of_day_are_noted(tmp_path: Path) -> None:
    columns = {"time": lambda row: f"{8 + row % 9:02d}:30", "date": lambda row: f"2024-05-{1 + row // 9:02d}"}
    proposal, keys = propose(tmp_path, {"log.csv": table(**columns)})
    assert keys["columns"]["time"] == "date"
    assert "check: date has no time of day" in proposal.text
    assert "time: is text such as '08:30', which is not read as a time" in proposal.text


def test_times_in_an_unknown_format_are_named(tmp_path: Path) -> None:
    proposal, keys = propose(tmp_path, {"log.csv": table(time=lambda row: f"{1 + row % 28:02d}/05/2024 10:00")})
    assert (proposal.missing, keys["features"]) == (("time",), [])
    assert "time: is text such as '01/05/2024 10:00', which is not read as a time" in proposal.text


def test_outcomes_are_no_features(tmp_path: Path) -> None:
    """Of columns that vary, those whose names suggest an outcome are listed with the reason instead."""
    columns = {
        "watch_s": lambda row: row % 13,
        "watch_ratio": lambda row: row % 17 / 17,
        "profile_stay_time": lambda row: row % 5,
        "finish_rate": lambda row: row % 19 / 19,
        "is_relevant": lambda row: row % 3 // 2,
        "request_id": lambda row: f"r{row}",
        "rating": lambda row: 1 + row % 5,
    }
    proposal, keys = propose(tmp_path, {"log.csv": table(**columns)})
    assert keys["features"] == []
    assert keys["columns"]["dwell"] == "watch_s"
    unused = proposal.text[proposal.text.index("Columns that are not used") :]
    assert all(f"#   {name}: " in unused for name in columns if name != "watch_s")


def test_negative_durations_are_not_proposed_as_durations(tmp_path: Path) -> None:
    columns = {"play_ms": lambda row: row - 1, "duration_ms": lambda row: row % 11 - 1}
    _, keys = propose(tmp_path, {"log.csv": table(**columns)})
    assert "dwell" not in keys["columns"]
    assert "duration_feature" not in keys
    assert keys["features"] == [{"name": "duration_ms", "level": "item", "kind": "buckets", "size": "16"}]
    assert prepared(tmp_path).feedback is None


def test_action_times_that_the_spec_cannot_express_are_listed(tmp_path: Path) -> None:
    columns = {
        "watch_ms": lambda row: row * 10,
        "is_like": lambda row: row % 2,
        "like_time_ms": lambda row: row if row % 2 else "",
        "share_after_ms": lambda row: row if row % 9 == 0 else 0,
        "follow_time": lambda row: START_S + 3000 * row + 5 if row % 4 == 0 else "",
        "comment_after_s": lambda row: row if row % 4 == 0 else "",
    }
    proposal, keys = propose(tmp_path, {"log.csv": table(**columns)})
    assert keys["actions"] == {"like": {"flag": "is_like", "offset": "like_time_ms"}}
    assert keys["features"] == []
    for name in ("share_after_ms: is mostly 0", "follow_time: ", "comment_after_s: is in s"):
        assert f"#   {name}" in proposal.text
    prepared(tmp_path)


def test_rows_that_prepare_refuses_are_counted(tmp_path: Path) -> None:
    columns = {"user_id": lambda row: "" if row in (3, 4) else row % 7, "time": lambda row: START_S + row if row else 0}
    text = propose(tmp_path, {"log.csv": table(**columns)})[0].text
    assert "check: no user in 2 rows, which prepare refuses" in text
    assert "check: time is before 2000 in 1 row, which prepare refuses" in text


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("who,video_id,time", ("user",)),
        ("user_id,what,time", ("item",)),
        ("user_id,video_id,text", ("time",)),
        ("a,b,c", ("user", "item", "time")),
    ],
)
def test_missing_columns(
    header: str, missing: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = table(time=lambda row: f"t{row % 9}" if "time" in missing else START_S + row).split("\n", 1)[1]
    raw = write_files(tmp_path / "raw", {"log.csv": f"{header}\n{log}"})
    with pytest.raises(SystemExit) as error:
        main(["spec", "--raw", str(raw), "--out", str(tmp_path / "spec.yaml")])
    assert error.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"a2gen: error: {raw}: no column was recognized as {' and '.join(missing)}; replace TODO in "
    )
    keys = yaml.load((tmp_path / "spec.yaml").read_text(), yaml.BaseLoader)
    assert [role for role, column in keys["columns"].items() if column == "TODO"] == list(missing)
    # The columns that remain are named next to TODO; with them, the spec is valid.
    text = (tmp_path / "spec.yaml").read_text()
    names = dict(zip(("user", "item", "time"), header.split(","), strict=True))
    for role in missing:
        assert names[role] in next(line for line in text.splitlines() if line.startswith(f"  {role}: TODO"))
        text = text.replace(f"{role}: TODO", f"{role}: {names[role]}")
    (tmp_path / "spec.yaml").write_text(text)
    if "time" not in missing:
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, r"raw: no file matching \*\*/\*"),
        ({"log.csv": ""}, "log.csv: is empty"),
        ({"log.csv": "user,item,time\n"}, "raw: has no rows"),
        ({"log.csv": "1,2,1714521600\n1,3,1714521700\n"}, "log.csv, row 1: the first line looks like values"),
        ({"log.csv": "3+5+7+10+40 3+6+7+5+40\n" * 9}, "log.csv, row 1: the first line looks like values"),
        ({"log.csv": table() + "u1,v1\n"}, "log.csv, row 202: Expected Number of Columns: 3 Found: 2"),
        ({"log.csv": table().replace("u1", "\xfc").encode("latin-1")}, "log.csv, row 3: is not UTF-8"),
        ({"log.zip": b"PK\x03\x04" + bytes(20)}, "log.zip: is ZIP"),
    ],
)
def test_unreadable_logs_are_one_line(
    files: dict[str, Content], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_files(raw, files)
    with pytest.raises(SystemExit) as error:
        main(["spec", "--raw", str(raw), "--out", str(tmp_path / "spec.yaml")])
    assert error.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"a2gen: error: .*{reason}", line)
    assert not (tmp_path / "spec.yaml").exists()


def test_missing_log_and_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_files(tmp_path / "raw", {"log.csv": table()})
    (tmp_path / "spec.yaml").write_text("mine")
    for argv, reason in (
        (["--raw", str(tmp_path / "other")], f"{tmp_path}/other: not found"),
        (["--raw", str(raw), "--out", str(tmp_path / "spec.yaml")], f"{tmp_path}/spec.yaml: already exists"),
        (["--raw", str(raw), "--threads", "-1"], "threads -1 must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            main(["spec", *argv])
        assert capsys.readouterr().err == f"a2gen: error: {reason}\n"
    assert (tmp_path / "spec.yaml").read_text() == "mine"


def test_output_is_a_spec_on_standard_output_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_files(tmp_path / "my log", {"log.csv": table()})
    main(["spec", "--raw", str(raw)])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["kind"] == "impressions"
    assert max(map(len, text.splitlines())) <= 120 + len(str(raw))
    main(["spec", "--raw", str(raw), "--out", str(tmp_path / "spec.yaml")])
    assert (tmp_path / "spec.yaml").read_text() == text
    assert f"--raw '{raw}' --spec {tmp_path}/spec.yaml --sample 5" in capsys.readouterr().out


def test_proposal_does_not_depend_on_the_machine(tmp_path: Path) -> None:
    texts = set()
    for zone, threads in (("UTC", 1), ("Asia/Shanghai", 2)):
        with machine_time_zone(zone):
            raw = write_files(tmp_path / "raw", LOGS["impressions"][0])
            texts.add(propose_spec(str(raw), 0.5, threads).text)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user_id", ["user", "id"]),
        ("userId", ["user", "id"]),
        ("USERID", ["user", "id"]),
        ("videoid", ["video", "id"]),
        ("playTimeMs", ["play", "time", "ms"]),
        ("is-like", ["is", "like"]),
        ("valid", ["valid"]),
    ],
)
def test_words(name: str, expected: list[str]) -> None:
    assert words(name) == expected


NAMES = st.sampled_from(
    [
        "user_id",
        "item",
        "ts",
        "event",
        "dwell_ms",
        "duration",
        "is_like",
        "like_at",
        "click",
        "Click",
        "action",
        "x y",
        "é",
    ]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1, max_size=6)
CELLS = st.sampled_from(
    [
        "",
        "0",
        "1",
        "7",
        "-3",
        "2.5",
        "1714521600",
        "1714521600123",
        "2024-05-01 10:00",
        "nan",
        "inf",
        "view",
        "like",
        "é",
    ]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=5)


@examples(12, thorough=100, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_every_proposal_is_a_valid_spec_of_the_log(data: st.DataObject) -> None:
    names = data.draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    rows = data.draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), min_size=1, max_size=12))
    log = pa.table({name: [row[index] for row in rows] for index, name in enumerate(names)})
    with tempfile.TemporaryDirectory() as folder:
        raw = write_files(Path(folder) / "raw", {"log.parquet": log})
        proposal = propose_spec(str(raw), 0.5, 1)
        text = proposal.text.replace(
            ": TODO", f": {yaml.safe_dump([names[0]], default_flow_style=True, width=999)[1:-2]}"
        )
        (Path(folder) / "spec.yaml").write_text(text)
        assert open_source("generic", str(raw), str(Path(folder) / "spec.yaml")).describe().name == "raw"


# --- public logs ------------------------------------------------------------------------------------------------

LOG_COLUMNS = "user_id, item_id, ts_ms, dwell_s, drop_reason"


def rows_of(source: str, raw: Path, columns: str, spec: Path | None = None) -> list[tuple]:
    with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as connection:
        relation = open_source(source, str(raw), str(spec) if spec else None).impressions(connection)
        query = f"SELECT {columns} FROM ({relation}) ORDER BY ALL"
        return [tuple(map(str, row)) for row in connection.sql(query).fetchall()]


def public_spec(folder: Path, raw: Path) -> Path:
    (folder / "spec.yaml").write_text(propose_spec(str(raw), 0.5, 1).text)
    return folder / "spec.yaml"


def edit(spec: Path, key: str, value: str) -> None:
    """Replace the value of one line."""
    lines = spec.read_text().splitlines()
    (index,) = (index for index, line in enumerate(lines) if line.startswith(f"{key}:"))
    spec.write_text("\n".join([*lines[:index], f"{key}: {value}", *lines[index + 1 :]]))


@needs_samples
def test_kuairand(tmp_path: Path) -> None:
    """One edit, the time zone; the log's own columns then equal those of the built-in source."""
    raw = SAMPLES / "KuaiRand-Pure"
    spec = public_spec(tmp_path, raw)
    assert prepared(tmp_path, raw).dropped_rows == {"duplicate": 4739}
    edit(spec, "utc_offset_hours", "8")
    actions = ("profile_enter", "like", "follow", "comment", "forward", "hate")
    columns = f"{LOG_COLUMNS}, {', '.join(f'at_{name}' for name in actions)}, label_click, label_long_view, tab"
    assert rows_of("generic", raw, columns, spec) == rows_of("kuairand", raw, columns)


@needs_samples
def test_rec_tmall(tmp_path: Path) -> None:
    """One edit, the time zone; the impressions then equal those of the built-in source."""
    raw = SAMPLES / "rec-tmall"
    spec = public_spec(tmp_path, raw)
    assert prepared(tmp_path, raw).dropped_rows["cart with no open impression"] == 9
    edit(spec, "utc_offset_hours", "8")
    columns = f"{LOG_COLUMNS}, at_cart, at_collect, at_alipay"
    assert rows_of("generic", raw, columns, spec) == rows_of("rec_tmall", raw, columns)


@needs_samples
def test_jd(tmp_path: Path) -> None:
    """The log has no columns: the error names the built-in source. As a table of events, it needs no edit."""
    raw = SAMPLES / "jd-micro-behaviors"
    with pytest.raises(DataError, match=r"JD-Applicances, row 1: the first line looks like values.*jd"):
        propose_spec(str(raw))
    lines = ["session,sku,behavior,category,start_s"]
    names = {6: "comments", 7: "specification", 8: "page_bottom", 9: "cart", 10: "order"}
    for session, line in enumerate((raw / "JD-Applicances").read_text().splitlines()):
        start = 0
        for token in line.split():
            sku, behavior, category, interval, _ = map(int, token.split("+"))
            lines.append(f"{session},{sku},{names.get(behavior, 'view')},{category},{start}")
            start += interval
    proposal, keys = propose(tmp_path, {"events.csv": "\n".join(lines) + "\n"})
    assert (keys["open_event"], keys["has_calendar_time"]) == ("view", "false"), proposal.text
    assert keys["columns"] == {"user": "session", "item": "sku", "time": "start_s", "action": "behavior"}
    assert set(keys["actions"].values()) == set(names.values())
    sample = sample_log("generic", str(tmp_path / "raw"), CONFIG, 1, str(tmp_path / "spec.yaml"))
    assert sample.kept > 10_000
    assert prepared(tmp_path).splits["test"].targets > 1000
