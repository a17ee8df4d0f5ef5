"""The latency benchmark on small requests, and that it refuses forms that differ."""

import pytest
import torch
from rank_latency import Answer, Settings, _check_equal, measure

from a2gen_rec.nn.marginals import ActionMarginals
from a2gen_rec.utils.distributed import process_group


def answer(probability: float, remainder: float = 0.0) -> Answer:
    values = torch.full((3, 4), probability)
    return Answer(torch.arange(3), ActionMarginals(values, torch.zeros(3, 4), torch.full((3,), remainder)))


def test_every_form_is_timed() -> None:
    threads = torch.get_num_threads()
    settings = Settings(
        candidates=[5, 12], histories=[8], requests=2, slow_requests=1, users=20, steps=2, dim=8, heads=2
    )
    with process_group("cpu") as process:
        times, ratios = measure(settings, process).tables
    torch.set_num_threads(threads)
    forms = ["factorized", "cached", "whole tree", "direct attention", "direct", "pointwise"]
    assert [row[:3] for row in times.rows] == [[count, 8, form] for count in (5, 12) for form in forms]
    assert all(isinstance(row[4], float) and row[4] > 0 for row in times.rows)
    assert [row[:2] for row in ratios.rows] == [[5, 8], [12, 8]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cached": answer(0.3)},
        {"direct": answer(0.6)},
        {"factorized": answer(0.498, 0.0)},
        {"factorized": answer(0.498, 0.002)},
    ],
)
def test_forms_that_differ_are_not_timed(wrong: dict[str, Answer]) -> None:
    right = {name: answer(0.5) for name in ("factorized", "cached", "whole tree", "direct")}
    _check_equal(right, 1e-3)
    with pytest.raises(RuntimeError, match="differ"):
        _check_equal(right | wrong, 1e-3)
