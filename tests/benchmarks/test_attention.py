from collections.abc import Callable

import attention
import pytest
import torch
from attention import Measurement, Settings, Workload, growth_exponents, measure
from peak_memory import peak_bytes
from torch import Tensor

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn import attention as nn_attention
from a2gen_rec.nn.attention import AttentionConfig, ContextAwareAttention
from a2gen_rec.utils.distributed import DistributedContext

SINGLE = DistributedContext(0, 1, 1, torch.device("cpu"))
TINY = {"histories": [3, 6], "contexts": [12, 24], "dim": 8, "heads": 2, "repeats": 1}


def test_measures_all_variants() -> None:
    report = measure(Settings(**TINY), SINGLE)
    forward, both, memory = report.tables
    assert [row[:2] for row in forward.rows] == [[12, 3], [12, 6], [24, 3], [24, 6]]
    for table in (forward, both, memory):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(value, int | float) and value > 0 for row in table.rows for value in row)
    assert report.goals[0].measured.startswith("T^")
    assert report.metrics["peak_exponent_n_reference"] > report.metrics["peak_exponent_n_factorized"]


def test_skips_reference_above_memory_limit() -> None:
    report = measure(Settings(**TINY, max_reference_gib=0), SINGLE)
    assert all(row[-3:] == [None] * 3 for row in report.tables[0].rows)
    assert "more than 0 GiB" in report.tables[2].note
    assert report.goals == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, mask: weights * (1 + 0.1 * mask[:, None]), "factorized and reference differ in the output"),
        (lambda weights, mask: weights.detach(), "factorized and reference differ in the gradient"),
    ],
)
def test_rejects_wrong_variant_before_timing(
    change: Callable[[Tensor, Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = nn_attention.factorized_weights
    monkeypatch.setattr(
        nn_attention,
        "factorized_weights",
        lambda s, a, mask: [change(weights, mask) for weights in correct(s, a, mask)],
    )
    monkeypatch.setattr(attention, "interleave", pytest.fail)
    with pytest.raises(AssertionError, match=message):
        measure(Settings(**TINY), SINGLE)


def test_rejects_sdpa_without_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, scale: correct(q, k, v))
    with pytest.raises(AssertionError, match="SDPA and reference differ in the output"):
        measure(Settings(**TINY), SINGLE)


def test_gradients_do_not_accumulate() -> None:
    workload = Workload(ContextAwareAttention(8, 8, AttentionConfig(8, 2)), contexts=5, history=4, device=SINGLE.device)
    first, second = workload.forward_backward("reference"), workload.forward_backward("reference")
    assert len(first) == 3 + sum(1 for _ in workload.attention.parameters())
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)


def test_growth_exponents() -> None:
    sizes = [(t, n) for t in (100, 200) for n in (10, 20, 400)]
    measurements = [
        Measurement(
            t, n, {}, {}, {"squared": t * n**2, "linear": 7 * t * n} if n < t else {"squared": 1, "linear": 1}, 0
        )
        for t, n in sizes
    ]
    assert growth_exponents(measurements, "squared") == pytest.approx((1, 2))
    assert growth_exponents(measurements, "linear") == pytest.approx((1, 1))
    assert growth_exponents(measurements[:2], "linear") is None, "a single T does not determine its exponent"
    assert growth_exponents(measurements, "absent") is None


def test_peak_counts_live_tensors() -> None:
    def run() -> None:
        for _ in range(3):
            first = torch.ones(250_000)
            second = first + 1
            del first, second

    assert peak_bytes(run, SINGLE.device) == pytest.approx(2 * 1_000_000, abs=100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"contexts": []}, "contexts must be"), ({"heads": 0}, "heads must be"), ({"dim": 30}, "dim 30 must be a mult")],
)
def test_rejects_invalid_settings(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)
