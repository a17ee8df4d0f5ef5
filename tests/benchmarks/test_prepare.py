from pathlib import Path

import numpy as np
import prepare
import pyarrow.parquet as pq
import pytest
import torch
from prepare import Settings, check, exponent, measure

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare as make_dataset
from a2gen_rec.errors import ConfigError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

ALONE = DistributedContext(0, 1, 1, torch.device("cpu"))


def test_measured_logs() -> None:
    ballast = np.ones(2**26)  # 512 MiB that are this process's and must not count as preparation's
    report = measure(Settings([3_000, 1_000], impressions_per_user=20, repeats=2), ALONE)
    (table,) = report.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    sizes = [row["impressions"] for row in rows]
    assert sizes == pytest.approx([1_000, 3_000], rel=0.5)
    for row in rows:
        assert row["s p10"] <= row["s median"] <= row["s p90"]
        assert row["impressions/s"] == pytest.approx(row["impressions"] / row["s median"])
        assert 0 < row["dataset MiB"] < 10
        assert 50 < row["peak MiB"] < ballast.nbytes / prepare.MIB
    assert report.figures["impressions_per_s"] == rows[-1]["impressions/s"]
    assert report.figures["time_exponent"] == pytest.approx(
        np.log(rows[1]["s median"] / rows[0]["s median"]) / np.log(sizes[1] / sizes[0])
    )


@pytest.mark.parametrize(
    ("settings", "process", "reason"),
    [
        (Settings([]), ALONE, "must be one positive number or more"),
        (Settings([100, 0]), ALONE, "must be one positive number or more"),
        (Settings([100]), DistributedContext(0, 2, 2, torch.device("cpu")), "one rank, not 2"),
    ],
)
def test_impossible_settings(settings: Settings, process: DistributedContext, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(settings, process)


def test_datasets_that_are_not_the_logs(tmp_path: Path) -> None:
    log, other, dataset = tmp_path / "log", tmp_path / "other", tmp_path / "dataset"
    for folder, seed in ((log, 0), (other, 1)):
        simulate(str(folder), SimulateConfig(users=40, items=30, authors=5, impressions_per_user=20, seed=seed))
    make_dataset("simulated", str(log), str(dataset), PrepareConfig(num_partitions=2))
    check(log, dataset)
    with pytest.raises(RuntimeError, match="are not the log's"):
        check(other, dataset)
    # As many impressions of the same users, at other times.
    file = log / "impressions" / "part-00000.parquet"
    table = pq.read_table(file)
    later = [begin + 1 for begin in table["ts_ms"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("ts_ms"), "ts_ms", [later]), file)
    with pytest.raises(RuntimeError, match="first windows of train are not of the log"):
        check(log, dataset)


def test_exponent_of_a_power() -> None:
    assert exponent([1, 10, 1000], [3, 3 * 10**0.5, 3 * 1000**0.5]) == pytest.approx(0.5)
