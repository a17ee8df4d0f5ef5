from pathlib import Path
from typing import Any

import embedding_lookup
import pytest
import torch
from embedding_lookup import LookupTables, Result, Settings, measure
from harness import Report, Timing

from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.processes

TINY = Settings(rows=[50, 300], dims=[8], lookups=64, repeats=1)


def run(process: DistributedContext, settings: Settings) -> Report:
    embedding_lookup.copy_bytes_per_s = lambda device: 1e9  # a large copy takes longer than the rest of the test
    return measure(settings, process)


def run_broken(process: DistributedContext, variant: str) -> str:
    """Return the error message of a run with a broken variant."""
    if variant == "reference":
        apply = LookupTables.apply_sparse_gradient

        def without_accumulator(self: LookupTables) -> None:
            apply(self)
            self.accumulator.zero_()

        LookupTables.apply_sparse_gradient = without_accumulator  # type: ignore[method-assign]
    else:
        forward = LookupTables.forward

        def shifted(self: LookupTables, name: str, ids: torch.Tensor) -> torch.Tensor:
            return forward(self, name, ids.roll(1) if name == variant else ids)

        LookupTables.forward = shifted  # type: ignore[method-assign]
    try:
        run(process, TINY)
    except AssertionError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [1, 2])
def test_measures_equal_variants(world_size: int, tmp_path: Path) -> None:
    for report in on_ranks(world_size, tmp_path, run, TINY):
        for table in report.tables:
            assert [row[:3] for row in table.rows] == [
                [rows, 8, distribution] for rows in (50, 300) for distribution in ("uniform", "Zipf")
            ]
            assert all(value > 0 for row in table.rows for value in row if not isinstance(value, str))
        assert f"{world_size} rank(s)" in report.tables[0].note


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("sharded", "sharded: looked-up rows differ"),
        ("dedup", "dedup: looked-up rows differ"),
        ("reference", "dedup: weights after an update differ"),
    ],
)
def test_rejects_wrong_variant(variant: str, message: str, tmp_path: Path) -> None:
    (error,) = on_ranks(1, tmp_path, run_broken, variant)
    assert error.startswith(message)


def test_skips_tables_above_memory_limit(tmp_path: Path) -> None:
    settings = Settings(rows=[50, 4_000_000], dims=[8], lookups=16, memory_gib=0.1, repeats=1)
    (report,) = on_ranks(1, tmp_path, run, settings)
    assert [row[0] for row in report.tables[0].rows] == [50, 50]
    assert "Skipped, more than 0.1 GiB: 4,000,000 × 8." in report.tables[0].note


def test_traffic_bytes() -> None:
    timing: dict[str, Timing] = {}
    result = Result(
        100, dim=8, distribution="Zipf", lookups=10, world_size=2, distinct=4, forward=timing, update=timing
    )
    assert result.forward_bytes == 2 * 10 * (32 + 32)
    assert result.update_bytes == 2 * (10 * (32 + 32 + 32) + 4 * 2 * (32 + 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rows": []}, "rows must be"), ({"dims": [6]}, "multiples of 4"), ({"zipf": 1.0}, "zipf 1.0 must be")],
)
def test_rejects_invalid_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)
