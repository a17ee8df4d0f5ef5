"""Properties of simulated logs: every impression is counted once, and the division into files changes no byte."""

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import SimulateConfig
from a2gen_rec.errors import DataError
from a2gen_rec.simulation.simulator import simulate
from tests.helpers.properties import examples
from tests.helpers.raw_logs import write_files
from tests.helpers.stored import MACHINE_ZONES, file_digests, parquet_bytes, parts, prepare_stored, total_rows

CONFIG = SimulateConfig(users=12, items=15, authors=4, impressions_per_user=12, seed=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Return the tables of a log by file name, and the digests of its dataset."""
    folder = tmp_path_factory.mktemp("expected")
    simulate(str(folder / "raw"), CONFIG)
    tables = {file.stem: pq.read_table(file) for file in (folder / "raw").rglob("*.parquet")}
    card = prepare_stored(folder, "simulated", folder / "raw")
    assert total_rows(card) == len(tables["part-00000"])
    return tables, file_digests(folder / "out")


def rows_and_types(table):
    columns = [column.to_pylist() for column in table.columns]
    return list(zip(*columns, strict=True)), {field.name: [field.type] for field in table.schema}


@given(data=st.data(), machine=MACHINE_ZONES)
@examples(3, thorough=24)
def test_storage_changes_no_byte(tmp_path_factory, log, data, machine):
    tables, expected = log
    folder = tmp_path_factory.mktemp("stored")
    files = {}
    for name in ("users", "items"):
        rows, types = rows_and_types(tables[name])
        files[f"{name}.parquet"] = data.draw(parquet_bytes(data.draw(st.permutations(rows)), types))
    rows, types = rows_and_types(tables["part-00000"])
    for number, part in enumerate(data.draw(parts(rows, max_cuts=2))):
        files[f"impressions/{number}a[1].parquet"] = data.draw(parquet_bytes(part, types))
    raw = write_files(folder / "user_id=1", files)
    prepare_stored(folder, "simulated", raw, machine=machine)
    assert file_digests(folder / "out") == expected


@pytest.mark.parametrize("name", ["users", "items"])
def test_rejects_users_and_items_in_several_rows(tmp_path, log, name):
    tables = {**log[0]}
    files = {file if file in ("users", "items") else f"impressions/{file}": table for file, table in tables.items()}
    files[name] = files[name].take([*range(len(files[name])), 3])
    raw = write_files(tmp_path / "raw", {f"{file}.parquet": table for file, table in files.items()})
    key = f"{name[:-1]}_id"
    value = files[name][key][3].as_py()
    with pytest.raises(DataError, match=rf"{name}.parquet, field '{key}': {value} occurs in several rows"):
        prepare_stored(tmp_path, "simulated", raw)
