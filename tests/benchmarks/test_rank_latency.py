"""The latency benchmark measures small requests and rejects variants that differ."""

import pytest
import torch
from rank_latency import Ranking, Settings, _check_equal, measure

from a2gen_rec.nn.marginals import ActionMarginals
from a2gen_rec.utils.distributed import process_group

pytestmark = pytest.mark.training


def ranking(probability: float, unexplored_mass: float = 0.0) -> Ranking:
    values = torch.full((3, 4), probability)
    return Ranking(torch.arange(3), ActionMarginals(values, torch.zeros(3, 4), torch.full((3,), unexplored_mass)))


def test_times_every_variant() -> None:
    num_threads = torch.get_num_threads()
    settings = Settings(
        candidates=[5, 12], histories=[8], requests=2, slow_requests=1, users=20, steps=2, dim=8, num_heads=2
    )
    with process_group("cpu") as process:
        times, ratios = measure(settings, process).tables
    torch.set_num_threads(num_threads)
    variants = ["factorized", "cached", "full tree", "reference attention", "reference", "pointwise"]
    assert [row[:3] for row in times.rows] == [[count, 8, variant] for count in (5, 12) for variant in variants]
    assert all(isinstance(row[4], float) and row[4] > 0 for row in times.rows)
    assert [row[:2] for row in ratios.rows] == [[5, 8], [12, 8]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cached": ranking(0.3)},
        {"reference": ranking(0.6)},
        {"factorized": ranking(0.498, 0.0)},
        {"factorized": ranking(0.498, 0.002)},
    ],
)
def test_rejects_different_variants(wrong: dict[str, Ranking]) -> None:
    equal = {name: ranking(0.5) for name in ("factorized", "cached", "full tree", "reference")}
    _check_equal(equal, 1e-3)
    with pytest.raises(RuntimeError, match="differ"):
        _check_equal(equal | wrong, 1e-3)
