from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.cells import cell_len

from a2gen_rec.models.ensemble.model import EnsembleOutput
from a2gen_rec.ranking.contributions import Contribution, weight_entropy
from a2gen_rec.reporting.console.ensemble import explanation_tables, list_metrics_tables
from tests.helpers.console import rendered

BOLD_GREEN = "\x1b[1;32m"


def rows(text: str, name: str) -> list[str]:
    """Lines that start with ``name``, with runs of spaces collapsed."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line.startswith(f"{name} ")]


def method(like: float | None, share: float | None, volume: float | None) -> dict[str, Any]:
    """List metrics with these NDCG values; HR is 0.1 and user AUC 0.2 higher."""
    behaviors = {}
    for name, value in {"like": like, "share": share}.items():
        numbers = {key: None if value is None else value + more for key, more in MORE.items()}
        behaviors[name] = numbers | {"lists": 1234 if name == "like" else 5, "positives": 56_789}
    mean = {key: None if like is None else like + more for key, more in MORE.items()}
    return {"behaviors": behaviors, "mean": mean, "hypervolume": volume}


MORE = {"ndcg": 0.0, "hr": 0.1, "uauc": 0.2}


def result(**methods: dict[str, Any]) -> dict[str, Any]:
    numbers = {"k": 3, "lists": 98_765, "mean_length": 6.13, "weight_entropy": 0.876}
    return numbers | {"behaviors": ["like", "share"], "methods": methods}


def test_one_table_per_metric_with_one_row_per_method() -> None:
    tables = list_metrics_tables(result(UMRE=method(0.61, 0.4, 0.25), formula=method(0.5, None, 0.00123)))
    ndcg, hr, uauc = (rendered([table]) for table in tables)
    assert rows(ndcg, "UMRE") == ["UMRE 0.6100 0.6100 0.4000 0.2500"]
    assert rows(ndcg, "formula") == ["formula 0.5000 0.5000 – 1.2e-03"]
    assert rows(ndcg, "lists") == ["lists 1,234 5"]
    assert rows(ndcg, "positives") == ["positives 56,789 56,789"]
    assert rows(hr, "UMRE") == ["UMRE 0.7100 0.7100 0.5000"]
    assert rows(uauc, "formula") == ["formula 0.7000 0.7000 –"]
    assert "NDCG@3" in ndcg
    assert "98,765 lists of 6.1 candidates" in " ".join(ndcg.split())
    assert "entropy of the ensemble's weights: 0.88" in " ".join(ndcg.split())
    assert "HR@3" in hr
    assert "of 3 or fewer" in " ".join(hr.split())
    assert "user AUC" in uauc


def test_highlights_the_best_of_each_column() -> None:
    """Values that round to the best are highlighted too; a single method is not."""
    methods = {"a": method(0.61, None, 0.2), "b": method(0.5, 0.4, 0.3), "c": method(0.610004, None, None)}
    text = rendered(list_metrics_tables(result(**methods))[:1], color=True)
    marked = {name: line.count(BOLD_GREEN) for line in text.splitlines() for name in methods if line.startswith(name)}
    assert marked == {"a": 2, "b": 1, "c": 2}
    alone = rendered(list_metrics_tables(result(a=method(0.61, 0.4, 0.2))), color=True)
    assert BOLD_GREEN not in alone


def test_eight_behaviors_fit_without_truncation() -> None:
    behaviors = ["is_click", "long_view", "effective", "like", "follow", "comment", "forward", "profile_enter"]
    numbers = {"ndcg": 0.12345, "hr": 0.12345, "uauc": 0.12345, "lists": 123_456, "positives": 123_456}
    mean = {"ndcg": 0.12345, "hr": 0.12345, "uauc": 0.12345}
    one = {"behaviors": dict.fromkeys(behaviors, numbers), "mean": mean, "hypervolume": 1.2e-5}
    wide = result(**{"logistic regression": one}) | {"behaviors": behaviors}
    text = rendered(list_metrics_tables(wide))
    assert text.count("0.1235") == 3 * 9
    assert "1.2e-05" in text
    assert "…" not in text
    assert all(name.split("_")[-1] in text for name in behaviors)


def test_empty_result_has_empty_tables() -> None:
    assert len(list_metrics_tables(result() | {"mean_length": None})) == 3


def test_contribution_is_weight_times_transform() -> None:
    assert Contribution("like", True, 0.1, -2.0, 0.25).contribution == -0.5


@pytest.mark.parametrize(
    ("weights", "entropy"), [([1.0], 0), ([1.0, 0.0, 0.0], 0), ([0.25] * 4, 1), ([0.5, 0.25, 0.25], 0.946395)]
)
def test_weight_entropy(weights: list[float], entropy: float) -> None:
    """The same for explanations and for the ensemble's output."""
    parts = [Contribution(f"objective_{k}", True, 0.1, 1.0, weight) for k, weight in enumerate(weights)]
    assert weight_entropy(parts) == pytest.approx(entropy)
    empty = torch.zeros(1, 1)
    output = EnsembleOutput(empty, empty, torch.tensor([[weights]]), empty)
    assert output.weight_entropy.tolist() == [[pytest.approx(entropy)]]


@dataclass(frozen=True)
class Candidate:
    item: str
    explanation: list[Contribution]


def candidate(item: str, like: float, negative: float, watch: float) -> Candidate:
    """Return a candidate with these transforms."""
    parts = [
        Contribution("like", True, 0.0012, like, 0.5),
        Contribution("negative", False, 0.345, negative, 0.3),
        Contribution("watch_time", True, 17.61, watch, 0.2, "s"),
    ]
    return Candidate(item, parts)


THREE = [candidate("[red]a", 1.0, 0.5, -0.2), candidate("b", 0.2, 0.6, 0.3), candidate("c", -1.0, 0.0, 0.1)]


def test_explains_an_order() -> None:
    text = rendered(explanation_tables(THREE))
    assert rows(text, "1 [red]a") == ["1 [red]a 0.12% 34.5% 17.6s"]
    assert rows(text, "transform")[0] == "transform +1.000 +0.500 -0.200"
    assert rows(text, "× weight")[0] == "× weight 0.500 0.300 0.200"
    assert rows(text, "= product") == [
        "= product +0.610 +0.500 +0.150 -0.040",
        "= product +0.340 +0.100 +0.180 +0.060",
        "= product -0.480 -0.500 0.000 +0.020",
    ]
    assert rows(text, "lead over") == [
        "lead over 2 +0.270 +0.400 -0.030 -0.100",
        "lead over 3 +0.820 +0.600 +0.180 +0.040",
    ]
    assert "mean entropy of weights: 0.94 (0: one objective, 1: equal weights)" in " ".join(text.split())
    assert "negative↓" in text
    assert "lower is better" in text


def test_highlights_the_largest_lead() -> None:
    text = rendered(explanation_tables(THREE), color=True)
    assert [line.split(BOLD_GREEN)[1][:6] for line in text.splitlines() if BOLD_GREEN in line] == ["+0.400", "+0.600"]
    equal = rendered(explanation_tables([THREE[0], THREE[0]]), color=True)
    assert BOLD_GREEN not in equal


def test_close_candidates_have_four_decimals_and_zero_has_no_sign() -> None:
    text = rendered(explanation_tables([candidate("a", 1.0, 0.5, -0.2), candidate("b", 0.9998, 0.5, -0.20001)]))
    assert rows(text, "lead over") == ["lead over 2 +0.0001 +0.0001 0.0000 0.0000"]


@pytest.mark.parametrize("objectives", [9, 11, 30])
def test_objectives_that_do_not_fit_continue_in_another_table(objectives: int) -> None:
    """Each objective appears once, untruncated and in order; each table fits the width and has item and score."""
    names = ["is_click", "effective", "negative", "like", "follow", "comment", "forward", "profile_enter", "watch_time"]
    names += [f"objective_{index}" for index in range(9, objectives)]
    parts = [Contribution(name, True, 0.5, -1.2345 - index, 0.1) for index, name in enumerate(names)]
    tables = explanation_tables([Candidate("短视频0123456789abcdef", parts), Candidate("b", parts)])
    wide, narrow = rendered(tables, width=200), rendered(tables)
    assert all(cell_len(line.rstrip()) <= 100 for line in wide.splitlines())
    assert "…" not in narrow
    transforms = [number for line in rows(narrow, "transform")[::2] for number in line.split()[1:]]
    assert transforms == [f"{part.transform:+.4f}" for part in parts]
    assert len(rows(narrow, "= product")) == 2 * len(tables)
    assert (len(tables) == 1) == (objectives == 9)
    assert narrow.count("continued") == len(tables) - 1


def test_explains_one_or_no_candidate() -> None:
    assert explanation_tables([]) == []
    alone = rendered(explanation_tables(THREE[:1]))
    assert rows(alone, "= product") == ["= product +0.610 +0.500 +0.150 -0.040"]
    assert "lead over" not in alone
