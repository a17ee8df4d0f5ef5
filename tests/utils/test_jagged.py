"""Length buckets against loops over the sequences."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from a2gen_rec.utils.jagged import LengthBuckets, jagged_positions, jagged_to_padded_dense, padded_dense_to_jagged

LENGTHS = st.lists(st.integers(0, 5), max_size=12)
COSTS = st.sampled_from([0, 1, 3, 10, 1000])


def bucket(lengths: list[int], cost: int) -> LengthBuckets:
    return LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64), cost)


def sequences(values: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(torch.split(values, lengths)) if lengths else []


@given(LENGTHS, COSTS)
def test_buckets_sort_by_length_and_pad_with_the_last_token(lengths: list[int], cost: int) -> None:
    buckets = bucket(lengths, cost)
    assert sorted(buckets.order.tolist()) == list(range(len(lengths)))
    assert buckets.order[buckets.inverse].tolist() == list(range(len(lengths)))
    assert buckets.lengths.tolist() == [lengths[i] for i in buckets.order] == sorted(lengths)
    padded = [length for length, count, _ in buckets.sizes for _ in range(count)]
    expected = []
    for i, slots in zip(buckets.order.tolist(), padded, strict=True):
        assert slots >= lengths[i]
        expected += [sum(lengths[:i]) + min(position, lengths[i] - 1) for position in range(slots)]
    assert buckets.token_order.tolist() == expected
    assert buckets.token_order[buckets.token_inverse].tolist() == list(range(sum(lengths)))
    assert [length for length, _, _ in buckets.sizes] == sorted({length for length, _, _ in buckets.sizes})


@given(LENGTHS, COSTS)
def test_buckets_have_minimum_cost(lengths: list[int], cost: int) -> None:
    distinct = sorted(set(lengths) - {0})
    counts = [lengths.count(length) for length in distinct]

    def price(cuts: tuple[int, ...]) -> int:
        ends = [*cuts, len(distinct)]
        return sum(
            cost + distinct[end - 1] * sum(counts[start:end]) for start, end in zip([0, *cuts], ends, strict=True)
        )

    inner = range(1, len(distinct))
    all_cuts = [cuts for count in range(len(distinct)) for cuts in itertools.combinations(inner, count)]
    cheapest = min(map(price, all_cuts)) if distinct else 0
    sizes = [size for size in bucket(lengths, cost).sizes if size[0]]
    assert sum(cost + length * count for length, count, _ in sizes) == cheapest
    if cost == 0:
        assert [(length, count) for length, count, _ in sizes] == list(zip(distinct, counts, strict=True))
        assert not any(padded for *_, padded in sizes)


@given(LENGTHS, COSTS)
def test_apply_equals_one_sequence_at_a_time(lengths: list[int], cost: int) -> None:
    rng = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randn(sum(lengths), 3, generator=rng, dtype=torch.float64)
    context = torch.randn(len(lengths), 2, generator=rng, dtype=torch.float64)
    buckets = bucket(lengths, cost)

    def per_token(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
        return torch.cat([x.cumsum(1), c[:, None].expand(-1, x.shape[1], -1)], -1)

    def per_sequence(x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.cat([torch.where(mask[..., None], x, 1).prod(1) + mask.sum(1, keepdim=True), c], -1)

    expected = [
        torch.cat([x.cumsum(0), c.expand(len(x), -1)], -1)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    actual = buckets.apply(per_token, tokens, context, per_token=True)
    torch.testing.assert_close(actual, torch.cat([*expected, torch.zeros(0, 5, dtype=torch.float64)]))

    expected = [
        torch.cat([x.prod(0) + len(x), c]) if len(x) else torch.zeros(5, dtype=torch.float64)
        for x, c in zip(sequences(tokens, lengths), context, strict=True)
    ]
    actual = buckets.apply(per_sequence, tokens, context, per_token=False)
    torch.testing.assert_close(actual, torch.stack(expected) if expected else torch.zeros(0, 5, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
@pytest.mark.parametrize("per_token", [True, False])
def test_apply_to_no_tokens_keeps_shapes_and_gradients(lengths: list[int], per_token: bool) -> None:
    layer = torch.nn.Linear(3, 4)
    buckets = LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64))

    def fn(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
        return layer(x if per_token else x.mean(1))

    out = buckets.apply(fn, torch.zeros(0, 3), torch.zeros(len(lengths), 2), per_token)
    assert out.shape == (0 if per_token else len(lengths), 4)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


@pytest.mark.parametrize(("cost", "shapes"), [(0, [(1, 1), (2, 2), (3, 4)]), (2, [(3, 2), (3, 4)]), (100, [(6, 4)])])
def test_apply_runs_once_per_bucket(cost: int, shapes: list[tuple[int, int]]) -> None:
    calls = []

    def fn(x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(tuple(x.shape[:2]))
        assert len(c) == len(x)
        assert mask is None or mask.shape == x.shape[:2]
        return x

    bucket([2, 4, 2, 0, 1, 4, 4], cost).apply(fn, torch.ones(17, 3), torch.ones(7, 2), per_token=True)
    assert calls == shapes


def test_to_keeps_all_tensors() -> None:
    buckets = LengthBuckets.from_lengths(torch.tensor([3, 1, 2]))
    moved = buckets.to(torch.device("cpu"))
    for name in ("order", "inverse", "lengths", "token_order", "token_inverse"):
        assert torch.equal(getattr(moved, name), getattr(buckets, name))
    assert moved.sizes == buckets.sizes


@given(LENGTHS)
def test_positions_and_padding(lengths: list[int]) -> None:
    row, column = jagged_positions(torch.tensor(lengths, dtype=torch.int64))
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        (i, position) for i, length in enumerate(lengths) for position in range(length)
    ]
    values = torch.arange(1.0, sum(lengths) + 1)[:, None].expand(-1, 2)
    for max_length in (6, max(lengths, default=0)):
        padded = jagged_to_padded_dense(values, row, column, (len(lengths), max_length))
        assert padded.shape == (len(lengths), max_length, 2)
        for i, length in enumerate(lengths):
            assert torch.equal(padded[i, :length], values[sum(lengths[:i]) :][:length])
            assert not padded[i, length:].any()
        assert torch.equal(padded_dense_to_jagged(padded, row, column), values)


def test_full_rows_are_padded_without_a_copy() -> None:
    values = torch.rand(6, 2)
    padded = jagged_to_padded_dense(values, *jagged_positions(torch.tensor([3, 3])), (2, 3))
    assert torch.equal(padded, values.view(2, 3, 2))
    assert (
        padded.data_ptr()
        == values.data_ptr()
        == padded_dense_to_jagged(padded, *jagged_positions(torch.tensor([3, 3]))).data_ptr()
    )
