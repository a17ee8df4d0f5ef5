import shutil
from pathlib import Path

import numpy as np
import prepare
import pyarrow.parquet as pq
import pytest
import torch
from harness import Report
from prepare import Settings, check_dataset, growth_exponent, measure, measure_files

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare as make_dataset
from a2gen_rec.errors import ConfigError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

SINGLE = DistributedContext(0, 1, 1, torch.device("cpu"))


def test_measures_logs() -> None:
    ballast = np.ones(2**26)  # 512 MiB of this process, which must not count
    report = measure(Settings([3_000, 1_000], impressions_per_user=20, files=0, repeats=1), SINGLE)
    (table,) = report.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    sizes = [row["impressions"] for row in rows]
    assert sizes == pytest.approx([1_000, 3_000], rel=0.5)
    for row in rows:
        assert row["p10 s"] <= row["median s"] <= row["p90 s"]
        assert row["impressions/s"] == pytest.approx(row["impressions"] / row["median s"])
        assert 0 < row["dataset MiB"] < 10
        assert 50 < row["peak MiB"] < ballast.nbytes / prepare.MIB
    assert report.metrics["impressions_per_s"] == rows[-1]["impressions/s"]
    assert report.metrics["time_exponent"] == pytest.approx(
        np.log(rows[1]["median s"] / rows[0]["median s"]) / np.log(sizes[1] / sizes[0])
    )


def test_measures_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: prepare.Preparation, settings: Settings) -> None:
        shutil.rmtree(self.dataset, ignore_errors=True)
        _, _, spec = self.source
        make_dataset("generic", str(self.log), str(self.dataset), PrepareConfig(num_partitions=2), spec)
        self.peaks.append(float(len(list(self.log.iterdir()))))

    monkeypatch.setattr(prepare.Preparation, "run", run)
    report = Report([])
    measure_files(Settings(files=30, repeats=1), report)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["csv", "parquet"]
    for (file_format, one, many, ms, peak), goal in zip(table.rows, report.goals, strict=True):
        assert ms == pytest.approx(1000 * (many - one) / 30) == report.metrics[f"{file_format}_ms_per_file"]
        assert peak == 30
        assert goal.met == (ms < 2)


@pytest.mark.parametrize(
    ("settings", "process", "reason"),
    [
        (Settings([]), SINGLE, "must be one or more positive numbers"),
        (Settings([100, 0]), SINGLE, "must be one or more positive numbers"),
        (Settings([100]), DistributedContext(0, 2, 2, torch.device("cpu")), "use one rank, not 2"),
    ],
)
def test_rejects_invalid_settings(settings: Settings, process: DistributedContext, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(settings, process)


def test_rejects_dataset_of_another_log(tmp_path: Path) -> None:
    log, other, dataset = tmp_path / "log", tmp_path / "other", tmp_path / "dataset"
    for folder, seed in ((log, 0), (other, 1)):
        simulate(str(folder), SimulateConfig(users=40, items=30, authors=5, impressions_per_user=20, seed=seed))
    make_dataset("simulated", str(log), str(dataset), PrepareConfig(num_partitions=2))
    check_dataset(log, dataset)
    with pytest.raises(RuntimeError, match="do not add up to"):
        check_dataset(other, dataset)
    # Equally many impressions of the same users at other times.
    file = log / "impressions" / "part-00000.parquet"
    table = pq.read_table(file)
    later = [ts_ms + 1 for ts_ms in table["ts_ms"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("ts_ms"), "ts_ms", [later]), file)
    with pytest.raises(RuntimeError, match="first windows of train contain impressions that are not in the log"):
        check_dataset(log, dataset)


def test_growth_exponent() -> None:
    assert growth_exponent([1, 10, 1000], [3, 3 * 10**0.5, 3 * 1000**0.5]) == pytest.approx(0.5)
