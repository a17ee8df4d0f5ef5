"""Identity of datasets: digests of encodings, and the check of a dataset against a run's training data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data import digests
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.compatibility import check_compatible_card, check_same_data
from a2gen_rec.data.digests import input_digests, vocabulary_digest
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.schema import Feature
from a2gen_rec.errors import UserError
from tests.helpers.cards import make_rich_card

VALUES = st.lists(st.text(max_size=3), unique=True, max_size=6)
CARD = make_rich_card()


def write_vocabulary(file: Path, values: list[str], first_row: int = 1, **options: Any) -> Path:
    rows = range(first_row, first_row + len(values))
    table = {"value": pa.array(values, options.pop("type", pa.string())), "row": pa.array(rows, pa.int64())}
    pq.write_table(pa.table(table | options.pop("columns", {})), file, **options)
    return file


@given(first=VALUES, second=VALUES)
def test_vocabularies_have_equal_digests_if_equal(
    first: list[str], second: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "vocabulary.parquet"
    one, two = (vocabulary_digest(write_vocabulary(file, values)) for values in (first, second))
    assert (one == two) == (first == second)
    assert not first or vocabulary_digest(write_vocabulary(file, first, first_row=2)) != one


def test_vocabulary_digest_is_independent_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither layout nor other columns matter; values are hashed in batches."""
    values, file = [f"é{number}" * (number % 3) + str(number) for number in range(50)], tmp_path / "v.parquet"
    expected = vocabulary_digest(write_vocabulary(file, values))
    monkeypatch.setattr(digests, "BATCH_ROWS", 7)
    variants: list[dict[str, Any]] = [
        {},
        {"row_group_size": 9, "compression": "zstd"},
        {"use_dictionary": False, "type": pa.large_string()},
        {"columns": {"count": list(range(50))}},
    ]
    for options in variants:
        assert vocabulary_digest(write_vocabulary(file, values, **options)) == expected


def identified(card: DatasetCard, *lineage: str, **vocabularies: str) -> DatasetCard:
    return replace(card, identity=DataIdentity(list(lineage), input_digests(card, vocabularies)))


def with_feature(name: str, **changes: Any) -> Callable[[DatasetCard], DatasetCard]:
    def change(card: DatasetCard) -> DatasetCard:
        features = [replace(each, **changes) if each.name == name else each for each in card.features]
        return replace(card, features=features)

    return change


def with_part(part: str, index: int, **changes: Any) -> Callable[[DatasetCard], DatasetCard]:
    def change(card: DatasetCard) -> DatasetCard:
        entries = list(getattr(card, part))
        entries[index] = replace(entries[index], **changes)
        return replace(card, **{part: entries})

    return change


OTHER_ENCODINGS: dict[str, tuple[Callable[[DatasetCard], DatasetCard], str]] = {
    "edges": (with_feature("session_gap", boundaries=[5.0, 10.0, 21.0]), "session_gap encodes values differently"),
    "hash size": (with_feature("author_id", cardinality=10), "author_id encodes values differently"),
    "level": (with_feature("tab", level="item"), "tab encodes values differently"),
    "session gap": (lambda card: replace(card, session_gap_s=26.0), "session_position encodes values differently"),
    "feedback": (
        lambda card: replace(card, feedback=replace(card.feedback, glance_s=4.0)),
        "previous_feedback encodes values differently",
    ),
    "time zone": (
        lambda card: replace(card, time_features=["tab"], utc_offset_hours=card.utc_offset_hours + 8),
        "tab encodes values differently",
    ),
    "number": (with_part("numbers", 1, mean=2.5), "price encodes values differently"),
    "vector": (with_part("vectors", 0, rms=2.5), "content encodes values differently"),
    "statistic": (with_part("statistics", 2, prior=1.9), "statistics of author_id encodes values differently"),
    "no statistics": (lambda card: replace(card, statistics=[]), "statistics of item_id is missing"),
    "no feature": (lambda card: replace(card, features=card.features[1:]), "user_id is missing"),
    "new feature": (
        lambda card: replace(card, features=[*card.features, Feature("mood", "context", "hash", 4)]),
        "mood is an additional input",
    ),
}


@pytest.mark.parametrize("name", OTHER_ENCODINGS)
def test_another_encoding_is_refused_by_name(name: str) -> None:
    change, difference = OTHER_ENCODINGS[name]
    trained = identified(CARD, "a", item_id="1")
    with pytest.raises(UserError) as caught:
        check_compatible_card(identified(change(CARD), "b", item_id="1"), trained, "day2", "run")
    expected = (
        f"day2: belongs to another lineage than run run: {difference}; use the run's dataset or a later increment"
    )
    assert str(caught.value) == expected


def test_another_vocabulary_of_the_same_size_is_refused() -> None:
    trained, other = identified(CARD, "a", item_id="1"), identified(CARD, "b", item_id="2")
    assert trained.features == other.features
    with pytest.raises(UserError, match=r"day2: .* lineage than run run: item_id encodes values differently"):
        check_compatible_card(other, trained, "day2", "run")


def test_equal_encodings_are_compatible_but_other_training_data() -> None:
    """Other targets of a log, or other measurements, leave the meaning of every row as it is."""
    trained = identified(CARD, "a", item_id="1")
    other = identified(with_feature("tags", mean_values=2.5)(replace(CARD, base_rate={})), "b", item_id="1")
    check_compatible_card(other, trained, "data", "run")
    check_same_data(trained, trained, "data", "run")
    with pytest.raises(UserError, match=r"run: was trained on other data .data_digest a, now b.; restore them"):
        check_same_data(other, trained, "data", "run")


def test_a_later_increment_is_accepted_and_an_earlier_one_refused() -> None:
    first, second, fork = (
        identified(CARD, *lineage, item_id=lineage[-1]) for lineage in (("a",), ("a", "b"), ("a", "c"))
    )
    for check in (check_compatible_card, check_same_data):
        check(second, first, "data", "run")
        for current, trained in ((first, second), (fork, second)):
            with pytest.raises(UserError, match="item_id encodes values differently"):
                check(current, trained, "data", "run")


def test_a_later_increment_has_the_shapes_of_the_run() -> None:
    """Smaller tables, other statistics or orders are refused; vocabularies may grow."""
    trained = identified(CARD, "a")
    for change, difference in (
        (with_feature("item_id", cardinality=39), "item_id has 39 rows, but 40 in run run"),
        (with_part("statistics", 0, prior=0.5), "statistic impressions of item_id is defined differently than in run"),
        (lambda card: replace(card, features=card.features[::-1]), "inputs are in another order than in run run"),
    ):
        with pytest.raises(UserError, match=difference):
            check_compatible_card(identified(change(CARD), "a", "b"), trained, "data", "run")


def test_equal_files_with_another_encoding_are_another_lineage() -> None:
    """The card is not among the files of the data digest."""
    change, difference = OTHER_ENCODINGS["time zone"]
    with pytest.raises(UserError, match=difference):
        check_compatible_card(identified(change(CARD), "a"), identified(CARD, "a"), "data", "run")


def test_unknown_identities_continue_nothing() -> None:
    assert not DataIdentity().continues(DataIdentity())
    assert not DataIdentity(["a"]).continues(DataIdentity())
    assert DataIdentity().data_digest == ""
