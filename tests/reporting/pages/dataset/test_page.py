"""Dataset reports: complete, self-contained, and explicit about missing data."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import SPLITS, Feature
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.reporting.pages.dataset.page import MARKDOWN, PAGE, STATISTICS, write_dataset_report
from tests.helpers.cards import make_card, write_dataset


class Page(HTMLParser):
    """Tags and text of a page. Tags must be closed in order, and ids must be unique."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def full_card() -> DatasetCard:
    card = make_card()
    return replace(card, features=[*card.features, Feature("length", "item", "buckets", 4, [10.0, 20.0])])


def report(folder: Path, card: DatasetCard, windows: int = 30) -> tuple[Page, str, dict]:
    data = write_dataset(folder / "data", card, windows=windows, files=1)
    write_dataset_report(str(data), str(folder / "out"))
    return read(folder / "out")


def read(out: Path) -> tuple[Page, str, dict]:
    """Return the three files. The page must be self-contained, and the statistics must be strict JSON."""
    html = (out / PAGE).read_text()
    assert not re.search(r"https?:|//|@import|src=|url\((?!#)|href=\"(?!#)", html)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    page = Page(html)
    assert "script" not in page.tags
    return page, (out / MARKDOWN).read_text(), json.loads((out / STATISTICS).read_text(), parse_constant=refuse)


def test_report_of_a_complete_log_has_all_sections(tmp_path: Path) -> None:
    page, text, numbers = report(tmp_path, full_card())
    assert page.tags.count("h2") == 10
    assert page.tags.count("svg") == 8
    assert "Not available" not in page.text
    assert "Not available" not in text
    train = numbers["splits"]["train"]
    assert f"{train['impressions']:,} training impressions" in page.text
    rate = train["positives"]["like"] / train["impressions"]
    assert f"like action {train['positives']['like']:,} {rate:.1%}" in page.text
    assert re.search(rf"\| like \| action \| {train['positives']['like']:,} \| {rate:.1%} \|", text)
    sequence = numbers["sequences"]["most_frequent"][0]
    assert f"{' → '.join(sequence['actions']) or 'none'} {sequence['count']:,}" in page.text
    assert list(numbers["time_s"]) == ["like", "follow", "exit"]


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"timed_actions": ["exit"]}, ["the times of fewer than two actions"]),
        ({"timed_actions": []}, ["neither times of actions nor watch times", "the times of fewer than two actions"]),
        ({"feedback": None, "objectives": []}, ["the log has no watch times"]),
        ({"features": make_card().features}, ["the log has no video durations. The overall glance rate"]),
        (
            {"features": [Feature("item_id", "item", "vocabulary", 40)]},
            ["order of a user's impressions, but not their times"],
        ),
    ],
)
def test_states_the_reason_of_missing_sections(tmp_path: Path, change: dict, left_out: list[str]) -> None:
    page, text, _ = report(tmp_path, replace(full_card(), **change))
    for reason in left_out:
        assert reason in page.text
        assert reason in text


def test_without_times_sequences_are_combinations(tmp_path: Path) -> None:
    page, _, numbers = report(tmp_path, make_card(timed=("exit",)))
    assert "→" not in page.text
    assert "like + comment" in page.text
    assert list(numbers["time_s"]) == ["exit"]
    assert numbers["relative_time"] == {}


def rewrite(data: Path, change: Callable[[dict], None]) -> None:
    """Change the columns of all windows in place."""
    for file in data.glob("*/part-*.parquet"):
        schema, columns = pq.read_schema(file), pq.read_table(file).to_pydict()
        change(columns)
        pq.write_table(pa.table(columns, schema=schema), file)


def test_report_of_one_impression_without_actions(tmp_path: Path) -> None:
    """One impression with no action, unknown watch time, item, duration and labels."""
    data = write_dataset(tmp_path / "data", full_card(), windows=1, files=1)
    unknown = math.nan
    impression = {"action": [0, 4], "action_offset_s": [0.0, unknown], "dwell_s": unknown, "label_click": unknown}

    def empty(columns: dict) -> None:
        for name, (values,) in columns.items():
            default = unknown if name.startswith("objective_") else 0
            columns[name] = [[impression.get(name, default)] if isinstance(values, list) else values]
        columns["first_target"] = [0]

    rewrite(data, empty)
    for split in ("valid", "test"):
        (data / split / "part-00000.parquet").unlink()
    write_dataset_report(str(data), str(tmp_path / "out"))
    page, _, numbers = read(tmp_path / "out")
    assert "0% of the impressions have an action. All items are unknown." in page.text
    assert "no video has a known duration" in page.text
    assert "neither times of actions nor" in page.text
    assert [numbers["splits"][split]["impressions"] for split in SPLITS] == [1, 0, 0]
    assert numbers["pairs"]["lift"] == [[None] * 3] * 3


def test_action_without_positives_has_a_row(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", full_card(), windows=20, files=1)

    def without_comments(columns: dict) -> None:
        for codes, offsets in zip(columns["action"], columns["action_offset_s"], strict=True):
            for index, row in enumerate(codes):
                kept = [step for step, code in enumerate(row) if code != 2]
                codes[index], offsets[index] = [row[step] for step in kept], [offsets[index][step] for step in kept]

    rewrite(data, without_comments)
    write_dataset_report(str(data), str(tmp_path / "out"))
    page, _, numbers = read(tmp_path / "out")
    assert "comment action 0 0% 0 0% 0 0% –" in page.text
    assert numbers["pairs"]["order"][0][1] is None


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("$x$|")</script>&'
    card = full_card()
    data = write_dataset(tmp_path / "data", card, windows=20, files=1)
    new_names = {"like": name}
    changed = replace(
        card,
        name=name,
        actions=[new_names.get(action, action) for action in card.actions],
        timed_actions=[new_names.get(action, action) for action in card.timed_actions],
    )
    changed.save(str(data))
    write_dataset_report(str(data), str(tmp_path / "out"))
    page, text, numbers = read(tmp_path / "out")
    assert name in page.text
    assert not re.search(r"(?<!\\)<", text)
    assert numbers["actions"][0] == name
    rows = [line for line in text.splitlines() if line.startswith("| ") and "alert" in line and "action |" in line]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 10


def test_output_is_deterministic(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", full_card(), windows=20)
    names = (PAGE, MARKDOWN, STATISTICS)
    contents = []
    for _ in range(2):
        write_dataset_report(str(data))
        contents.append([(tmp_path / "data-report" / name).read_bytes() for name in names])
    assert contents[0] == contents[1]
    assert sorted(file.name for file in (tmp_path / "data-report").iterdir()) == sorted(names)


def test_errors_are_raised_before_a_directory_is_created(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", full_card(), windows=2)
    before = sorted(tmp_path.rglob("*"))
    for out in (data, data / "report", tmp_path / "." / "data" / "x"):
        with pytest.raises(ConfigError, match="must be outside the dataset"):
            write_dataset_report(str(data), str(out))
    with pytest.raises(UserError, match="nothing: directory not found"):
        write_dataset_report(str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data", make_card(), windows=10)
    main(["report", "dataset", str(data), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for name in (PAGE, MARKDOWN, STATISTICS):
        assert f"{tmp_path}/out/{name}" in printed
    with pytest.raises(SystemExit):
        main(["report", "dataset", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith(f"a2gen: error: {tmp_path}/out/dataset.yaml: dataset card not found")
    with pytest.raises(SystemExit):
        main(["report", "dataset", str(data), "--markdown", str(tmp_path / "elsewhere.md")])
    error = capsys.readouterr().err
    assert error.startswith("a2gen: error: ")
    assert "--markdown" in error
