"""Time buckets, and both levels of the encoder against one impression and one target at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.nn.attention import AttentionConfig
from a2gen_rec.nn.encoder import HierarchicalEncoder, WindowLayout, log_bucketize
from a2gen_rec.utils.jagged import LengthBuckets, jagged_positions

SECONDS = st.floats(0, 1e9) | st.sampled_from([0.0, 1.0, 59.999, 60.0, 14_400.0, math.inf])
BUCKETS = st.integers(4, 128)
MAX_S = st.floats(1, 1e7)


@given(SECONDS, SECONDS, BUCKETS, MAX_S)
def test_buckets_are_monotonic_and_bounded(a: float, b: float, buckets: int, max_seconds: float) -> None:
    for dtype in (torch.float32, torch.float64):
        low, high = log_bucketize(torch.tensor([min(a, b), max(a, b)], dtype=dtype), buckets, max_seconds).tolist()
        assert 1 <= low <= high <= buckets - 1


@given(BUCKETS, MAX_S)
def test_buckets_of_missing_zero_and_large_times(buckets: int, max_seconds: float) -> None:
    seconds = torch.tensor([math.nan, 0.0, -3.0, max_seconds * 1.001 + 0.001, 1e30, math.inf])
    assert log_bucketize(seconds, buckets, max_seconds).tolist() == [0, 1, 1, buckets - 1, buckets - 1, buckets - 1]
    half_a_bucket = 0.5 * math.log1p(max_seconds) / (buckets - 2)
    just_below = torch.tensor(math.expm1(math.log1p(max_seconds) - half_a_bucket), dtype=torch.float64)
    assert log_bucketize(just_below, buckets, max_seconds) == buckets - 2


@given(SECONDS, BUCKETS, MAX_S)
def test_buckets_have_equal_width_in_log1p(seconds: float, buckets: int, max_seconds: float) -> None:
    width = math.log1p(max_seconds) / (buckets - 2)
    position = math.log1p(seconds) / width
    expected = min(1 + math.floor(position), buckets - 1) if math.isfinite(position) else buckets - 1
    actual = log_bucketize(torch.tensor(seconds, dtype=torch.float64), buckets, max_seconds).item()
    near_an_edge = math.isfinite(position) and abs(position - round(position)) < 1e-9 * max(1, position)
    assert actual == expected or (near_an_edge and abs(actual - expected) == 1)


def test_buckets_keep_shape() -> None:
    seconds = torch.tensor([[0.0, math.nan], [5.0, 1e9]])
    bucket = log_bucketize(seconds, 16, 100.0)
    assert bucket.dtype == torch.int64
    assert bucket.shape == (2, 2)


def build(residual: str, impl: str, mlp_ratio: float = 1.0) -> HierarchicalEncoder:
    encoder = HierarchicalEncoder(6, AttentionConfig(4, 2, residual, mlp_ratio), 5, 3, impl).double()
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.0])
def test_action_level_equals_one_impression_at_a_time(residual: str, mlp_ratio: float) -> None:
    encoder = build(residual, "factorized", mlp_ratio)
    cam = encoder.action_pooling
    lengths = [2, 4, 2, 3, 5, 2]
    tokens = torch.randn(sum(lengths), 8, dtype=torch.float64)
    item = torch.randn(len(lengths), 6, dtype=torch.float64)
    actual = encoder.encode_actions(tokens, item, LengthBuckets.from_lengths(torch.tensor(lengths)))
    block, cam.block = cam.block, torch.nn.Identity()  # applied after the mean over positions
    expected = [cam(x[None], c[None])[0].mean(0) for x, c in zip(tokens.split(lengths), item, strict=True)]
    torch.testing.assert_close(actual, block(torch.stack(expected)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("residual", ["context", "both"])
def test_item_level_equals_one_target_at_a_time(impl: str, residual: str) -> None:
    """Encode each target alone with its visible impressions: no padding, no other window, no other target."""
    encoder = build(residual, impl)
    rng = torch.Generator().manual_seed(1)
    lengths, targets = torch.tensor([5, 2, 7]), torch.tensor([2, 1, 3])
    row, column = jagged_positions(lengths)
    target_row, target_column = jagged_positions(targets)
    impressions = int(lengths.sum())
    item = torch.randn(impressions, 6, generator=rng, dtype=torch.float64)
    actions = torch.randn(impressions, 4, generator=rng, dtype=torch.float64)
    gap = torch.randn(impressions, 4, generator=rng, dtype=torch.float64)
    target = torch.randn(len(target_row), 6, generator=rng, dtype=torch.float64)
    visible = torch.rand(3, 3, 7, generator=rng) < 0.6
    visible &= (torch.arange(7) < lengths[:, None])[:, None]
    visible[0, 1] = False
    recency = torch.randint(5, (3, 3, 7), generator=rng)

    matches = torch.rand(3, 3, 3, 7, generator=rng) < 0.5

    layout = WindowLayout(row, column, (3, 7), target_row, target_column, (3, 3), visible, recency, matches)
    actual = encoder(item, actions, gap, target, layout)
    expected = []
    for t in range(len(target)):
        w, position = int(target_row[t]), int(target_column[t])
        visible_columns = [i for i in range(impressions) if row[i] == w and visible[w, position, column[i]]]
        x = torch.cat([item[visible_columns], actions[visible_columns], gap[visible_columns]], dim=1)[None]
        shared = matches[w, :, position, column[visible_columns]].T.double()
        bias = (encoder.recency(recency[w, position, column[visible_columns]]) + encoder.match(shared)).T[None, :, None]
        everything = torch.ones(1, 1, len(visible_columns), dtype=torch.bool)
        expected.append(
            encoder.item_pooling.pool(x, target[None, t : t + 1], everything, bias, "reference")[0, 0]
            if visible_columns
            else encoder.item_pooling.block(encoder.item_pooling.context(target[t]))
        )
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-9, atol=1e-9)
