import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import scaling
import torch
import torch.distributed as dist
from scaling import (
    Job,
    RankResult,
    Settings,
    TrafficCounter,
    check_losses,
    check_truncated_windows,
    measure,
    read_windows,
    run_on_ranks,
)
from simulated_data import make_dataset

from a2gen_rec.config import Config
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext, process_group
from tests.helpers.distributed import fork_launched_ranks, on_ranks

pytestmark = pytest.mark.processes

SIZES = {
    "ranks": [1, 2],
    "rows": [60, 500],
    "histories": [2, 9],
    "history": 5,
    "windows": 4,
    "steps": 3,
    "passes": 1,
    "rounds": 1,
    "users": 30,
    "items": 40,
    "impressions_per_user": 120,
}
TINY = Settings(**SIZES)


@pytest.fixture(scope="module")
def dataset() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield make_dataset(Path(folder, "dataset"), TINY.users, TINY.items, TINY.impressions_per_user, history=9)


@pytest.fixture
def single_process() -> Iterator[DistributedContext]:
    with process_group("cpu") as process:
        yield process


def test_measures_all_sweeps(single_process: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_launched_ranks(monkeypatch, scaling)
    report = measure(TINY, single_process)
    ranks, rows, histories = report.tables
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert [str(row[0])[0] for row in ranks.rows] == ["1", "2"]
    assert [row[0] for row in rows.rows] == [60, 500]
    assert [row[0] for row in histories.rows] == [2, 9]
    assert histories.rows[0][1] == 4 * (2 + 1 + 64)
    sent = ranks.columns.index("all-to-all kB/target")
    assert ranks.rows[0][sent : sent + 2] == [0, 0]
    assert all(value > 0 for value in ranks.rows[1][sent : sent + 2])  # type: ignore[operator]
    assert report.metrics["targets_per_s_2_ranks"] == ranks.rows[1][2]


def test_labels_oversubscribed_ranks(monkeypatch: pytest.MonkeyPatch, single_process: DistributedContext) -> None:
    monkeypatch.setattr(scaling, "num_cores", lambda: 2)
    results = {ranks: [[RankResult(ranks, 1, [0.5], [2.0, 4.0, 4.0], {}, 100)]] for ranks in (2, 4)}
    for rounds in results.values():
        rounds[0][0].sent = scaling.Counter({"all-to-all": 2000, "all-reduce": 500})
    table, metrics = scaling.sweep_ranks(results, TINY, single_process)
    assert [row[0] for row in table.rows] == ["2", "4, oversubscribed"]
    assert table.rows[0][2] == 25
    assert metrics["kb_per_target_4_ranks"] == 0.025


def run(process: DistributedContext, dataset: str, equal: bool) -> RankResult:
    if not equal:
        scaling.init_identical = lambda built, config: None
    return run_on_ranks(dataset, TINY, process)


def test_rejects_unequal_losses(dataset: str, tmp_path: Path) -> None:
    equal_rounds, unequal_rounds = (
        {ranks: [on_ranks(ranks, tmp_path, run, dataset, equal)] for ranks in (1, 2)} for equal in (True, False)
    )
    assert len(set(equal_rounds[1][0][0].losses)) == 3
    check_losses(equal_rounds)
    with pytest.raises(AssertionError, match="losses on 2 and on 1 ranks differ"):
        check_losses(unequal_rounds)


def test_rejects_history_truncated_too_far(dataset: str, single_process: DistributedContext) -> None:
    sample, config = read_windows(dataset, TINY), Config()
    config.model.max_history = 5
    check_truncated_windows(Job(sample.with_history(5), config, TINY, single_process), sample, TINY)
    with pytest.raises(AssertionError, match="contexts of targets in truncated and full windows differ"):
        check_truncated_windows(Job(sample.with_history(3), config, TINY, single_process), sample, TINY)


def communicate(process: DistributedContext) -> dict[str, float]:
    splits = [[1, 5], [3, 2]]
    sent = torch.ones(sum(splits[process.rank]), 2)
    received = torch.empty(splits[0][process.rank] + splits[1][process.rank], 2)
    with TrafficCounter() as counter:
        receive_splits = [splits[0][process.rank], splits[1][process.rank]]
        dist.all_to_all_single(received, sent, receive_splits, splits[process.rank])
        dist.all_to_all_single(torch.empty(4), torch.ones(4))
        dist.all_reduce(torch.ones(10))
    return dict(counter.sent)


def test_counts_bytes_sent_to_other_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, communicate)
    assert first == {"all-to-all": pytest.approx(5 * 2 * 4 + 8), "all-reduce": 40}
    assert second == {"all-to-all": pytest.approx(3 * 2 * 4 + 8), "all-reduce": 40}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"ranks": [8]}, "windows 4 must be at least the number of ranks 8"), ({"rows": []}, "rows must be")],
)
def test_rejects_invalid_settings(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**{**SIZES, **wrong})
