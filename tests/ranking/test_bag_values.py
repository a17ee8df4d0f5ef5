"""Multi-valued features in requests: accepted forms, refusals, and the schema of the service."""

import math

import pytest
from pydantic import ValidationError

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.bag_values import bag_entries, check_bag, known_rows
from a2gen_rec.serving.backfill import _request_value
from a2gen_rec.serving.http.schema import MAX_VALUES, RankRequest


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([], None),
        (["b", "a", "b", ""], [("a", 1.0), ("b", 1.0)]),
        ([3, 2.0], [("2", 1.0), ("3", 1.0)]),
        ({"b": 2, "a": 0.5, "c": 0}, [("a", 0.5), ("b", 2.0)]),
    ],
)
def test_accepted_values(value, expected):
    check_bag(value, "tags")
    entries = bag_entries(value)
    assert entries == (None if expected is None else [{"value": text, "weight": weight} for text, weight in expected])
    stored = None if entries is None else _request_value(entries)
    assert bag_entries(stored) == entries  # as backfill stores them


def test_unknown_values_have_no_row():
    entries = bag_entries(["x", "a"])
    assert known_rows(entries, {"a": 4}) == [{"row": 4, "weight": 1.0}]
    assert known_rows(None, {"a": 4}) == []


@pytest.mark.parametrize("value", ["a", 5, [["a"]], [None], [True], {"a": -1}, {"a": math.nan}, {"a": "1"}, {1: 1.0}])
def test_other_values_are_rejected(value):
    with pytest.raises(UserError, match=r"^tags.* not "):
        check_bag(value, "tags")


def test_requests_have_lists_and_weights():
    context = {"moods": ["calm", 3], "tags": {"a": 0.5}, "battery": 0.25, "tab": None}
    request = RankRequest.model_validate({"user": "u", "candidates": ["v"], "context": context})
    assert request.to_query().context == context


@pytest.mark.parametrize(
    "value", [["a"] * (MAX_VALUES + 1), [["a"]], {"a": -1.0}, {"a": "b"}, {str(k): 1.0 for k in range(MAX_VALUES + 1)}]
)
def test_requests_limit_lists(value):
    with pytest.raises(ValidationError):
        RankRequest.model_validate({"user": "u", "candidates": ["v"], "context": {"moods": value}})
