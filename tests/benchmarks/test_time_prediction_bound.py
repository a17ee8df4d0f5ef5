"""The bound of the time errors, checked with distributions of known medians."""

import numpy as np
import pytest
from time_prediction_bound import Settings, check_frequencies, measure, median_errors

from a2gen_rec.errors import UserError
from a2gen_rec.utils.distributed import process_group

pytestmark = pytest.mark.training


def test_errors_of_known_distributions() -> None:
    """Times are uniform around the impression's center: the error of the center is a quarter of the width."""
    rng = np.random.default_rng(0)
    center = np.array([1.0, 1.0, 3.0, 7.0])
    fit, held_out = (center + rng.random((20_001, 4)) - 0.5 for _ in range(2))
    fit[rng.random(fit.shape) < 0.3] = np.nan
    per_impression, per_item, overall = median_errors(fit, held_out, item=np.array([5, 5, 6, 6]))
    assert per_impression == pytest.approx(0.25, abs=0.01)
    assert per_item == pytest.approx((0.25 + 0.25 + 2 + 2) / 4, abs=0.05)
    assert overall == pytest.approx(np.abs(held_out - np.nanmedian(fit)).mean(), rel=1e-6)


def test_rejects_wrong_frequencies() -> None:
    occurred = np.zeros((100, 2, 50), bool)
    occurred[:50] = True
    check_frequencies(occurred, np.full((2, 50), 0.5))
    with pytest.raises(UserError, match="differ from their exact probabilities"):
        check_frequencies(occurred, np.full((2, 50), 0.6))


def test_errors_decrease_with_information() -> None:
    with process_group("cpu") as process:
        report = measure(Settings(impressions=200, draws=800, users=200, items=50), process)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["like", "comment", "follow", "collect", "forward", "exit"]
    _, per_impression, per_item, overall = table.rows[-1]
    assert per_impression < per_item < overall
