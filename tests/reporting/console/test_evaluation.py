import io
import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from a2gen_rec.ranking.types import RankedList, ScoredCandidate
from a2gen_rec.reporting.console.evaluation import evaluation_tables, gap_closed, ranking_tables


def shown(tables: list[Table], colour: bool = False, width: int = 100) -> str:
    out = io.StringIO()
    color_system = "standard" if colour else None
    console = Console(file=out, width=width, highlight=False, force_terminal=colour, color_system=color_system)
    for table in tables:
        console.print(table)
    return out.getvalue()


def row(text: str, name: str) -> str:
    """The line that begins with ``name``, each run of blanks as one."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [name])


def metrics(auc: float | None, gauc: float | None = None, ne: float | None = None) -> dict[str, Any]:
    return {"auc": auc, "gauc": gauc, "ne": ne, "calibration": 1.025, "positives": 1234}


def result(oracle: bool = True) -> dict[str, Any]:
    reference = {
        "base_rate": {},
        "item_rate": {"like": metrics(0.6, 0.56, 0.97), "long_view": metrics(0.7, 0.5, 0.9), "hate": metrics(None)},
        "median_time": {"like": {"mae_log": 0.6, "mae_s": 4.0, "count": 9}},
    }
    if oracle:
        reference["oracle"] = {"like": metrics(0.8), "hate": metrics(None)}
    return {
        "split": "test",
        "targets": 98_765,
        "actions": {"like": metrics(0.65, 0.55, 0.96), "long_view": metrics(0.6, 0.4, 1.0), "hate": metrics(None)},
        "time": {
            "like": {"mae_log": 0.5123, "mae_s": 5.5, "count": 4321},
            "exit": {"mae_log": None, "mae_s": None, "count": 0},
        },
        "next_time": {
            "like": {"mae_log": 0.4567, "mae_s": 5.0, "count": 4321},
            "exit": {"mae_log": None, "mae_s": None, "count": 0},
        },
        "objectives": {},
        "shared_ground": {},
        "lengths": [],
        "reference": reference,
        "loss": {"total": 1.23456},
        "order_violations": 0.0123,
        "unexplored_probability": {"mean": 1.5e-5, "max": 2.5e-3},
    }


def watch(mae: float) -> dict[str, Any]:
    return {"mae_log": mae, "mae_s": 10 * mae, "rank_correlation": 0.44, "count": 987}


def with_watch_time(heads: bool = True) -> dict[str, Any]:
    """An evaluation that tells of watch time and glances, by heads of their own too if ``heads``."""
    ground: dict[str, Any] = {
        "watch_time": {"generator": watch(0.61)},
        "glance": {"generator": {"auc": 0.7123}},
        "negative": {"generator": {"auc": None}},
    }
    edges = [None, 7.125, 10.0, 1211.3, None]
    lengths: list[dict[str, Any]] = [
        {
            "from_s": first,
            "to_s": last,
            "targets": 1234,
            "watch_time": {"generator": watch(0.5)},
            "glance": {"rate": 0.1234, "generator": {"auc": 0.64}},
        }
        for first, last in pairwise(edges)
    ]
    lengths[-1]["glance"] = {"rate": None, "generator": {"auc": None}}
    if heads:
        ground["watch_time"] |= {"head": watch(0.6), "agreement": 0.9321}
        ground["glance"] |= {"head": {"auc": 0.7}, "agreement": 0.8}
        ground["negative"] |= {"head": {"auc": 0.55}, "agreement": None}
        for group in lengths:
            group["watch_time"]["head"], group["glance"]["head"] = watch(0.4), metrics(0.65)
    found = {"glance": metrics(0.7, 0.6, 0.9), "negative": metrics(None)} if heads else {}
    return result() | {"objectives": found, "shared_ground": ground, "lengths": lengths}


def test_actions_beside_their_references() -> None:
    text = shown(evaluation_tables(result())[:1])
    assert row(text, "like") == "like 1,234 0.6500 0.6000 0.8000 25% 0.5500 0.9600 1.025"
    assert row(text, "long_view") == "long_view 1,234 0.6000 0.7000 – – 0.4000 1.0000 1.025"
    assert row(text, "hate") == "hate 1,234 – – – – – – 1.025"
    for fact in ("test, 98,765 targets", "loss 1.2346", "violations 1.23%", "mean 1.5e-05, max 2.5e-03"):
        assert fact in text


def test_without_an_oracle_its_columns_are_left_out() -> None:
    text = shown(evaluation_tables(result(oracle=False)))
    assert "oracle" not in text
    assert "gap" not in text
    assert row(text, "like") == "like 1,234 0.6500 0.6000 0.5500 0.9600 1.025"


def test_times_beside_the_median() -> None:
    text = shown(evaluation_tables(result())[1:])
    assert row(text, "like") == "like 4,321 0.5123 0.4567 0.6000 5.50 4.00"
    assert row(text, "exit") == "exit 0 – – – – –"


def test_no_times_no_table() -> None:
    assert len(evaluation_tables(result() | {"time": {}})) == 1


def test_only_what_beats_its_reference_stands_out() -> None:
    text = shown(evaluation_tables(result()), colour=True)
    marked = {value for value in ("0.6500", "0.5500", "0.9600", "0.4000", "0.5123", "5.50") if f"{value}\x1b" in text}
    assert marked == {"0.6500", "0.9600", "0.5123"}  # like's AUC, normalised entropy and time in log units


def test_objectives_of_their_heads() -> None:
    text = shown(evaluation_tables(with_watch_time())[1:2])
    assert "objectives" in text
    assert row(text, "glance") == "glance 1,234 0.7000 0.6000 0.9000 1.025"
    assert row(text, "negative") == "negative 1,234 – – – 1.025"


def test_watch_time_and_objectives_of_generator_and_heads_side_by_side() -> None:
    text = shown(evaluation_tables(with_watch_time())[3:4])
    assert row(text, "watch_time") == "watch_time rank correlation 0.4400 0.4400 0.9321"
    assert row(text, "MAE,") == "MAE, log1p s 0.6100 0.6000"
    assert "MAE, seconds 6.10 6.00" in " ".join(text.split())
    assert row(text, "glance") == "glance AUC 0.7123 0.7000 0.8000"
    assert row(text, "negative") == "negative AUC – 0.5500 –"


def test_glances_and_watch_time_by_length() -> None:
    text = shown(evaluation_tables(with_watch_time())[4:])
    measured = "1,234 12.3% 0.6400 0.6500 0.5000 0.4000 5.00 4.00"
    assert row(text, "<") == f"< 7.12 s {measured}"
    assert row(text, "7.12–10") == f"7.12–10 s {measured}"
    assert row(text, "10–1,211") == f"10–1,211 s {measured}"
    assert row(text, "≥") == "≥ 1,211 s 1,234 – – 0.6500 0.5000 0.4000 5.00 4.00"


def test_what_no_head_predicts_has_no_column() -> None:
    tables = evaluation_tables(with_watch_time(heads=False))
    assert len(tables) == 4
    text = shown(tables[2:])
    assert "head" not in text
    assert "agreement" not in text
    assert row(text, "watch_time") == "watch_time rank correlation 0.4400"
    assert row(text, "glance") == "glance AUC 0.7123"
    assert row(text, "<") == "< 7.12 s 1,234 12.3% 0.6400 0.5000 5.00"


def test_without_glances_lengths_tell_of_watch_time() -> None:
    found = with_watch_time()
    for group in found["lengths"]:
        del group["glance"]
    text = shown(evaluation_tables(found)[4:])
    assert "AUC" not in text
    assert row(text, "<") == "< 7.12 s 1,234 0.5000 0.4000 5.00 4.00"


def test_the_better_of_generator_and_head_stands_out() -> None:
    text = shown(evaluation_tables(with_watch_time())[3:], colour=True)
    values = ("0.7123", "0.7000", "0.6100", "0.6000", "0.5500", "0.4400", "0.6500", "0.6400", "0.4000")
    assert {value for value in values if f"{value}\x1b" in text} == {"0.7123", "0.6000", "0.6500", "0.4000"}


@pytest.mark.parametrize(
    ("model", "trivial", "oracle", "closed"),
    [
        (0.7, 0.6, 0.8, 0.5),
        (0.5, 0.6, 0.8, -0.5),
        (0.7, 0.6, 0.6, None),
        (None, 0.6, 0.8, None),
        (0.7, 0.6, None, None),
    ],
)
def test_gap_closed(model: float | None, trivial: float | None, oracle: float | None, closed: float | None) -> None:
    assert gap_closed(model, trivial, oracle) == (None if closed is None else pytest.approx(closed))


def candidate(item: str, known: bool = True, watch: float | None = 17.6) -> ScoredCandidate:
    timeline = [("start", 0.0), ("like", 2.04), ("comment", None), ("exit", watch)]
    return ScoredCandidate(item, known, {"like": 0.1234, "long_view": 0.00456}, watch, timeline, 0.344)


def test_a_ranking() -> None:
    ranking = RankedList("u[b]1[/b]", True, 57, "watch", 3, 1, [candidate("a"), candidate("[red]b", False)])
    text = shown(ranking_tables(ranking))
    assert row(text, "1").startswith("1 a 12.3% 0.46% 18s start@0")
    assert "start@0 → like@2.0s → comment → exit@18s (34%)" in text
    assert row(text, "2").startswith("2 [red]b ? 12.3%")
    for fact in ("user u[b]1[/b]: best 2 of 3 candidates", "by expected watch time · 57 past", "dataset: 1 candidates"):
        assert fact in text


def test_a_ranking_for_an_unknown_user_by_a_label_without_watch_times() -> None:
    text = shown(ranking_tables(RankedList("u", False, 0, "long_view", 1, 0, [candidate("a", watch=None)])))
    assert "by probability of long_view · user not in the dataset: no history" in text
    assert "? not in" not in text
    assert "watch" not in text
    assert "comment → exit (34%)" in text
    less = RankedList("u", True, 5, "like", 1, 0, [candidate("a")], ascending=True)
    assert "by probability of like, least first · 5 past impressions" in shown(ranking_tables(less))


def test_a_ranking_by_the_ensemble_shows_its_scores() -> None:
    scored = [replace(candidate(name), score=score) for name, score in (("a", 0.61234), ("b", -0.25))]
    text = shown(ranking_tables(RankedList("u", True, 57, "ensemble", 2, 0, scored)))
    assert "by ensemble score · 57 past impressions" in text
    assert row(text, "1").startswith("1 a +0.6123 12.3%")
    assert row(text, "2").startswith("2 b -0.2500 12.3%")
    assert "score" not in shown(ranking_tables(RankedList("u", True, 57, "watch", 2, 0, scored)))


@pytest.mark.parametrize(("by", "header"), [("ensemble", "score"), ("watch", "watch"), ("like", "like")])
def test_what_a_ranking_is_ordered_by_is_underlined(by: str, header: str) -> None:
    text = shown(ranking_tables(RankedList("u", True, 57, by, 1, 0, [replace(candidate("a"), score=0.5)])), colour=True)
    assert re.findall(r"\x1b\[[0-9;]*\b4m *(\w+)", text) == [header]


def test_a_ranking_by_a_model_that_generates_no_sequences_has_no_timelines() -> None:
    plain = replace(candidate("a"), timeline=[], timeline_probability=math.nan)
    text = shown(ranking_tables(RankedList("u", True, 57, "watch", 1, 0, [plain])))
    assert row(text, "1").split() == ["1", "a", "12.3%", "0.46%", "18s"]
    assert "timeline" not in text
    assert "nan" not in text


def test_tables_fit_a_hundred_columns() -> None:
    names = ["profile_enter", "like", "follow", "comment", "forward", "hate", "click", "long_view"]
    timeline = [("start", 0.0), ("like", 2.04), ("exit", 17.0)]
    wide = ScoredCandidate("123456789", True, dict.fromkeys(names, 0.1234), 12.3, timeline, 0.5)
    text = shown(ranking_tables(RankedList("123456", True, 100, "watch", 12, 0, [wide] * 12)), width=100)
    assert "…" not in text
    assert all(name in text.replace("_\n", "_") for name in ("follow", "comment", "forward"))
    assert text.count("12.3%") == 12 * len(names)
    wide = replace(wide, score=-12.3456)
    text = shown(ranking_tables(RankedList("123456", True, 100, "ensemble", 12, 0, [wide] * 12)), width=100)
    assert "…" not in text
    assert text.count("-12.3456") == 12
    more = dict.fromkeys([*names, "glance", "effective", "negative"], 0.1234)
    wider = replace(wide, probability=more)
    text = shown(ranking_tables(RankedList("123456", True, 100, "glance", 12, 0, [wider] * 12)), width=100)
    assert "…" not in text
    assert text.count("12.3%") == 12 * (1 + len(more)), "the one ranked by stands beside the timeline too"
    many = result() | {"actions": dict.fromkeys(names, metrics(0.65, 0.55, 0.96) | {"positives": 123_456_789})}
    assert "…" not in shown(evaluation_tables(many))
    long = with_watch_time()
    long["lengths"] = [group | {"from_s": 1e5, "to_s": 2e5, "targets": 123_456_789} for group in long["lengths"]]
    text = shown(evaluation_tables(long))
    assert "…" not in text
    assert " ".join(text.split()).count("100,000–200,000 s 123,456,789") == 4, "no cell is broken into lines"
