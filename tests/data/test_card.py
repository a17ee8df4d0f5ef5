"""A dataset card is read as it was written, or refused: its numbers become SQL where the model is served."""

from typing import Any

import pytest

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import DataError
from tests.helpers.cards import make_card

SQL = "0::DOUBLE OR EXISTS (FROM read_text('/etc/hostname')) OR 0"


def test_a_card_is_read_as_it_was_written() -> None:
    assert DatasetCard.from_dict(make_card().to_dict()) == make_card()


@pytest.mark.parametrize("wrong", [SQL, None, [1.0]])
@pytest.mark.parametrize(
    "place",
    [
        ("feedback", "glance_s"),
        ("feedback", "duration_edges_s", 0),
        ("feedback", "median_watch_s", 2),
        ("features", 5, "boundaries", 1),
        ("features", 3, "cardinality"),
        ("utc_offset_hours",),
        ("session_gap_s",),
    ],
)
def test_what_is_no_number_is_refused(place: tuple[Any, ...], wrong: Any) -> None:
    raw = make_card().to_dict()
    holder: Any = raw
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = wrong
    with pytest.raises(DataError, match="invalid dataset card"):
        DatasetCard.from_dict(raw)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_sql_could_not_compare_with_is_refused(wrong: float) -> None:
    raw = make_card().to_dict()
    raw["feedback"]["median_watch_s"][1] = wrong
    with pytest.raises(DataError, match="is not finite"):
        DatasetCard.from_dict(raw)
