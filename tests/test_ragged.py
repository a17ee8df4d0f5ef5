"""Groups of equal length against plain loops over the sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2gen_rec.ragged import LengthGroups, pad, positions

LENGTHS = st.lists(st.integers(0, 5), max_size=12)


def sequences(values: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(torch.split(values, lengths)) if lengths else []


@given(LENGTHS)
@settings(deadline=None)
def test_groups_are_permutations_that_sort_by_length(lengths: list[int]) -> None:
    groups = LengthGroups.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert sorted(groups.order.tolist()) == list(range(len(lengths)))
    assert groups.order[groups.inverse].tolist() == list(range(len(lengths)))
    assert groups.token_order[groups.token_inverse].tolist() == list(range(sum(lengths)))
    assert [lengths[i] for i in groups.order] == sorted(lengths)
    expected_tokens = [sum(lengths[:i]) + place for i in groups.order.tolist() for place in range(lengths[i])]
    assert groups.token_order.tolist() == expected_tokens
    assert dict(groups.sizes) == {length: lengths.count(length) for length in lengths}
    assert [length for length, _ in groups.sizes] == sorted(set(lengths))


@given(LENGTHS)
@settings(deadline=None)
def test_map_equals_one_sequence_at_a_time(lengths: list[int]) -> None:
    rng = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randn(sum(lengths), 3, generator=rng, dtype=torch.float64)
    context = torch.randn(len(lengths), 2, generator=rng, dtype=torch.float64)
    groups = LengthGroups.from_lengths(torch.tensor(lengths, dtype=torch.int64))

    def per_token(x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x.cumsum(1), c[:, None].expand(-1, x.shape[1], -1)], -1)

    def per_sequence(x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x.prod(1) + x.shape[1], c], -1)

    expected = [
        torch.cat([x.cumsum(0), c.expand(len(x), -1)], -1)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    got = groups.map(per_token, tokens, context, per_token=True)
    torch.testing.assert_close(got, torch.cat([*expected, torch.zeros(0, 5, dtype=torch.float64)]))

    expected = [
        torch.cat([x.prod(0) + len(x), c]) if len(x) else torch.zeros(5, dtype=torch.float64)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    got = groups.map(per_sequence, tokens, context, per_token=False)
    torch.testing.assert_close(got, torch.stack(expected) if expected else torch.zeros(0, 5, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
@pytest.mark.parametrize("per_token", [True, False])
def test_map_over_nothing_keeps_shapes_and_gradients(lengths: list[int], per_token: bool) -> None:
    layer = torch.nn.Linear(3, 4)
    groups = LengthGroups.from_lengths(torch.tensor(lengths, dtype=torch.int64))

    def piece(x: Tensor, c: Tensor) -> Tensor:
        return layer(x if per_token else x.mean(1))

    out = groups.map(piece, torch.zeros(0, 3), torch.zeros(len(lengths), 2), per_token)
    assert out.shape == (0 if per_token else len(lengths), 4)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_map_runs_once_per_length_without_padding() -> None:
    lengths = torch.tensor([2, 4, 2, 0, 1, 4, 4])
    shapes = []

    def piece(x: Tensor, c: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[:2]))
        assert len(c) == len(x)
        return x

    LengthGroups.from_lengths(lengths).map(piece, torch.ones(17, 3), torch.ones(7, 2), per_token=True)
    assert shapes == [(1, 1), (2, 2), (3, 4)]


def test_to_keeps_every_part() -> None:
    groups = LengthGroups.from_lengths(torch.tensor([3, 1, 2]))
    moved = groups.to(torch.device("cpu"))
    for name in ("order", "inverse", "token_order", "token_inverse"):
        assert torch.equal(getattr(moved, name), getattr(groups, name))
    assert moved.sizes == groups.sizes


@given(LENGTHS)
@settings(deadline=None)
def test_positions_and_pad(lengths: list[int]) -> None:
    row, column = positions(torch.tensor(lengths, dtype=torch.int64))
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        (i, place) for i, length in enumerate(lengths) for place in range(length)
    ]
    values = torch.arange(1.0, sum(lengths) + 1)[:, None].expand(-1, 2)
    padded = pad(values, row, column, (len(lengths), 6))
    assert padded.shape == (len(lengths), 6, 2)
    for i, length in enumerate(lengths):
        assert torch.equal(padded[i, :length], values[sum(lengths[:i]) :][:length])
        assert not padded[i, length:].any()
