from collections.abc import Callable

import attention
import pytest
import torch
from attention import Cell, Settings, Work, growth, measure
from rss import peak_bytes
from torch import Tensor

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn import attention as nn_attention
from a2gen_rec.nn.attention import ContextAwareAttention
from a2gen_rec.utils.distributed import DistributedContext

ALONE = DistributedContext(0, 1, 1, torch.device("cpu"))
TINY = {"histories": [3, 6], "contexts": [12, 24], "dim": 8, "heads": 2, "repeats": 1}


def test_all_forms_are_measured() -> None:
    report = measure(Settings(**TINY), ALONE)
    forward, both, memory = report.tables
    assert [row[:2] for row in forward.rows] == [[12, 3], [12, 6], [24, 3], [24, 6]]
    for table in (forward, both, memory):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(value, int | float) and value > 0 for row in table.rows for value in row)
    assert report.targets[0].measured.startswith("T^")
    assert report.figures["peak_power_of_n_direct"] > report.figures["peak_power_of_n_factorized"]


def test_what_is_too_large_is_left_out() -> None:
    report = measure(Settings(**TINY, direct_gib=0), ALONE)
    assert all(row[-3:] == [None] * 3 for row in report.tables[0].rows)
    assert "more than 0 GiB" in report.tables[2].note
    assert report.targets == []


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda weights, mask: weights * (1 + 0.1 * mask[:, None]), "factorized and direct differ in the output"),
        (lambda weights, mask: weights.detach(), "factorized and direct differ in the gradient"),
    ],
)
def test_a_wrong_form_is_not_timed(
    change: Callable[[Tensor, Tensor], Tensor], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = nn_attention.factorized_weights
    monkeypatch.setattr(
        nn_attention, "factorized_weights", lambda s, a, mask: [change(each, mask) for each in right(s, a, mask)]
    )
    monkeypatch.setattr(attention, "interleave", pytest.fail)
    with pytest.raises(AssertionError, match=form):
        measure(Settings(**TINY), ALONE)


def test_sdpa_without_the_mask_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, scale: right(q, k, v))
    with pytest.raises(AssertionError, match="SDPA and direct differ in the output"):
        measure(Settings(**TINY), ALONE)


def test_gradients_do_not_add_up() -> None:
    work = Work(ContextAwareAttention(8, 8, 8, 2), contexts=5, history=4, device=ALONE.device)
    first, again = work.both("direct"), work.both("direct")
    assert len(first) == 3 + sum(1 for _ in work.attention.parameters())
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_powers_of_growth() -> None:
    sizes = [(t, n) for t in (100, 200) for n in (10, 20, 400)]
    cells = [
        Cell(t, n, {}, {}, {"squared": t * n**2, "linear": 7 * t * n} if n < t else {"squared": 1, "linear": 1}, 0)
        for t, n in sizes
    ]
    assert growth(cells, "squared") == pytest.approx((1, 2))
    assert growth(cells, "linear") == pytest.approx((1, 1))
    assert growth(cells[:2], "linear") is None, "one T tells nothing of T"
    assert growth(cells, "absent") is None


def test_peak_is_of_what_lives_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            one = torch.ones(250_000)
            two = one + 1
            del one, two

    assert peak_bytes(run, ALONE.device) == pytest.approx(2 * 1_000_000, abs=100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"contexts": []}, "contexts must be"), ({"heads": 0}, "heads must be"), ({"dim": 30}, "dim 30 must be a mult")],
)
def test_unusable_settings(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)
