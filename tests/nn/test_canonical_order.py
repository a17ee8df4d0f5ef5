"""Actions as a set: what is kept of an impression, and what is not."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.nn.canonical_order import canonicalize_order, sequence_ids, sort_by_vocabulary

ACTIONS = 7
INNER = st.lists(st.tuples(st.integers(1, ACTIONS - 2), st.floats(0, 100, width=32) | st.just(math.nan)), max_size=5)
IMPRESSIONS = st.lists(
    st.tuples(INNER, st.sampled_from([150.0, math.nan])), min_size=1, max_size=4
)  # what happened, and when each ended


def flat(impressions: list) -> tuple[torch.Tensor, torch.Tensor]:
    steps = []
    for inner, end in impressions:
        once = dict(reversed(inner)).items()  # an action happens at most once
        steps += [(0, 0.0), *once, (ACTIONS - 1, end)]
    action, offset_s = zip(*steps, strict=True)
    return torch.tensor(action), torch.tensor(offset_s)


def times(offset_s: torch.Tensor) -> list[Counter]:
    """Of every impression's times, how often each occurs; NaN as None."""
    return [Counter(None if math.isnan(t) else t for t in part) for part in offset_s]


@given(IMPRESSIONS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_neither_order_nor_pairing_remains(impressions: list, random: object) -> None:
    """The same comes out whichever action took which time, and codes, times and gaps between them stay."""
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
        place = [0, *random.sample(range(1, len(a) - 1), len(a) - 2), len(a) - 1]  # type: ignore[attr-defined]
        shuffled.append((a[place], dealt[place]))
    again = canonicalize_order(*(torch.cat(parts) for parts in zip(*shuffled, strict=True)), ACTIONS)
    assert torch.equal(again[0], got_action)
    torch.testing.assert_close(again[1], got_offset, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("action", [[0, 4, 2, 6, 0, 6, 0, 5, 1, 3, 6]])
def test_by_hand(action: list[int]) -> None:
    codes = torch.tensor(action)
    assert sequence_ids(codes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert sort_by_vocabulary(codes, sequence_ids(codes), ACTIONS).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 9, 7, 10]
    offset_s = torch.tensor([0, 2.0, 5.0, 8.0, 0, math.nan, 0, 1.0, math.nan, 4.0, 9.0])
    got = canonicalize_order(codes, offset_s, ACTIONS)
    assert got[0].tolist() == [0, 2, 4, 6, 0, 6, 0, 1, 3, 5, 6]
    torch.testing.assert_close(
        got[1], torch.tensor([0, 2.0, 5.0, 8.0, 0, math.nan, 0, math.nan, 1.0, 4.0, 9.0]), equal_nan=True
    )
