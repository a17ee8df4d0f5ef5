"""The bound on what can be told of times: against distributions whose medians are known."""

import numpy as np
import pytest
from time_prediction_bound import Settings, check, errors, measure

from a2gen_rec.errors import UserError
from a2gen_rec.utils.distributed import process_group


def test_errors_of_known_distributions() -> None:
    """Times uniform around a centre of the impression: a quarter of the width is left to whoever knows the centre."""
    rng = np.random.default_rng(0)
    centre = np.array([1.0, 1.0, 3.0, 7.0])
    learnt, held = (centre + rng.random((20_001, 4)) - 0.5 for _ in range(2))
    learnt[rng.random(learnt.shape) < 0.3] = np.nan
    own, of_item, one = errors(learnt, held, item=np.array([5, 5, 6, 6]))
    assert own == pytest.approx(0.25, abs=0.01)
    assert of_item == pytest.approx((0.25 + 0.25 + 2 + 2) / 4, abs=0.05)
    assert one == pytest.approx(np.abs(held - np.nanmedian(learnt)).mean(), rel=1e-6)


def test_frequencies_that_are_not_the_probabilities_are_refused() -> None:
    happened = np.zeros((100, 2, 50), bool)
    happened[:50] = True
    check(happened, np.full((2, 50), 0.5))
    with pytest.raises(UserError, match="are not their exact probabilities"):
        check(happened, np.full((2, 50), 0.6))


def test_who_knows_more_errs_less() -> None:
    with process_group("cpu") as process:
        report = measure(Settings(impressions=200, draws=800, users=200, items=50), process)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["like", "comment", "follow", "collect", "forward", "exit"]
    _, own, of_item, one = table.rows[-1]
    assert own < of_item < one
