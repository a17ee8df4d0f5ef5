"""HSTU against one row and one head at a time, and the receptive field of targets through many layers."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.hstu import HSTU, HSTULayer, SequenceLayout

DIM, HEADS, D_HEAD, LENGTH, BUCKETS, FEATURES = 4, 2, 2, 9, 5, 2
M, N, K = 3, 6, 4


def build(layers: int, buckets: int = BUCKETS, features: int = FEATURES) -> HSTU:
    module = HSTU(DIM, HEADS, layers, LENGTH, buckets, features).double()
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.8)
    return module


def make_inputs() -> tuple[Tensor, Tensor, SequenceLayout]:
    rng = torch.Generator().manual_seed(0)
    index = torch.cat([torch.arange(N).expand(M, N), torch.randint(N + 1, (M, K), generator=rng)], dim=1)
    distance = index[..., None] - torch.arange(N)
    visible = (distance > 0) & (torch.rand(M, N + K, N, generator=rng) < 0.4)
    visible[1, N:] = False
    layout = SequenceLayout(
        attention_mask=visible,
        distance=distance.clamp(min=0),
        time_bucket=torch.randint(BUCKETS, (M, N + K, N), generator=rng),
        matches=torch.rand(M, FEATURES, N + K, N, generator=rng) < 0.5,
    )
    past = torch.randn(M, N, DIM, generator=rng, dtype=torch.float64)
    return past, torch.randn(M, K, DIM, generator=rng, dtype=torch.float64), layout


def unit(layer: HSTULayer, x: list[Tensor], row: int, bias: list[Tensor | None]) -> Tensor:
    """Evaluate the paper's equations for one row of ``x``; ``bias``: [heads] of each key, None where masked."""

    def parts(token: Tensor) -> tuple[Tensor, ...]:
        normed = F.layer_norm(token, (DIM,), layer.norm.weight, layer.norm.bias)
        return F.silu(layer.project.weight @ normed + layer.project.bias).split(DIM)

    gate, _, query, _ = parts(x[row])
    attended = torch.zeros(DIM, dtype=torch.float64)
    for token, extra in zip(x, bias, strict=True):
        if extra is None:
            continue
        _, value, _, key = parts(token)
        for h in range(HEADS):
            part = slice(h * D_HEAD, (h + 1) * D_HEAD)
            weight = F.silu(query[part] @ key[part] + extra[h]) / LENGTH
            attended[part] = attended[part] + weight * value[part]
    normed = F.layer_norm(attended, (DIM,), layer.attended_norm.weight, layer.attended_norm.bias)
    return layer.output.weight @ (normed * gate) + layer.output.bias + x[row]


def by_loops(module: HSTU, past: Tensor, target: Tensor, layout: SequenceLayout) -> Tensor:
    """Encode every window as a list of tokens, one row at a time."""
    results = []
    for m in range(M):
        x = [*past[m], *target[m]]
        for layer in module.layers:
            after = []
            for row in range(N + K):
                bias: list[Tensor | None] = [None] * (N + K)
                bias[row] = layer.position[:, 0]
                for key in layout.attention_mask[m, row].nonzero().flatten().tolist():
                    extra = layer.position[:, layout.distance[m, row, key]]
                    if layer.recency is not None:
                        extra = extra + layer.recency.weight[layout.time_bucket[m, row, key]]
                    if layer.match is not None:
                        shared = layout.matches[m, :, row, key].double()
                        extra = extra + layer.match.weight @ shared
                    bias[key] = extra
                after.append(unit(layer, x, row, bias))
            x = after
        results.append(torch.stack([row / row.norm() for row in x[N:]]))
    return torch.stack(results)


@pytest.mark.parametrize(("layers", "buckets", "features"), [(1, BUCKETS, FEATURES), (3, BUCKETS, FEATURES), (2, 0, 0)])
def test_equals_loops_with_gradients(layers: int, buckets: int, features: int) -> None:
    module, (past, target, layout) = build(layers, buckets, features), make_inputs()
    if not buckets:
        layout = dataclasses.replace(layout, time_bucket=None, matches=None)
    past.requires_grad_(), target.requires_grad_()
    results, expected = module(past, target, layout), by_loops(module, past, target, layout)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)
    inputs = [past, target, *module.parameters()]
    left, right = (torch.autograd.grad(one.pow(3).sum(), inputs) for one in (results, expected))
    for a, b in zip(left, right, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_receptive_field_grows_by_layers(layers: int) -> None:
    module, (past, target, layout) = build(layers), make_inputs()
    before = module(past, target, layout)
    step = layout.attention_mask[:, :N].double() + torch.eye(N, dtype=torch.float64)
    reached = layout.attention_mask[:, N:].double() @ torch.linalg.matrix_power(step, layers - 1) > 0
    assert reached.any()
    assert not reached.all()
    for index in range(N):
        moved = past.clone()
        moved[:, index, 0] += 1.0  # the norm would cancel a shift of all entries
        assert torch.equal((module(moved, target, layout) != before).any(-1), reached[..., index])


def test_targets_are_independent() -> None:
    module, (past, target, layout) = build(3), make_inputs()
    before = module(past, target, layout)
    others = torch.randn_like(target)
    others[:, 1] = target[:, 1]
    after = module(past, others, layout)
    assert torch.equal(after[:, 1], before[:, 1])
    assert (after[:, [0, 2, 3]] != before[:, [0, 2, 3]]).any(-1).all()


def test_padding_has_no_effect() -> None:
    """Masked positions at the end of history and targets, as in a batch with a longer window, have no effect."""
    module, (past, target, layout) = build(2), make_inputs()

    def longer(pair_values: Tensor | None) -> Tensor:
        assert pair_values is not None
        history_part, target_part = F.pad(pair_values, (0, 3)).split([N, K], dim=-2)
        return torch.cat([F.pad(history_part, (0, 0, 0, 3)), F.pad(target_part, (0, 0, 0, 2))], dim=-2)

    more = SequenceLayout(
        longer(layout.attention_mask), longer(layout.distance), longer(layout.time_bucket), longer(layout.matches)
    )
    results = module(F.pad(past, (0, 0, 0, 3), value=0.5), F.pad(target, (0, 0, 0, 2), value=0.5), more)
    torch.testing.assert_close(results[:, :K], module(past, target, layout), rtol=1e-12, atol=1e-12)


def test_output_depends_on_number_of_matches() -> None:
    """Repeating the history changes the output, unlike under a softmax."""
    layer = build(1).layers[0]
    with torch.no_grad():
        layer.position.zero_(), layer.recency.weight.zero_(), layer.match.weight.zero_()
    past, target, layout = make_inputs()
    x = torch.cat([past[:1, :1].expand(M, N, -1), target], dim=1)

    def seeing(count: int) -> Tensor:
        visible = torch.arange(N).expand(M, K, N) < count
        return layer(x, dataclasses.replace(layout.target_rows(), attention_mask=visible))

    assert not torch.allclose(seeing(1), seeing(2), atol=1e-3)


def test_initialization_sums_over_visible_history() -> None:
    """At initialization all visible impressions have equal weight, whatever their position."""
    torch.manual_seed(0)
    layer = HSTULayer(32, 4, LENGTH).double()
    x = torch.randn(50, N + 1, 32, dtype=torch.float64)
    distance = torch.arange(N, 0, -1).expand(50, 1, N)
    layout = SequenceLayout(torch.ones_like(distance, dtype=torch.bool), distance, None)

    def added(past: Tensor) -> Tensor:
        return layer(torch.cat([past, x[:, N:]], dim=1), layout) - x[:, N:]

    before, moved, other = added(x[:, :N]), added(x[:, :N].flip(1)), added(torch.randn_like(x[:, :N]))
    assert (moved - before).square().mean() < 0.01 * (other - before).square().mean()


def test_outputs_have_unit_norm_whatever_the_scale_of_tokens() -> None:
    module, (past, target, layout) = build(2), make_inputs()
    for scale in (0.01, 1, 100):
        norm = module(scale * past, scale * target, layout).norm(dim=-1)
        torch.testing.assert_close(norm, torch.ones_like(norm))


def test_dropout_applies_to_tokens_and_every_layer_in_training_only() -> None:
    past, target, layout = make_inputs()
    module = HSTU(DIM, HEADS, 2, LENGTH, BUCKETS, FEATURES, dropout=0.5).double()
    plain = HSTU(DIM, HEADS, 2, LENGTH, BUCKETS, FEATURES).double()
    plain.load_state_dict(module.state_dict())
    assert not torch.equal(module(past, target, layout), module(past, target, layout))
    torch.testing.assert_close(module.eval()(past, target, layout), plain(past, target, layout))
    for dropout in (module.dropout, *(layer.dropout for layer in module.layers)):
        dropout.train()
        assert not torch.equal(module(past, target, layout), module(past, target, layout))
        dropout.eval()
