import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from a2gen_rec.reporting.tables import evaluation_tables, gap_closed, ranking_table
from a2gen_rec.serving.rank import Candidate, Ranking


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
        "reference": reference,
        "loss": {"total": 1.23456},
        "order_violations": 0.0123,
        "unexplored_probability": {"mean": 1.5e-5, "max": 2.5e-3},
    }


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
    assert row(text, "like") == "like 4,321 0.5123 0.6000 5.50 4.00"
    assert row(text, "exit") == "exit 0 – – – –"


def test_no_times_no_table() -> None:
    assert len(evaluation_tables(result() | {"time": {}})) == 1


def test_only_what_beats_its_reference_stands_out() -> None:
    text = shown(evaluation_tables(result()), colour=True)
    marked = {value for value in ("0.6500", "0.5500", "0.9600", "0.4000", "0.5123", "5.50") if f"{value}\x1b" in text}
    assert marked == {"0.6500", "0.9600", "0.5123"}  # like's AUC, normalised entropy and time in log units


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


def candidate(item: str, known: bool = True, watch: float | None = 17.6) -> Candidate:
    timeline = [("start", 0.0), ("like", 2.04), ("comment", None), ("exit", watch)]
    return Candidate(item, known, {"like": 0.1234, "long_view": 0.00456}, watch, timeline, 0.344)


def test_a_ranking() -> None:
    ranking = Ranking("u[b]1[/b]", True, 57, "watch", 3, 1, [candidate("a"), candidate("[red]b", False)])
    text = shown([ranking_table(ranking)])
    assert row(text, "1").startswith("1 a 12.3% 0.46% 18s start@0")
    assert "start@0 → like@2.0s → comment → exit@18s (34%)" in text
    assert row(text, "2").startswith("2 [red]b ? 12.3%")
    for fact in ("user u[b]1[/b]: best 2 of 3 candidates", "by expected watch time · 57 past", "dataset: 1 candidates"):
        assert fact in text


def test_a_ranking_for_an_unknown_user_by_a_label_without_watch_times() -> None:
    text = shown([ranking_table(Ranking("u", False, 0, "long_view", 1, 0, [candidate("a", watch=None)]))])
    assert "by probability of long_view · user not in the dataset: no history" in text
    assert "? not in" not in text
    assert "watch" not in text
    assert "comment → exit (34%)" in text


def test_tables_fit_a_hundred_columns() -> None:
    names = ["profile_enter", "like", "follow", "comment", "forward", "hate", "click", "long_view"]
    timeline = [("start", 0.0), ("like", 2.04), ("exit", 17.0)]
    wide = Candidate("123456789", True, dict.fromkeys(names, 0.1234), 12.3, timeline, 0.5)
    text = shown([ranking_table(Ranking("123456", True, 100, "watch", 12, 0, [wide] * 12))], width=100)
    assert "…" not in text
    assert all(name in text.replace("_\n", "_") for name in ("follow", "comment", "forward"))
    assert text.count("12.3%") == 12 * len(names)
    many = result() | {"actions": dict.fromkeys(names, metrics(0.65, 0.55, 0.96) | {"positives": 123_456_789})}
    assert "…" not in shown(evaluation_tables(many))
