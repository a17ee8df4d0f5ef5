import re
from dataclasses import replace

import pytest

from a2gen_rec.ranking.types import RankedList, ScoredCandidate
from a2gen_rec.reporting.console.ranking import ranking_tables
from tests.helpers.console import rendered, row


def candidate(item: str, known: bool = True, watch: float | None = 17.6) -> ScoredCandidate:
    timeline = [("start", 0.0), ("like", 2.04), ("comment", None), ("exit", watch)]
    return ScoredCandidate(item, known, {"like": 0.1234, "long_view": 0.00456}, watch, timeline, 0.344)


def test_ranking() -> None:
    ranking = RankedList("u[b]1[/b]", True, 57, "watch", 3, 1, [candidate("a"), candidate("[red]b", False)])
    text = rendered(ranking_tables(ranking))
    assert row(text, "1").startswith("1 a 12.3% 0.46% 18s start@0")
    assert "start@0 → like@2.0s → comment → exit@18s (34%)" in text
    assert row(text, "2").startswith("2 [red]b ? 12.3%")
    for part in (
        "user u[b]1[/b]: best 2 of 3 candidates",
        "by expected watch time · history: 57",
        "dataset: 1 candidates",
    ):
        assert part in text


def test_ranking_of_an_unknown_user_without_watch_times() -> None:
    text = rendered(ranking_tables(RankedList("u", False, 0, "long_view", 1, 0, [candidate("a", watch=None)])))
    assert "by probability of long_view · user not in the dataset: no history" in text
    assert "? not in" not in text
    assert "watch" not in text
    assert "comment → exit (34%)" in text
    ascending = RankedList("u", True, 5, "like", 1, 0, [candidate("a")], ascending=True)
    assert "by probability of like, ascending · history: 5 impressions" in rendered(ranking_tables(ascending))


def test_ranking_by_ensemble_shows_scores() -> None:
    scored = [replace(candidate(name), score=score) for name, score in (("a", 0.61234), ("b", -0.25))]
    text = rendered(ranking_tables(RankedList("u", True, 57, "ensemble", 2, 0, scored)))
    assert "by ensemble score · history: 57 impressions" in text
    assert row(text, "1").startswith("1 a +0.6123 12.3%")
    assert row(text, "2").startswith("2 b -0.2500 12.3%")
    assert "score" not in rendered(ranking_tables(RankedList("u", True, 57, "watch", 2, 0, scored)))


@pytest.mark.parametrize(("by", "header"), [("ensemble", "score"), ("watch", "watch"), ("like", "like")])
def test_sort_key_is_underlined(by: str, header: str) -> None:
    text = rendered(
        ranking_tables(RankedList("u", True, 57, by, 1, 0, [replace(candidate("a"), score=0.5)])), color=True
    )
    assert re.findall(r"\x1b\[[0-9;]*\b4m *(\w+)", text) == [header]


def test_ranking_without_sequences_has_no_timelines() -> None:
    no_timeline = replace(candidate("a"), timeline=[], timeline_probability=None)
    text = rendered(ranking_tables(RankedList("u", True, 57, "watch", 1, 0, [no_timeline])))
    assert row(text, "1").split() == ["1", "a", "12.3%", "0.46%", "18s"]
    assert "timeline" not in text
    assert "None" not in text
    both = rendered(ranking_tables(RankedList("u", True, 57, "watch", 2, 0, [candidate("b"), no_timeline])))
    assert row(both, "2").split() == ["2", "a", "12.3%", "0.46%", "18s", "–"]


def test_tables_fit_a_hundred_columns() -> None:
    names = ["profile_enter", "like", "follow", "comment", "forward", "hate", "click", "long_view"]
    timeline = [("start", 0.0), ("like", 2.04), ("exit", 17.0)]
    wide = ScoredCandidate("123456789", True, dict.fromkeys(names, 0.1234), 12.3, timeline, 0.5)
    text = rendered(ranking_tables(RankedList("123456", True, 100, "watch", 12, 0, [wide] * 12)), width=100)
    assert "…" not in text
    assert all(name in text.replace("_\n", "_") for name in ("follow", "comment", "forward"))
    assert text.count("12.3%") == 12 * len(names)
    wide = replace(wide, score=-12.3456)
    text = rendered(ranking_tables(RankedList("123456", True, 100, "ensemble", 12, 0, [wide] * 12)), width=100)
    assert "…" not in text
    assert text.count("-12.3456") == 12
    many_outcomes = dict.fromkeys([*names, "glance", "effective", "negative"], 0.1234)
    wider = replace(wide, probability=many_outcomes)
    text = rendered(ranking_tables(RankedList("123456", True, 100, "glance", 12, 0, [wider] * 12)), width=100)
    assert "…" not in text
    assert text.count("12.3%") == 12 * (1 + len(many_outcomes)), "the sort key is next to the timeline too"
