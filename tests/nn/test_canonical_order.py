"""Canonical order of actions: preserved and removed information."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.nn.canonical_order import canonicalize_order, sequence_ids, sort_by_vocabulary
from tests.helpers.properties import examples

ACTIONS = 7
INNER = st.lists(st.tuples(st.integers(1, ACTIONS - 2), st.floats(0, 100, width=32) | st.just(math.nan)), max_size=5)
IMPRESSIONS = st.lists(
    st.tuples(INNER, st.sampled_from([150.0, math.nan])), min_size=1, max_size=4
)  # actions and end time of each impression


def flat(impressions: list) -> tuple[torch.Tensor, torch.Tensor]:
    steps = []
    for inner, end in impressions:
        once = dict(reversed(inner)).items()  # an action occurs at most once
        steps += [(0, 0.0), *once, (ACTIONS - 1, end)]
    action, offset_s = zip(*steps, strict=True)
    return torch.tensor(action), torch.tensor(offset_s)


def times(offset_s: torch.Tensor) -> list[Counter]:
    """Count the times of every impression; NaN as None."""
    return [Counter(None if math.isnan(t) else t for t in part) for part in offset_s]


@given(IMPRESSIONS, st.randoms(use_true_random=False))
@examples(60)
def test_canonical_form_removes_order_and_pairing(impressions: list, random: object) -> None:
    """The result does not depend on which action has which time; codes, times and missing times are preserved."""
    action, offset_s = flat(impressions)
    got_action, got_offset = canonicalize_order(action, offset_s, ACTIONS)

    sizes = torch.bincount(sequence_ids(action)).tolist()
    for a, t, ga, gt in zip(*(x.split(sizes) for x in (action, offset_s, got_action, got_offset)), strict=True):
        assert ga.tolist() == sorted(a.tolist())
        assert times([gt.tolist()]) == times([t.tolist()])
        untimed = {code for code, time in zip(a.tolist(), t.tolist(), strict=True) if math.isnan(time)}
        assert untimed == {code for code, time in zip(ga.tolist(), gt.tolist(), strict=True) if math.isnan(time)}
        known = gt[1:-1][torch.isfinite(gt[1:-1])]
        assert bool((known[1:] >= known[:-1]).all())

    shuffled = []
    for a, t in zip(action.split(sizes), offset_s.split(sizes), strict=True):
        timed = [i for i in range(1, len(a) - 1) if math.isfinite(t[i])]
        other = random.sample(timed, len(timed))  # type: ignore[attr-defined]
        dealt = t.clone()
        dealt[timed] = t[other]
        position = [0, *random.sample(range(1, len(a) - 1), len(a) - 2), len(a) - 1]  # type: ignore[attr-defined]
        shuffled.append((a[position], dealt[position]))
    again = canonicalize_order(*(torch.cat(parts) for parts in zip(*shuffled, strict=True)), ACTIONS)
    assert torch.equal(again[0], got_action)
    torch.testing.assert_close(again[1], got_offset, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("action", [[0, 4, 2, 6, 0, 6, 0, 5, 1, 3, 6]])
def test_hand_computed_example(action: list[int]) -> None:
    codes = torch.tensor(action)
    assert sequence_ids(codes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert sort_by_vocabulary(codes, sequence_ids(codes), ACTIONS).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 9, 7, 10]
    offset_s = torch.tensor([0, 2.0, 5.0, 8.0, 0, math.nan, 0, 1.0, math.nan, 4.0, 9.0])
    actual = canonicalize_order(codes, offset_s, ACTIONS)
    assert actual[0].tolist() == [0, 2, 4, 6, 0, 6, 0, 1, 3, 5, 6]
    torch.testing.assert_close(
        actual[1], torch.tensor([0, 2.0, 5.0, 8.0, 0, math.nan, 0, math.nan, 1.0, 4.0, 9.0]), equal_nan=True
    )
