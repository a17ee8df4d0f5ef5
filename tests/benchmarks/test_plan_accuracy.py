from collections.abc import Iterator

import plan_accuracy
import pytest
from plan_accuracy import KINDS, RankBytes, Settings, measure

from a2gen_rec.utils.distributed import DistributedContext, process_group

TINY = Settings(items=20_000, users=10_000, authors=3_000, tags=500, dim=32, windows=8, impressions=88, dtypes=["fp32"])


@pytest.fixture
def alone() -> Iterator[DistributedContext]:
    with process_group("cpu") as process:
        yield process


def test_two_ranks_hold_what_is_planned(alone: DistributedContext) -> None:
    report = measure(TINY, alone)
    (table,) = report.tables
    assert len(table.rows) == 2 * len(KINDS)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert report.figures["held_over_planned"] == pytest.approx(1, rel=0.01)
    assert report.targets[0].met


def test_what_is_furthest_off_decides(alone: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    good, short = RankBytes(100, 100, 120, 110), RankBytes(100, 80, 120, 150)
    monkeypatch.setattr(plan_accuracy, "start", lambda *_: [[good, good]] * 3 + [[good, short]])
    report = measure(TINY, alone)
    assert report.figures == {"held_over_planned": 0.8, "grown_over_planned": 1.25}
    assert [target.met for target in report.targets] == [False, False]
