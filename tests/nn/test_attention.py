"""Context-aware attention against METHODS §2 written out in loops, and its fast forms against each other."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from a2gen_rec.nn.attention import (
    AttentionConfig,
    AttentionImpl,
    ContextAwareAttention,
    pooled_attention_weights,
    reference_weights,
    weighted_sum,
)

M, N, T, HEADS, D_X, D_C, DIM = 3, 7, 5, 2, 5, 6, 8
MASKS = ["random", "ragged", "sliding", "ended", "full"]


def build(residual: str = "context", mlp_ratio: float = 0.0, scale: float = 1.0) -> ContextAwareAttention:
    """A float64 CAM of which nothing starts at zero; ``scale`` multiplies what makes its logits."""
    cam = ContextAwareAttention(D_X, D_C, AttentionConfig(DIM, HEADS, residual, mlp_ratio)).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in cam.parameters():
            parameter.normal_(std=0.7)
        cam.query_sequence.weight.mul_(scale)
        cam.query_context.weight.mul_(scale)
    return cam


def inputs(seed: int = 0, contexts: int | None = T) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shape = (M, D_C) if contexts is None else (M, contexts, D_C)
    x = torch.randn(M, N, D_X, generator=rng, dtype=torch.float64)
    return x, torch.randn(shape, generator=rng, dtype=torch.float64)


def mask_of(kind: str) -> Tensor:
    """[M, T, N]: what each target may see, in the ways targets come to see different parts."""
    rng = torch.Generator().manual_seed(7)
    place = torch.arange(N)
    targets = torch.arange(T)[:, None] + N - T
    if kind == "random":
        mask = torch.rand(M, T, N, generator=rng) < 0.5
        mask[0, 2] = False
        return mask
    if kind == "ragged":
        return (place < torch.tensor([N, 4, 0])[:, None])[:, None].expand(M, T, N)
    if kind == "sliding":
        return ((place < targets) & (place >= targets - 3)).expand(M, T, N)
    if kind == "ended":
        end = place + torch.rand(M, N, generator=rng) * 4
        return (place < targets) & (end[:, None] <= targets)
    return torch.ones(M, T, N, dtype=torch.bool)


def naive(
    cam: ContextAwareAttention,
    x: Tensor,
    c: Tensor,
    visible: list[list[int]],
    bias: Tensor | None = None,
) -> list[Tensor]:
    """METHODS §2's formulas for one sequence x [n, d] and one context c [d_c], before the block after it.

    ``visible[i]`` are the keys of position i, ``bias`` [heads, n] is added to their logits. Position by position
    and head by head, with the concatenated query projection.
    """
    w_s, w_c, w_k, w_v = (layer.weight.T for layer in (cam.sequence, cam.context, cam.key, cam.value))
    w_q = torch.cat([cam.query_sequence.weight.T, cam.query_context.weight.T])
    s, big_c = x @ w_s, c @ w_c
    q = torch.cat([s, big_c.expand(len(s), -1)], dim=1) @ w_q
    k, v = s @ w_k, s @ w_v
    scores = torch.exp(c @ cam.gate.weight.T)
    g = scores / scores.sum()
    d = DIM // HEADS
    out = []
    for i in range(len(x)):
        total = big_c + (s[i] if cam.residual == "both" else 0)
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            w_o = cam.output.weight.T[part]
            logits = {j: q[i, part] @ k[j, part] / math.sqrt(d) for j in visible[i]}
            if bias is not None:
                logits = {j: logit + bias[h, j] for j, logit in logits.items()}
            norm = sum(torch.exp(logit) for logit in logits.values())
            attended = sum((torch.exp(logit) / norm * v[j, part] for j, logit in logits.items()), torch.zeros(d))
            total = total + g[h] * (attended.to(w_o) @ w_o)
        out.append(total)
    return out


def naive_pooled(cam: ContextAwareAttention, x: Tensor, context: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for m in range(len(x)):
        for t in range(context.shape[1]):
            seen = mask[m, t].nonzero().flatten().tolist()
            each = naive(cam, x[m], context[m, t], [seen] * N, None if bias is None else bias[m, :, t])
            pooled = sum(each[i] for i in seen) / len(seen) if seen else cam.context(context[m, t])
            rows.append(pooled)
    return cam.block(torch.stack(rows)).view(len(x), -1, DIM)


def with_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """``output`` and the gradients of a non-symmetric function of it."""
    weight = torch.linspace(-1, 2, output.numel()).to(output).view_as(output)
    objective = (output * weight + output.square()).mean()
    return [output.detach(), *torch.autograd.grad(objective, leaves, materialize_grads=True)]


def assert_equal(fast: list[Tensor], slow: list[Tensor], rtol: float, atol: float) -> None:
    """Element by element; ``atol`` counts in the largest value of each tensor, if that is above 1."""
    for left, right in zip(fast, slow, strict=True):
        assert left.isfinite().all()
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factorized_equals_direct_with_gradients(kind: str, residual: str, biased: bool, dtype: torch.dtype) -> None:
    cam = build(residual).to(dtype)
    x, context = (part.to(dtype).requires_grad_() for part in inputs())
    bias = torch.randn(M, HEADS, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = bias.to(dtype).requires_grad_() if biased else None
    leaves = [x, context, *cam.parameters()] + ([bias] if biased else [])
    both = [
        with_gradients(cam.pool(x, context, mask_of(kind), bias, impl), leaves) for impl in ("factorized", "reference")
    ]
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-4, 1e-5)
    assert_equal(*both, rtol, atol)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_pooled_equals_the_formulas(kind: str, residual: str, impl: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs()
    bias = torch.randn(M, HEADS, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = mask_of(kind)
    for extra in (None, bias):
        expected = naive_pooled(cam, x, context, mask, extra)
        torch.testing.assert_close(cam.pool(x, context, mask, extra, impl), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_forward_equals_the_formulas(causal: bool, masked: bool, residual: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs(contexts=None)
    mask = mask_of("random")[:, 0] if masked else torch.ones(M, N, dtype=torch.bool)
    mask[1, 0] = not masked  # the first position of a causal sequence then sees nothing
    expected = []
    for m in range(M):
        keys = [j for j in range(N) if mask[m, j]]
        visible = [[j for j in keys if not causal or j <= i] for i in range(N)]
        expected.append(torch.stack(naive(cam, x[m], context[m], visible)))
    got = cam(x, context, mask if masked else None, causal)
    torch.testing.assert_close(got, cam.block(torch.stack(expected)), rtol=1e-9, atol=1e-9)


def test_pooled_is_the_mean_of_forward_where_all_is_visible() -> None:
    cam = build("both")
    x, context = inputs()
    for t in range(T):
        mean = cam(x, context[:, t]).mean(1)
        for impl in ("factorized", "reference"):
            pooled = cam.pool(x, context, mask_of("full"), impl=impl)[:, t]
            torch.testing.assert_close(pooled, mean, rtol=1e-9, atol=1e-9)


def logits_of(cam: ContextAwareAttention, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the logits, [m, heads, n, n] and [m, heads, T, n], head by head."""
    s, c = cam.sequence(x), cam.context(context)
    key, d = cam.key(s), DIM // HEADS
    shared, asked = [], []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        shared.append(cam.query_sequence(s)[..., part] @ key[..., part].mT / math.sqrt(d))
        asked.append(cam.query_context(c)[..., part] @ key[..., part].mT / math.sqrt(d))
    return torch.stack(shared, 1), torch.stack(asked, 1)


def log_denominators(shared: Tensor, asked: Tensor, mask: Tensor) -> Tensor:
    """log of the factorized impl's D [m, heads, T, n], which its float arithmetic cannot hold when it is small."""
    visible = mask[:, None].expand(asked.shape)
    shared = shared - shared.masked_fill(~mask.any(1)[:, None, None], -torch.inf).amax(-1, keepdim=True)
    asked = asked.masked_fill(~visible, -torch.inf)
    asked = asked - asked.amax(-1, keepdim=True)
    return torch.logsumexp(asked[:, :, :, None] + shared[:, :, None], -1).masked_fill(~visible, 0)


@pytest.mark.parametrize("kind", ["random", "sliding", "full"])
@pytest.mark.parametrize(("residual", "scale"), [("context", 700.0), ("both", 700.0), ("both", 150.0)])
def test_huge_logits_stay_finite_and_equal_the_direct_form(kind: str, residual: str, scale: float) -> None:
    cam = build(residual, scale=scale)
    x, context = (part.requires_grad_() for part in inputs())
    mask = mask_of(kind)
    mask = mask | (torch.arange(N) == 0)  # every context sees something; nothing else is at stake here
    with torch.no_grad():
        shared, asked = logits_of(cam, x, context)
        for logits in (shared, asked):
            assert logits.max() - logits.min() > 2000
        lost = log_denominators(shared, asked, mask) < math.log(torch.finfo(torch.float64).tiny)
        assert lost.sum() > 5, "hardly a denominator underflows: nothing would be tested"
        assert not lost.all(), "all denominators underflow: the two branches would not be mixed"
    leaves = [x, context, *cam.parameters()]
    both = [with_gradients(cam.pool(x, context, mask, impl=impl), leaves) for impl in ("factorized", "reference")]
    # Saturated logits have no gradient of their own; the rounding left of it is multiplied by the weights' scale.
    assert_equal(*both, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_denominators_crossing_the_floor(dtype: torch.dtype) -> None:
    """A context's favourite key is the query's least by a margin that runs through every order of magnitude."""
    margins = torch.cat([torch.linspace(0, 100, 101), torch.linspace(110, 800, 70), torch.tensor([5e3, 5e4])])
    shared = torch.zeros(len(margins), 1, 3, 3, dtype=dtype)
    shared[:, 0, :, 1] = -margins[:, None].to(dtype)  # key 1 is the least of every query, key 0 the favourite
    shared[:, 0, :, 2] = -0.5 * margins[:, None].to(dtype)
    asked = torch.zeros(len(margins), 1, 2, 3, dtype=dtype)
    asked[:, 0, :, 0] = -margins[:, None].to(dtype)
    asked[:, 0, 1] = asked[:, 0, 1] + torch.tensor([0.3, -0.2, 0.1], dtype=dtype)
    mask = torch.ones(len(margins), 2, 3, dtype=torch.bool)
    mask[:, 1, 2] = False

    naive_e, naive_f = (
        torch.exp(shared - shared.amax(-1, keepdim=True)),
        torch.exp(asked - asked.amax(-1, keepdim=True)),
    )
    assert ((naive_f.masked_fill(~mask[:, None], 0) @ naive_e.mT) == 0).any(), "nothing underflows"

    values = []
    for impl in get_args(AttentionImpl):
        leaves = [shared.clone().requires_grad_(), asked.clone().requires_grad_()]
        values.append(with_gradients(pooled_attention_weights(leaves[:1], leaves[1], mask, impl)[0], leaves))
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (2e-3, 2e-4)
    assert_equal(*values, rtol, atol)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("kind", ["random", "sliding", "full"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_logits_that_contexts_ask_alike_are_each_as_if_alone(impl: AttentionImpl, kind: str, scale: float) -> None:
    shared, asked = logits_of(build(scale=scale), *inputs())
    several, mask = [shared, shared.flip(2), 0.5 * shared], mask_of(kind)
    leaves = [*several, asked]
    for leaf in leaves:
        leaf.detach_().requires_grad_()
    together = torch.stack(pooled_attention_weights(several, asked, mask, impl))
    alone = torch.stack([reference_weights(each, asked, mask) for each in several])
    weigh = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3), dtype=alone.dtype)
    found = [together, *torch.autograd.grad((together * weigh).sum(), leaves)]
    expected = [alone, *torch.autograd.grad((alone * weigh).sum(), leaves)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    assert pooled_attention_weights([], asked, mask, "reference") == []


def test_narrow_values_are_weighted_as_by_a_product() -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7, 4), (1, 1, 1, 1, 1), (2, 2, 0, 3, 2), (2, 1, 3, 0, 2)):
        m, heads, contexts, n, d = shape
        weights = torch.rand(m, heads, contexts, n, generator=rng, dtype=torch.float64)
        values = torch.randn(m, heads, n, d, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(weighted_sum(weights, values), weights @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_one_mask_for_all_contexts_is_each_contexts_own(impl: str, scale: float) -> None:
    cam, (x, context) = build(scale=scale), inputs()
    own = mask_of("random")[:, :1] | (torch.arange(N) == 0)
    one, each = (cam.pool(x, context, mask, impl=impl) for mask in (own, own.expand(M, T, N)))
    torch.testing.assert_close(one, each, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
def test_weights_are_a_mean_of_distributions(impl: str) -> None:
    cam = build(scale=30.0)
    mask = mask_of("random")
    shared, asked = logits_of(cam, *inputs())
    (weights,) = pooled_attention_weights([shared], asked, mask, impl)
    assert (weights >= 0).all()
    seen = mask.any(-1)[:, None].expand(M, HEADS, T)
    torch.testing.assert_close(weights.sum(-1), seen.double(), rtol=1e-9, atol=1e-9)
    assert not weights.masked_select(~mask[:, None].expand_as(weights)).any()


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_a_context_that_sees_nothing_gives_the_residual(impl: str, residual: str, scale: float) -> None:
    cam = build(residual, scale=scale)
    x, context = (part.requires_grad_() for part in inputs())
    mask = mask_of("random")
    mask[1] = False
    assert not mask[0, 2].any()
    out = cam.pool(x, context, mask, impl=impl)
    assert torch.equal(out[1], cam.context(context)[1])
    assert torch.equal(out[0, 2], cam.context(context)[0, 2])
    leaves = [x, context, *cam.parameters()]
    assert all(part.isfinite().all() for part in with_gradients(out, leaves))
    blind = torch.autograd.grad(cam.pool(x, context, mask, impl=impl)[1].square().sum(), x)[0]
    assert not blind.any(), "what is not seen has no gradient"


def test_positions_without_a_key_give_the_residual() -> None:
    cam = build()
    x, context = (part.requires_grad_() for part in inputs(contexts=None))
    mask = torch.ones(M, N, dtype=torch.bool)
    mask[1] = False
    out = cam(x, context, mask)
    assert torch.equal(out[1], cam.context(context)[1].expand(N, -1))
    assert all(part.isfinite().all() for part in with_gradients(out, [x, context, *cam.parameters()]))


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("residual", ["context", "both"])
def test_padding_changes_nothing(impl: str, residual: str) -> None:
    """Junk in padded tokens, more padding, and each sequence alone without any give the same."""
    cam = build(residual)
    x, context = inputs()
    lengths = [N, 4, 2]
    mask = mask_of("random") & (torch.arange(N) < torch.tensor(lengths)[:, None])[:, None]
    together = cam.pool(x, context, mask, impl=impl)
    junk = x.clone()
    for m, length in enumerate(lengths):
        junk[m, length:] = 1e3
        alone = cam.pool(x[m : m + 1, :length], context[m : m + 1], mask[m : m + 1, :, :length], impl=impl)
        torch.testing.assert_close(together[m : m + 1], alone, rtol=1e-9, atol=1e-9)
    junk = torch.cat([junk, torch.full((M, 3, D_X), -50.0, dtype=torch.float64)], dim=1)
    wider = torch.cat([mask, torch.zeros(M, T, 3, dtype=torch.bool)], dim=2)
    torch.testing.assert_close(cam.pool(junk, context, wider, impl=impl), together, rtol=1e-9, atol=1e-9)

    whole = torch.arange(N) < torch.tensor(lengths)[:, None]
    padded = cam(x, context[:, 0], whole)
    for m, length in enumerate(lengths):
        alone = cam(x[m : m + 1, :length], context[m : m + 1, 0])[0]
        torch.testing.assert_close(padded[m, :length], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_step_with_cache_equals_causal_forward(residual: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs(contexts=None)
    expected = cam(x, context, causal=True)
    seen: Tensor | None = None
    for i in range(N):
        out, seen = cam.decode_step(cam.project_tokens(x[:, i]), cam.project_context(context), seen)
        assert seen.shape == (i + 1, M, 2 * DIM)
        torch.testing.assert_close(out, expected[:, i], rtol=1e-9, atol=1e-9)


def test_causal_outputs_do_not_see_later_tokens() -> None:
    cam = build("both", 1.5)
    x, context = inputs(contexts=None)
    before = cam(x, context, causal=True)
    for i in range(N):
        later = x.clone()
        later[:, i + 1 :] += 3.0
        after = cam(later, context, causal=True)
        assert torch.equal(after[:, : i + 1], before[:, : i + 1])
        if i + 1 < N:
            assert not torch.allclose(after[:, i + 1 :], before[:, i + 1 :])
