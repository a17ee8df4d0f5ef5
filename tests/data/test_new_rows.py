"""Rows that a model does not know: masks against a reference, and tables that grew in a later increment."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import check_compatible_card, check_same_data
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.schema import VOCABULARY_DIR, VocabularyRows
from a2gen_rec.errors import DataError, UserError
from tests.helpers.random_card import make_card

values = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=4)


@given(st.lists(values, min_size=1, max_size=5), st.sets(st.integers(1, 12)))
def test_masks_equal_the_reference(drawn: list[list[tuple[int, float]]], new: set[int]) -> None:
    new_rows = NewRows({"tags": np.array(sorted(new), np.int64)})
    ids, weights = (np.array([pair[part] for bag in drawn for pair in bag]) for part in (0, 1))
    assert new_rows.mask("tags", ids).tolist() == [0 if row in new else row for row in ids.tolist()]
    assert new_rows.mask("other", ids) is ids
    bags = Bags(np.array([len(bag) for bag in drawn]), ids, weights.astype(np.float32))
    masked, first = new_rows.mask_bags("tags", bags), 0
    for bag, length in zip(drawn, masked.lengths, strict=True):
        part = slice(first, first + length)
        known = [pair for pair in bag if pair[0] not in new] or [(0, 1.0)]
        assert list(zip(masked.ids[part].tolist(), masked.weights[part].tolist(), strict=True)) == known
        first += length
    assert first == len(masked.ids) == len(masked.weights)


@pytest.fixture
def grown(tmp_path: Path) -> tuple[DatasetCard, DatasetCard, str]:
    """The card of a first dataset, that of its second increment, whose item table is larger, and its directory."""
    first = replace(make_card(), identity=DataIdentity(["a"], {"item_id": "x"}))
    features = [replace(x, cardinality=x.cardinality + 5 * (x.name == "item_id")) for x in first.features]
    state = {"item_id": VocabularyRows(5, 4, 1)}
    identity = DataIdentity(["a", "b", "c"], {"item_id": "y"})
    (tmp_path / VOCABULARY_DIR).mkdir()
    columns = {"row": [1, 2, 4, 41], "admitted": [0, 1, 0, 2], "reused": [False, False, False, True]}
    pq.write_table(pa.table(columns), tmp_path / VOCABULARY_DIR / "item_id.parquet")
    return first, replace(first, features=features, identity=identity, vocabularies=state), str(tmp_path)


def test_rows_admitted_after_the_training_data_are_new(grown: tuple[DatasetCard, DatasetCard, str]) -> None:
    first, later, data = grown
    since = NewRows.since(data, later, first)
    assert (since.rows["item_id"].tolist(), since.reused["item_id"].tolist()) == ([2, 41], [False, True])
    second = replace(first, identity=DataIdentity(["a", "b"]))
    assert NewRows.since(data, later, second).rows["item_id"].tolist() == [41]
    for known in (later, replace(first, identity=DataIdentity(["z"]))):
        assert NewRows.since(data, later, known).rows == {}
    Path(data, VOCABULARY_DIR, "item_id.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        NewRows.since(data, later, first)


def test_tables_may_grow_in_later_increments_only(grown: tuple[DatasetCard, DatasetCard, str]) -> None:
    first, later, data = grown
    check_compatible_card(later, first, data, "run")
    with pytest.raises(UserError, match="item_id has 40 rows, but 45 in run run"):
        check_compatible_card(
            replace(later, features=first.features), replace(first, features=later.features), data, "run"
        )
    other = replace(later, identity=DataIdentity(["b"], {"item_id": "x"}))
    with pytest.raises(UserError, match="item_id has 45 rows, but 40 in run run"):
        check_compatible_card(other, first, data, "run")
    with pytest.raises(UserError, match="item_id has grown to 45 rows"):
        check_same_data(later, first, data, "run")
