"""Groups of similar length against plain loops over the sequences."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2gen_rec.utils.jagged import LengthBuckets, jagged_positions, jagged_to_padded_dense, padded_dense_to_jagged

LENGTHS = st.lists(st.integers(0, 5), max_size=12)
COSTS = st.sampled_from([0, 1, 3, 10, 1000])


def group(lengths: list[int], cost: int) -> LengthBuckets:
    return LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64), cost)


def sequences(values: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(torch.split(values, lengths)) if lengths else []


@given(LENGTHS, COSTS)
@settings(deadline=None)
def test_groups_sort_by_length_and_pad_with_the_last_token(lengths: list[int], cost: int) -> None:
    groups = group(lengths, cost)
    assert sorted(groups.order.tolist()) == list(range(len(lengths)))
    assert groups.order[groups.inverse].tolist() == list(range(len(lengths)))
    assert groups.lengths.tolist() == [lengths[i] for i in groups.order] == sorted(lengths)
    padded = [length for length, count, _ in groups.sizes for _ in range(count)]
    expected = []
    for i, slots in zip(groups.order.tolist(), padded, strict=True):
        assert slots >= lengths[i]
        expected += [sum(lengths[:i]) + min(place, lengths[i] - 1) for place in range(slots)]
    assert groups.token_order.tolist() == expected
    assert groups.token_order[groups.token_inverse].tolist() == list(range(sum(lengths)))
    assert [length for length, _, _ in groups.sizes] == sorted({length for length, _, _ in groups.sizes})


@given(LENGTHS, COSTS)
@settings(deadline=None)
def test_groups_are_the_cheapest_of_all(lengths: list[int], cost: int) -> None:
    distinct = sorted(set(lengths) - {0})
    counts = [lengths.count(length) for length in distinct]

    def price(cuts: tuple[int, ...]) -> int:
        ends = [*cuts, len(distinct)]
        return sum(
            cost + distinct[end - 1] * sum(counts[begin:end]) for begin, end in zip([0, *cuts], ends, strict=True)
        )

    inner = range(1, len(distinct))
    every = [cuts for many in range(len(distinct)) for cuts in itertools.combinations(inner, many)]
    cheapest = min(map(price, every)) if distinct else 0
    sizes = [size for size in group(lengths, cost).sizes if size[0]]
    assert sum(cost + length * count for length, count, _ in sizes) == cheapest
    if cost == 0:
        assert [(length, count) for length, count, _ in sizes] == list(zip(distinct, counts, strict=True))
        assert not any(padded for *_, padded in sizes)


@given(LENGTHS, COSTS)
@settings(deadline=None)
def test_map_equals_one_sequence_at_a_time(lengths: list[int], cost: int) -> None:
    rng = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randn(sum(lengths), 3, generator=rng, dtype=torch.float64)
    context = torch.randn(len(lengths), 2, generator=rng, dtype=torch.float64)
    groups = group(lengths, cost)

    def per_token(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
        return torch.cat([x.cumsum(1), c[:, None].expand(-1, x.shape[1], -1)], -1)

    def per_sequence(x: Tensor, c: Tensor, real: Tensor | None) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        return torch.cat([torch.where(real[..., None], x, 1).prod(1) + real.sum(1, keepdim=True), c], -1)

    expected = [
        torch.cat([x.cumsum(0), c.expand(len(x), -1)], -1)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    got = groups.apply(per_token, tokens, context, per_token=True)
    torch.testing.assert_close(got, torch.cat([*expected, torch.zeros(0, 5, dtype=torch.float64)]))

    expected = [
        torch.cat([x.prod(0) + len(x), c]) if len(x) else torch.zeros(5, dtype=torch.float64)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    got = groups.apply(per_sequence, tokens, context, per_token=False)
    torch.testing.assert_close(got, torch.stack(expected) if expected else torch.zeros(0, 5, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
@pytest.mark.parametrize("per_token", [True, False])
def test_map_over_nothing_keeps_shapes_and_gradients(lengths: list[int], per_token: bool) -> None:
    layer = torch.nn.Linear(3, 4)
    groups = LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64))

    def piece(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
        return layer(x if per_token else x.mean(1))

    out = groups.apply(piece, torch.zeros(0, 3), torch.zeros(len(lengths), 2), per_token)
    assert out.shape == (0 if per_token else len(lengths), 4)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


@pytest.mark.parametrize(("cost", "shapes"), [(0, [(1, 1), (2, 2), (3, 4)]), (2, [(3, 2), (3, 4)]), (100, [(6, 4)])])
def test_map_runs_once_per_group(cost: int, shapes: list[tuple[int, int]]) -> None:
    seen = []

    def piece(x: Tensor, c: Tensor, real: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape[:2]))
        assert len(c) == len(x)
        assert real is None or real.shape == x.shape[:2]
        return x

    group([2, 4, 2, 0, 1, 4, 4], cost).apply(piece, torch.ones(17, 3), torch.ones(7, 2), per_token=True)
    assert seen == shapes


def test_to_keeps_every_part() -> None:
    groups = LengthBuckets.from_lengths(torch.tensor([3, 1, 2]))
    moved = groups.to(torch.device("cpu"))
    for name in ("order", "inverse", "lengths", "token_order", "token_inverse"):
        assert torch.equal(getattr(moved, name), getattr(groups, name))
    assert moved.sizes == groups.sizes


@given(LENGTHS)
@settings(deadline=None)
def test_positions_and_pad(lengths: list[int]) -> None:
    row, column = jagged_positions(torch.tensor(lengths, dtype=torch.int64))
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        (i, place) for i, length in enumerate(lengths) for place in range(length)
    ]
    values = torch.arange(1.0, sum(lengths) + 1)[:, None].expand(-1, 2)
    for longest in (6, max(lengths, default=0)):
        padded = jagged_to_padded_dense(values, row, column, (len(lengths), longest))
        assert padded.shape == (len(lengths), longest, 2)
        for i, length in enumerate(lengths):
            assert torch.equal(padded[i, :length], values[sum(lengths[:i]) :][:length])
            assert not padded[i, length:].any()
        assert torch.equal(padded_dense_to_jagged(padded, row, column), values)


def test_what_is_all_full_is_laid_out_without_a_copy() -> None:
    values = torch.rand(6, 2)
    padded = jagged_to_padded_dense(values, *jagged_positions(torch.tensor([3, 3])), (2, 3))
    assert torch.equal(padded, values.view(2, 3, 2))
    assert (
        padded.data_ptr()
        == values.data_ptr()
        == padded_dense_to_jagged(padded, *jagged_positions(torch.tensor([3, 3]))).data_ptr()
    )
