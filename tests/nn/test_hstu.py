"""HSTU against one place and one head at a time, and what a target can see through many layers."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.hstu import HSTU, HSTULayer, SequenceLayout

DIM, HEADS, D_HEAD, LENGTH, BUCKETS, FEATURES = 4, 2, 2, 9, 5, 2
M, N, T = 3, 6, 5


def build(layers: int, buckets: int = BUCKETS, features: int = FEATURES) -> HSTU:
    module = HSTU(DIM, HEADS, layers, LENGTH, buckets, features).double()
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.8)
    return module


def world() -> tuple[Tensor, Tensor, SequenceLayout]:
    rng = torch.Generator().manual_seed(0)
    seen = torch.rand(M, N, generator=rng) < 0.6
    seen[1] = False
    layout = SequenceLayout(
        owner=torch.tensor([0, 0, 1, 2, 2]),
        seen=seen,
        between=torch.randint(BUCKETS, (M, N, N), generator=rng),
        since=torch.randint(BUCKETS, (T, N), generator=rng),
        matches=(torch.rand(FEATURES, T, N, generator=rng) < 0.5).unbind(),
    )
    past = torch.randn(M, N, DIM, generator=rng, dtype=torch.float64)
    return past, torch.randn(T, DIM, generator=rng, dtype=torch.float64), layout


def unit(layer: HSTULayer, x: list[Tensor], row: int, bias: list[Tensor | None]) -> Tensor:
    """The paper's equations for one row of a sequence ``x``: ``bias`` [heads] of each key, None where none is seen."""

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
    """Every target as the last token of a plain sequence of its own, through all layers."""
    found = []
    for t in range(T):
        m = int(layout.owner[t])
        x = [*past[m], target[t]]
        for layer in module.layers:
            after = []
            for row in range(N + 1):
                bias: list[Tensor | None] = []
                for key in range(N + 1):
                    if key > row or (key < row and not layout.seen[m, key]):
                        bias.append(None)
                        continue
                    extra = layer.position[:, row - key]
                    if key < row and layer.recency is not None:
                        code = layout.since[t, key] if row == N else layout.between[m, row, key]
                        extra = extra + layer.recency.weight[code]
                    if key < row == N and layer.match is not None:
                        shared = torch.stack([match[t, key] for match in layout.matches]).double()
                        extra = extra + layer.match.weight @ shared
                    bias.append(extra)
                after.append(unit(layer, x, row, bias))
            x = after
        found.append(x[-1])
    return torch.stack(found)


@pytest.mark.parametrize(("layers", "buckets", "features"), [(1, BUCKETS, FEATURES), (3, BUCKETS, FEATURES), (2, 0, 0)])
def test_equals_loops_with_gradients(layers: int, buckets: int, features: int) -> None:
    module, (past, target, layout) = build(layers, buckets, features), world()
    if not buckets:
        layout = dataclasses.replace(layout, between=None, since=None, matches=())
    past.requires_grad_()
    found, expected = module(past, target, layout), by_loops(module, past, target, layout)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = [past, *module.parameters()]
    left, right = (torch.autograd.grad(each.square().sum(), wanted) for each in (found, expected))
    for a, b in zip(left, right, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_what_is_not_seen_matters_through_no_layer() -> None:
    module, (past, target, layout) = build(3), world()
    before = module(past, target, layout)
    hidden = torch.where(layout.seen[..., None], past, torch.randn_like(past))
    assert torch.equal(module(hidden, target, layout), before)
    for place in layout.seen.nonzero().tolist():
        moved = past.clone()
        moved[place[0], place[1], 0] += 1.0  # a shift of all entries would be lost in the norm
        changed = (module(moved, target, layout) != before).any(1)
        assert torch.equal(changed, layout.owner == place[0])


def test_more_places_than_are_taken_change_nothing() -> None:
    """As in a batch with a longer history: free places come first, and the last ones stay next to the targets."""
    module, (past, target, layout) = build(2), world()
    more = dataclasses.replace(
        layout,
        seen=F.pad(layout.seen, (3, 0)),
        between=F.pad(layout.between, (3, 0, 3, 0)),
        since=F.pad(layout.since, (3, 0)),
        matches=[F.pad(match, (3, 0)) for match in layout.matches],
    )
    longer = F.pad(past, (0, 0, 3, 0), value=0.5)
    torch.testing.assert_close(module(longer, target, more), module(past, target, layout), rtol=1e-12, atol=1e-12)


def test_intensity_reaches_the_output() -> None:
    """Twice the same past is not the same as once, as it would be under a softmax."""
    layer = build(1).layers[0]
    with torch.no_grad():
        layer.position.zero_(), layer.recency.weight.zero_(), layer.match.weight.zero_()
    past, target, layout = world()
    same = past[:1, :1].expand(M, N, -1)

    def seeing(count: int) -> Tensor:
        seen = torch.arange(N).expand(M, N) < count
        return layer(same, target, dataclasses.replace(layout, seen=seen))

    assert not torch.allclose(seeing(1), seeing(2), atol=1e-3)
