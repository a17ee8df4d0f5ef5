from itertools import pairwise
from typing import Any

import pytest

from a2gen_rec.reporting.console.evaluation import (
    evaluation_summary_tables,
    evaluation_tables,
    export_table,
    gap_closed,
)
from tests.helpers.console import rendered, row


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
        "time_given_prefix": {
            "like": {"mae_log": 0.4567, "mae_s": 5.0, "count": 4321},
            "exit": {"mae_log": None, "mae_s": None, "count": 0},
        },
        "objectives": {},
        "generator_vs_head": {},
        "by_duration": [],
        "subsets": {},
        "reference": reference,
        "loss": {"total": 1.23456},
        "order_violations": 0.0123,
        "unexplored_mass": {"mean": 1.5e-5, "max": 2.5e-3},
    }


def watch(mae: float) -> dict[str, Any]:
    return {"mae_log": mae, "mae_s": 10 * mae, "rank_correlation": 0.44, "count": 987}


def with_watch_time(heads: bool = True) -> dict[str, Any]:
    """An evaluation with watch time and glances, also predicted by heads if ``heads``."""
    comparisons: dict[str, Any] = {
        "watch_time": {"generator": watch(0.61)},
        "glance": {"generator": {"auc": 0.7123}},
        "negative": {"generator": {"auc": None}},
    }
    bounds = [None, 7.125, 10.0, 1211.3, None]
    groups: list[dict[str, Any]] = [
        {
            "from_s": first,
            "to_s": last,
            "targets": 1234,
            "watch_time": {"generator": watch(0.5)},
            "glance": {"rate": 0.1234, "generator": {"auc": 0.64}},
        }
        for first, last in pairwise(bounds)
    ]
    groups[-1]["glance"] = {"rate": None, "generator": {"auc": None}}
    if heads:
        comparisons["watch_time"] |= {"head": watch(0.6), "agreement": 0.9321}
        comparisons["glance"] |= {"head": {"auc": 0.7}, "agreement": 0.8}
        comparisons["negative"] |= {"head": {"auc": 0.55}, "agreement": None}
        for group in groups:
            group["watch_time"]["head"], group["glance"]["head"] = watch(0.4), metrics(0.65)
    objectives = {"glance": metrics(0.7, 0.6, 0.9), "negative": metrics(None)} if heads else {}
    return result() | {"objectives": objectives, "generator_vs_head": comparisons, "by_duration": groups}


def test_actions_next_to_their_baselines() -> None:
    text = rendered(evaluation_tables(result())[:1])
    assert row(text, "like") == "like 1,234 0.6500 0.6000 0.5500 0.9600 1.025"
    assert row(text, "long_view") == "long_view 1,234 0.6000 0.7000 0.4000 1.0000 1.025"
    assert row(text, "hate") == "hate 1,234 – – – – 1.025"
    for text_part in ("test, 98,765 targets", "loss 1.2346", "violations 1.23%", "mean 1.5e-05, max 2.5e-03"):
        assert text_part in text


def test_oracle_table() -> None:
    text = rendered(evaluation_tables(result())[1:2])
    assert row(text, "like") == "like 0.6000 0.6500 0.8000 25%"
    assert row(text, "long_view") == "long_view 0.7000 0.6000 – –"
    assert row(text, "hate") == "hate – – – –"


def test_oracle_table_is_optional() -> None:
    text = rendered(evaluation_tables(result(oracle=False)))
    assert "oracle" not in text
    assert "gap closed" not in text
    assert row(text, "like") == "like 1,234 0.6500 0.6000 0.5500 0.9600 1.025"


def test_times_next_to_the_median() -> None:
    text = rendered(evaluation_tables(result())[2:])
    assert row(text, "like") == "like 4,321 0.5123 0.4567 0.6000 5.50 4.00"
    assert row(text, "exit") == "exit 0 – – – – –"


def test_times_table_is_optional() -> None:
    assert len(evaluation_tables(result() | {"time": {}})) == 2


def test_highlights_only_values_better_than_their_baseline() -> None:
    text = rendered(evaluation_tables(result()), color=True)
    highlighted = {
        value for value in ("0.6500", "0.5500", "0.9600", "0.4000", "0.5123", "5.50") if f"{value}\x1b" in text
    }
    assert highlighted == {"0.6500", "0.9600", "0.5123"}  # like's AUC, normalized entropy and time in log units


def test_objectives_table() -> None:
    text = rendered(evaluation_tables(with_watch_time())[2:3])
    assert "objectives" in text
    assert row(text, "glance") == "glance 1,234 0.7000 0.6000 0.9000 1.025"
    assert row(text, "negative") == "negative 1,234 – – – 1.025"


def test_compares_generator_and_head_side_by_side() -> None:
    text = rendered(evaluation_tables(with_watch_time())[4:5])
    assert row(text, "watch_time") == "watch_time rank correlation 0.4400 0.4400 0.9321"
    assert row(text, "MAE,") == "MAE, log1p s 0.6100 0.6000"
    assert "MAE, seconds 6.10 6.00" in " ".join(text.split())
    assert row(text, "glance") == "glance AUC 0.7123 0.7000 0.8000"
    assert row(text, "negative") == "negative AUC – 0.5500 –"


def test_glances_and_watch_time_by_duration() -> None:
    glances, watch_time = (rendered([table]) for table in evaluation_tables(with_watch_time())[5:])
    assert row(glances, "≥") == "≥ 1,211 s 1,234 – – 0.6500"
    assert row(watch_time, "≥") == "≥ 1,211 s 1,234 0.5000 0.4000 5.00 4.00"
    for group in ("< 7.12 s", "7.12–10 s", "10–1,211 s"):
        assert row(glances, group.split()[0]) == f"{group} 1,234 12.3% 0.6400 0.6500"
        assert row(watch_time, group.split()[0]) == f"{group} 1,234 0.5000 0.4000 5.00 4.00"


def test_head_columns_are_optional() -> None:
    tables = evaluation_tables(with_watch_time(heads=False))
    assert len(tables) == 6
    text = rendered(tables[3:])
    assert "head" not in text
    assert "agreement" not in text
    assert row(text, "watch_time") == "watch_time rank correlation 0.4400"
    assert row(text, "glance") == "glance AUC 0.7123"
    assert row(text, "<") == "< 7.12 s 1,234 12.3% 0.6400"
    assert row(rendered(tables[-1:]), "<") == "< 7.12 s 1,234 0.5000 5.00"


def test_durations_without_glances_have_watch_time_only() -> None:
    evaluation = with_watch_time()
    for group in evaluation["by_duration"]:
        del group["glance"]
    text = rendered(evaluation_tables(evaluation)[5:])
    assert "AUC" not in text
    assert row(text, "<") == "< 7.12 s 1,234 0.5000 0.4000 5.00 4.00"


def test_highlights_the_better_of_generator_and_head() -> None:
    text = rendered(evaluation_tables(with_watch_time())[4:], color=True)
    values = ("0.7123", "0.7000", "0.6100", "0.6000", "0.5500", "0.4400", "0.6500", "0.6400", "0.4000")
    assert {value for value in values if f"{value}\x1b" in text} == {"0.7123", "0.6000", "0.6500", "0.4000"}


def test_means_on_new_and_known_items() -> None:
    actions = {"like": metrics(0.7), "follow": metrics(0.6), "hate": metrics(None)}
    times = {"like": {"mae_log": 0.5}, "exit": {"mae_log": None}}
    subsets = {
        "new items": {"targets": 1234, "actions": actions, "time": times},
        "known items": {"targets": 5, "actions": {"hate": metrics(None)}, "time": {}},
    }
    text = rendered(evaluation_tables(result() | {"subsets": subsets})[-1:])
    assert row(text, "new") == "new items 1,234 0.6500 0.5000"
    assert row(text, "known") == "known items 5 – –"


def session_lists(**ndcg: float | None) -> dict[str, Any]:
    methods = {name: {"mean": {"ndcg": value}} for name, value in ndcg.items()}
    return {"k": 10, "lists": 4321, "weight_entropy": 0.876, "methods": methods}


def test_summary_has_one_row_per_outcome_and_time() -> None:
    text = rendered(evaluation_summary_tables(with_watch_time()))
    assert row(text, "like") == "like 1,234 0.6500 0.5500 0.9600 1.025"
    assert row(text, "hate") == "hate 1,234 – – – 1.025"
    assert row(text, "glance") == "glance 1,234 0.7000 0.6000 0.9000 1.025"
    times = text[text.index("mean absolute error") :]
    assert row(times, "like") == "like 4,321 0.5123 0.6000 5.50 4.00"
    assert row(times, "exit") == "exit 0 – – – –"
    assert "test: 98,765 targets, loss 1.2346" in text
    assert "ensemble" not in text
    assert len(evaluation_summary_tables(result() | {"time": {}})) == 1


def test_summary_compares_the_ensemble_with_the_best_alternative() -> None:
    lists = session_lists(UMRE=0.61234, formula=0.6, logistic=0.605, single=None)
    line, entropy = rendered(evaluation_summary_tables(result() | {"lists": lists})).splitlines()[-2:]
    assert entropy == "mean entropy of weights: 0.88 (0: one objective, 1: equal weights)"
    assert line == "ensemble: NDCG@10 0.6123 (UMRE) · best alternative: 0.6050 (logistic) · 4,321 lists"
    alone = rendered(evaluation_summary_tables(result() | {"lists": session_lists(UMRE=None)})).splitlines()[-2]
    assert alone == "ensemble: NDCG@10 – (UMRE) · 4,321 lists"


def test_summary_highlights_only_values_better_than_their_baseline() -> None:
    text = rendered(evaluation_summary_tables(result()), color=True)
    values = ("0.6500", "0.5500", "0.9600", "0.4000", "0.5123", "5.50")
    assert {value for value in values if f"{value}\x1b" in text} == {"0.6500", "0.9600", "0.5123"}
    lists = {"better": session_lists(UMRE=0.7, formula=0.6), "worse": session_lists(UMRE=0.5, formula=0.6)}
    lines = {name: rendered(evaluation_summary_tables(result() | {"lists": lists[name]}), color=True) for name in lists}
    assert "0.7000 (UMRE)\x1b" in lines["better"]
    assert "\x1b[1;32m0.5000" not in lines["worse"]


@pytest.mark.parametrize("count", [3, 9, 60])
def test_summary_fits_one_screen(count: int) -> None:
    names = [f"{'very_long_name_' * 2}{index}" for index in range(count)]
    actions = {name: metrics(0.65, 0.55, 0.96) | {"positives": 10**8 + index} for index, name in enumerate(names)}
    time = {"mae_log": 0.5, "mae_s": 123456.7}
    large = with_watch_time() | {
        "targets": 10**9,
        "actions": actions,
        "objectives": {name: metrics(0.7, 0.6, 0.9) for name in ("glance", "effective", "negative")},
        "time": {name: time | {"count": 10**8 + index} for index, name in enumerate(names)},
        "lists": session_lists(UMRE=0.61234, **{"logistic regression": 0.6}),
    }
    lines = rendered(evaluation_summary_tables(large)).splitlines()
    assert len(lines) <= 40
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert "…" not in "".join(lines)
    text = "\n".join(lines)
    assert row(text, names[-1]), "the most frequent outcomes are kept"
    assert ("15 of 63 outcomes" in " ".join(text.split())) == (count == 60)
    assert ("8 of 60 actions" in " ".join(text.split())) == (count == 60)


def test_export_table_marks_actions_exempt_from_the_tolerance() -> None:
    like = {"original": 0.65, "exported": 0.6499, "positives": 1234, "within_tolerance": True}
    hate = {"original": None, "exported": None, "positives": 2, "within_tolerance": None}
    metrics = {"split": "test", "targets": 98_765, "min_positives": 100, "auc": {"like": like, "hate": hate}}
    text = rendered([export_table(metrics | {"loss": {"original": 1.0, "exported": 1.00001}})])
    assert row(text, "like") == "like 1,234 0.6500 0.6499 -0.00010"
    assert row(text, "hate") == "hate * 2 – – –"
    assert "fewer than 100 positives or negatives; exempt" in " ".join(text.split())


@pytest.mark.parametrize(
    ("model", "baseline", "oracle", "closed"),
    [
        (0.7, 0.6, 0.8, 0.5),
        (0.5, 0.6, 0.8, -0.5),
        (0.7, 0.6, 0.6, None),
        (None, 0.6, 0.8, None),
        (0.7, 0.6, None, None),
    ],
)
def test_gap_closed(model: float | None, baseline: float | None, oracle: float | None, closed: float | None) -> None:
    assert gap_closed(model, baseline, oracle) == (None if closed is None else pytest.approx(closed))


def test_tables_fit_eighty_columns() -> None:
    names = ["profile_enter", "like", "follow", "comment", "forward", "hate", "click", "long_view"]
    many = result() | {"actions": dict.fromkeys(names, metrics(0.65, 0.55, 0.96) | {"positives": 123_456_789})}
    assert "…" not in rendered(evaluation_tables(many), width=80)
    wide = with_watch_time()
    wide["by_duration"] = [
        group | {"from_s": 1e5, "to_s": 2e5, "targets": 123_456_789} for group in wide["by_duration"]
    ]
    text = rendered(evaluation_tables(wide), width=80)
    assert "…" not in text
    assert " ".join(text.split()).count("100,000–200,000 s 123,456,789") == 8, "no cell is wrapped"
