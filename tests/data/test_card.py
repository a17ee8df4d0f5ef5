"""Dataset cards: round trip and rejection of invalid numbers, which become SQL in the service."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.errors import DataError
from tests.helpers.cards import make_card

SQL = "0::DOUBLE OR EXISTS (FROM read_text('/etc/hostname')) OR 0"


def test_round_trip() -> None:
    assert DatasetCard.from_dict(make_card().to_dict()) == make_card()


@pytest.mark.parametrize("invalid", [SQL, None, [1.0]])
@pytest.mark.parametrize(
    "path",
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
def test_rejects_values_that_are_not_numbers(path: tuple[Any, ...], invalid: Any) -> None:
    raw = make_card().to_dict()
    holder: Any = raw
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = invalid
    with pytest.raises(DataError, match="invalid dataset card"):
        DatasetCard.from_dict(raw)


@pytest.mark.parametrize("invalid", [float("nan"), float("inf")])
def test_rejects_numbers_that_are_not_finite(invalid: float) -> None:
    raw = make_card().to_dict()
    raw["feedback"]["median_watch_s"][1] = invalid
    with pytest.raises(DataError, match="is not finite"):
        DatasetCard.from_dict(raw)


def test_the_command_is_no_part_of_the_identity() -> None:
    card = replace(make_card(), identity=DataIdentity(["1e5"]))  # must stay text in YAML
    assert replace(card, command="a2gen prepare").without_command() == card.without_command()
    assert replace(card, identity=DataIdentity(["2"])).without_command() != card.without_command()


def test_round_trip_of_digests(tmp_path: Path) -> None:
    card = replace(make_card(), identity=DataIdentity(["12345678", "1e5"], {"tab": "0123", "no": "12_3"}))
    card.save(str(tmp_path))
    assert DatasetCard.load(str(tmp_path)) == card


def test_rejects_a_card_without_identity() -> None:
    raw = make_card().to_dict()
    del raw["identity"]["lineage"]
    with pytest.raises(DataError, match=r"invalid dataset card .'lineage'"):
        DatasetCard.from_dict(raw)
