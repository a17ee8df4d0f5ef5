from pathlib import Path
from typing import Any

import embedding_lookup
import pytest
import torch
from embedding_lookup import Result, Settings, Tables, measure
from harness import Report, Timing

from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.distributed import on_ranks

TINY = Settings(rows=[50, 300], dims=[8], lookups=64, repeats=1)


def run(process: DistributedContext, settings: Settings) -> Report:
    embedding_lookup.copy_bytes_per_s = lambda device: 1e9  # a large copy takes longer than all else here
    return measure(settings, process)


def run_broken(process: DistributedContext, form: str) -> str:
    """The error that a wrong form ends with."""
    if form == "plain":
        right = Tables.apply_sparse_gradient

        def without_moment(self: Tables) -> None:
            right(self)
            self.moment.zero_()

        Tables.apply_sparse_gradient = without_moment  # type: ignore[method-assign]
    else:
        forward = Tables.forward

        def shifted(self: Tables, asked: str, ids: torch.Tensor) -> torch.Tensor:
            return forward(self, asked, ids.roll(1) if asked == form else ids)

        Tables.forward = shifted  # type: ignore[method-assign]
    try:
        run(process, TINY)
    except AssertionError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world", [1, 2])
def test_forms_agree_and_are_measured(world: int, tmp_path: Path) -> None:
    for report in on_ranks(world, tmp_path, run, TINY):
        for table in report.tables:
            assert [row[:3] for row in table.rows] == [
                [rows, 8, kind] for rows in (50, 300) for kind in ("uniform", "Zipf")
            ]
            assert all(value > 0 for row in table.rows for value in row if not isinstance(value, str))
        assert f"{world} rank(s)" in report.tables[0].note


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("sharded", "sharded: rows looked up differ"),
        ("dedup", "dedup: rows looked up differ"),
        ("plain", "dedup: weights after an update differ"),
    ],
)
def test_a_wrong_form_is_found(form: str, message: str, tmp_path: Path) -> None:
    (found,) = on_ranks(1, tmp_path, run_broken, form)
    assert found.startswith(message)


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    settings = Settings(rows=[50, 4_000_000], dims=[8], lookups=16, memory_gib=0.1, repeats=1)
    (report,) = on_ranks(1, tmp_path, run, settings)
    assert [row[0] for row in report.tables[0].rows] == [50, 50]
    assert "Left out, for they need more than 0.1 GiB: 4,000,000 × 8." in report.tables[0].note


def test_bytes_that_must_move() -> None:
    timing: dict[str, Timing] = {}
    result = Result(100, dim=8, ids="Zipf", lookups=10, world=2, distinct=4, forward=timing, update=timing)
    assert result.forward_bytes == 2 * 10 * (32 + 32)
    assert result.update_bytes == 2 * (10 * (32 + 32 + 32) + 4 * 2 * (32 + 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rows": []}, "rows must be"), ({"dims": [6]}, "multiples of 4"), ({"zipf": 1.0}, "zipf 1.0 must be")],
)
def test_unusable_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)
