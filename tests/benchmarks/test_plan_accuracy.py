from collections.abc import Iterator

import plan_accuracy
import pytest
from plan_accuracy import SHARDING_TYPES, RankBytes, Settings, measure

from a2gen_rec.utils.distributed import DistributedContext, process_group
from tests.helpers.distributed import fork_launched_ranks

pytestmark = pytest.mark.processes

TINY = Settings(items=20_000, users=10_000, authors=3_000, tags=500, dim=32, windows=8, impressions=88, dtypes=["fp32"])


@pytest.fixture
def single_process() -> Iterator[DistributedContext]:
    with process_group("cpu") as process:
        yield process


def test_two_ranks_allocate_planned_bytes(single_process: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_launched_ranks(monkeypatch, plan_accuracy)
    report = measure(TINY, single_process)
    (table,) = report.tables
    assert len(table.rows) == 2 * len(SHARDING_TYPES)
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert report.metrics["tables_over_planned"] == pytest.approx(1, rel=0.01)
    assert report.goals[0].met


def test_largest_deviation_decides_goals(single_process: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    good, short = RankBytes(100, 100, 120, 110), RankBytes(100, 80, 120, 150)
    monkeypatch.setattr(plan_accuracy, "launch_ranks", lambda *_: [[good, good]] * 3 + [[good, short]])
    report = measure(TINY, single_process)
    assert report.metrics == {"tables_over_planned": 0.8, "process_over_planned": 1.25}
    assert [goal.met for goal in report.goals] == [False, False]
