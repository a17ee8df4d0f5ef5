"""CAM without context query and gate against PyTorch's attention, and mean pooling."""

import pytest
import torch
from torch.nn import functional as F

from a2gen_rec.nn.attention import AttentionConfig, ContextAwareAttention, MeanPooling
from a2gen_rec.nn.encoder import HierarchicalEncoder, WindowLayout
from a2gen_rec.utils.jagged import LengthBuckets, jagged_positions

DIM, HEADS = 8, 2


def build(**switches: bool) -> ContextAwareAttention:
    torch.manual_seed(0)
    return ContextAwareAttention(5, 3, AttentionConfig(DIM, HEADS, **switches)).double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_query_and_gate_equals_multi_head_attention_plus_context() -> None:
    cam = build(context_query=False, head_gate=False)
    x, context = random(3, 6, 5), random(3, 3)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, 0] = True
    plain = torch.nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.weight for layer in (cam.query_sequence, cam.key, cam.value)]))
        plain.out_proj.weight.copy_(cam.output.weight)
    s = x @ cam.sequence.weight.T
    expected = plain(s, s, s, key_padding_mask=~mask)[0] + F.linear(context, cam.context.weight)[:, None]
    torch.testing.assert_close(cam(x, context, mask), expected)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize(("removed", "kept"), [("context_query", "head_gate"), ("head_gate", "context_query")])
def test_each_option_removes_one_part(impl: str, removed: str, kept: str) -> None:
    """The result equals that of the full CAM with neutral weights of that part, whose parameters are gone."""
    cam, without = build(), build(**{removed: False})
    names = {"context_query": "query_context.weight", "head_gate": "gate.weight"}
    state = cam.state_dict()
    assert set(state) - set(without.state_dict()) == {names[removed]}
    state[names[removed]].zero_()
    if removed == "head_gate":
        state["output.weight"] *= HEADS  # a uniform gate averages the heads, no gate sums them
    cam.load_state_dict(state)
    shared = {name: value for name, value in state.items() if name != names[removed]}
    if removed == "head_gate":
        shared["output.weight"] = state["output.weight"] / HEADS
    without.load_state_dict(shared)
    x, context = random(2, 4, 5), random(2, 3, 3)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    torch.testing.assert_close(without.pool(x, context, mask, impl=impl), cam.pool(x, context, mask, impl=impl))
    torch.testing.assert_close(without(x, context[:, 0]), cam(x, context[:, 0]))


def test_mean_pooling_hand_computed() -> None:
    pooling = MeanPooling(3, AttentionConfig(4, 2)).double()
    x, mask = random(1, 4, 3), torch.tensor([[[True, False, True, False], [False] * 4, [True] * 4]])
    expected = torch.stack([(x[0, 0] + x[0, 2]) / 2, 0 * x[0, 0], x[0].mean(0)]) @ pooling.sequence.weight.T
    torch.testing.assert_close(pooling(x, mask)[0], expected)


@pytest.mark.parametrize("views", ["none", "dual_view_full"])
def test_mean_action_and_item_pooling(views: str) -> None:
    """Action level: mean over an impression's tokens. Item level: mean over each target's visible impressions."""
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(
        6,
        AttentionConfig(4, 2, mlp_ratio=1.0),
        recency_buckets=5,
        match_features=1,
        views=views,
        action_pooling="mean",
        item_pooling="mean",
    ).double()
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"action_pooling", "item_pooling"}
    lengths = [2, 4, 3]
    tokens, item = random(sum(lengths), 8), random(3, 6)
    buckets = LengthBuckets.from_lengths(torch.tensor(lengths), bucket_overhead=100)
    actions = encoder.encode_actions(tokens, item, buckets)
    level = encoder.action_pooling
    means = torch.stack([part.mean(0) for part in tokens.split(lengths)])
    torch.testing.assert_close(actions, level.block(level.sequence(means)))

    row, column = jagged_positions(torch.tensor([2, 1]))
    target_row, target_column = jagged_positions(torch.tensor([2, 1]))
    visible = torch.tensor([[[True, False], [True, True]], [[True, False], [False, False]]])
    layout = WindowLayout(row, column, (2, 2), target_row, target_column, (2, 2), visible)
    gap, target = random(3, 4), random(3, 6)
    actual = encoder(item, actions, gap, target, layout)
    x = encoder.item_pooling.sequence(torch.cat([item, actions, gap], dim=1))
    torch.testing.assert_close(actual, encoder.item_pooling.block(torch.stack([x[0], (x[0] + x[1]) / 2, x[2]])))


def test_without_action_pooling_actions_are_ignored() -> None:
    encoder = HierarchicalEncoder(6, AttentionConfig(4, 2), action_pooling="none")
    results = encoder.encode_actions(
        torch.randn(5, 8), torch.randn(2, 6), LengthBuckets.from_lengths(torch.tensor([2, 3]))
    )
    assert torch.equal(results, torch.zeros(2, 4))
    assert encoder.item_pooling.sequence.in_features == 6 + 4
    assert not any(name.startswith("action_pooling") for name, _ in encoder.named_parameters())
