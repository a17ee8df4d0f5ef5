"""Context-aware attention against loops over the formulas of METHODS §2, and its implementations against each other."""

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
    """Return a float64 CAM without zero parameters; ``scale`` multiplies the query weights."""
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


def make_mask(kind: str) -> Tensor:
    """Return a mask [M, T, N] of each way in which targets may see different impressions."""
    rng = torch.Generator().manual_seed(7)
    position = torch.arange(N)
    targets = torch.arange(T)[:, None] + N - T
    if kind == "random":
        mask = torch.rand(M, T, N, generator=rng) < 0.5
        mask[0, 2] = False
        return mask
    if kind == "ragged":
        return (position < torch.tensor([N, 4, 0])[:, None])[:, None].expand(M, T, N)
    if kind == "sliding":
        return ((position < targets) & (position >= targets - 3)).expand(M, T, N)
    if kind == "ended":
        end = position + torch.rand(M, N, generator=rng) * 4
        return (position < targets) & (end[:, None] <= targets)
    return torch.ones(M, T, N, dtype=torch.bool)


def reference(
    cam: ContextAwareAttention,
    x: Tensor,
    c: Tensor,
    visible: list[list[int]],
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Evaluate the formulas of METHODS §2 for one sequence x [n, d] and one context c [d_c], without the block.

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


def reference_pool(cam: ContextAwareAttention, x: Tensor, context: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for m in range(len(x)):
        for t in range(context.shape[1]):
            visible = mask[m, t].nonzero().flatten().tolist()
            outputs = reference(cam, x[m], context[m, t], [visible] * N, None if bias is None else bias[m, :, t])
            pooled = sum(outputs[i] for i in visible) / len(visible) if visible else cam.context(context[m, t])
            rows.append(pooled)
    return cam.block(torch.stack(rows)).view(len(x), -1, DIM)


def with_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return ``output`` and the gradients of a non-symmetric function of it."""
    weight = torch.linspace(-1, 2, output.numel()).to(output).view_as(output)
    objective = (output * weight + output.square()).mean()
    return [output.detach(), *torch.autograd.grad(objective, leaves, materialize_grads=True)]


def assert_equal(fast: list[Tensor], slow: list[Tensor], rtol: float, atol: float) -> None:
    """Compare element by element; ``atol`` is relative to the largest value of each tensor if that is above 1."""
    for left, right in zip(fast, slow, strict=True):
        assert left.isfinite().all()
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factorized_equals_reference_with_gradients(kind: str, residual: str, biased: bool, dtype: torch.dtype) -> None:
    cam = build(residual).to(dtype)
    x, context = (part.to(dtype).requires_grad_() for part in inputs())
    bias = torch.randn(M, HEADS, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = bias.to(dtype).requires_grad_() if biased else None
    leaves = [x, context, *cam.parameters()] + ([bias] if biased else [])
    outputs = [
        with_gradients(cam.pool(x, context, make_mask(kind), bias, impl), leaves)
        for impl in ("factorized", "reference")
    ]
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-4, 1e-5)
    assert_equal(*outputs, rtol, atol)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_pool_equals_formulas(kind: str, residual: str, impl: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs()
    bias = torch.randn(M, HEADS, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = make_mask(kind)
    for extra in (None, bias):
        expected = reference_pool(cam, x, context, mask, extra)
        torch.testing.assert_close(cam.pool(x, context, mask, extra, impl), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_forward_equals_formulas(causal: bool, masked: bool, residual: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs(contexts=None)
    mask = make_mask("random")[:, 0] if masked else torch.ones(M, N, dtype=torch.bool)
    mask[1, 0] = not masked  # the first position of a causal sequence then has no key
    expected = []
    for m in range(M):
        keys = [j for j in range(N) if mask[m, j]]
        visible = [[j for j in keys if not causal or j <= i] for i in range(N)]
        expected.append(torch.stack(reference(cam, x[m], context[m], visible)))
    actual = cam(x, context, mask if masked else None, causal)
    torch.testing.assert_close(actual, cam.block(torch.stack(expected)), rtol=1e-9, atol=1e-9)


def test_pool_is_mean_of_forward_without_mask() -> None:
    cam = build("both")
    x, context = inputs()
    for t in range(T):
        mean = cam(x, context[:, t]).mean(1)
        for impl in ("factorized", "reference"):
            pooled = cam.pool(x, context, make_mask("full"), impl=impl)[:, t]
            torch.testing.assert_close(pooled, mean, rtol=1e-9, atol=1e-9)


def get_logits(cam: ContextAwareAttention, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of the logits, [m, heads, n, n] and [m, heads, T, n], computed head by head."""
    s, c = cam.sequence(x), cam.context(context)
    key, d = cam.key(s), DIM // HEADS
    shared, context_logits = [], []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        shared.append(cam.query_sequence(s)[..., part] @ key[..., part].mT / math.sqrt(d))
        context_logits.append(cam.query_context(c)[..., part] @ key[..., part].mT / math.sqrt(d))
    return torch.stack(shared, 1), torch.stack(context_logits, 1)


def log_denominators(shared: Tensor, context_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the log of the factorization's D [m, heads, T, n], which underflows in floating point if small."""
    visible = mask[:, None].expand(context_logits.shape)
    shared = shared - shared.masked_fill(~mask.any(1)[:, None, None], -torch.inf).amax(-1, keepdim=True)
    context_logits = context_logits.masked_fill(~visible, -torch.inf)
    context_logits = context_logits - context_logits.amax(-1, keepdim=True)
    return torch.logsumexp(context_logits[:, :, :, None] + shared[:, :, None], -1).masked_fill(~visible, 0)


@pytest.mark.parametrize("kind", ["random", "sliding", "full"])
@pytest.mark.parametrize(("residual", "scale"), [("context", 700.0), ("both", 700.0), ("both", 150.0)])
def test_huge_logits_stay_finite_and_equal_reference(kind: str, residual: str, scale: float) -> None:
    cam = build(residual, scale=scale)
    x, context = (part.requires_grad_() for part in inputs())
    mask = make_mask(kind)
    mask = mask | (torch.arange(N) == 0)  # every context has at least one key
    with torch.no_grad():
        shared, context_logits = get_logits(cam, x, context)
        for logits in (shared, context_logits):
            assert logits.max() - logits.min() > 2000
        underflow = log_denominators(shared, context_logits, mask) < math.log(torch.finfo(torch.float64).tiny)
        assert underflow.sum() > 5, "too few denominators underflow for this test"
        assert not underflow.all(), "all denominators underflow: the branches are not mixed"
    leaves = [x, context, *cam.parameters()]
    outputs = [with_gradients(cam.pool(x, context, mask, impl=impl), leaves) for impl in ("factorized", "reference")]
    # Saturated logits have zero gradient; its rounding error is multiplied by the scale of the weights.
    assert_equal(*outputs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_denominators_around_the_floor(dtype: torch.dtype) -> None:
    """The context's largest key is the query's smallest, by margins of every order of magnitude."""
    margins = torch.cat([torch.linspace(0, 100, 101), torch.linspace(110, 800, 70), torch.tensor([5e3, 5e4])])
    shared = torch.zeros(len(margins), 1, 3, 3, dtype=dtype)
    shared[:, 0, :, 1] = -margins[:, None].to(dtype)  # key 1 is the smallest of every query, key 0 the largest
    shared[:, 0, :, 2] = -0.5 * margins[:, None].to(dtype)
    context_logits = torch.zeros(len(margins), 1, 2, 3, dtype=dtype)
    context_logits[:, 0, :, 0] = -margins[:, None].to(dtype)
    context_logits[:, 0, 1] = context_logits[:, 0, 1] + torch.tensor([0.3, -0.2, 0.1], dtype=dtype)
    mask = torch.ones(len(margins), 2, 3, dtype=torch.bool)
    mask[:, 1, 2] = False

    shared_exp, context_exp = (
        torch.exp(shared - shared.amax(-1, keepdim=True)),
        torch.exp(context_logits - context_logits.amax(-1, keepdim=True)),
    )
    assert ((context_exp.masked_fill(~mask[:, None], 0) @ shared_exp.mT) == 0).any(), "nothing underflows"

    values = []
    for impl in get_args(AttentionImpl):
        leaves = [shared.clone().requires_grad_(), context_logits.clone().requires_grad_()]
        values.append(with_gradients(pooled_attention_weights(leaves[:1], leaves[1], mask, impl)[0], leaves))
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (2e-3, 2e-4)
    assert_equal(*values, rtol, atol)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("kind", ["random", "sliding", "full"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_several_shared_logits_equal_one_at_a_time(impl: AttentionImpl, kind: str, scale: float) -> None:
    shared, context_logits = get_logits(build(scale=scale), *inputs())
    several, mask = [shared, shared.flip(2), 0.5 * shared], make_mask(kind)
    leaves = [*several, context_logits]
    for leaf in leaves:
        leaf.detach_().requires_grad_()
    joint = torch.stack(pooled_attention_weights(several, context_logits, mask, impl))
    single = torch.stack([reference_weights(logits, context_logits, mask) for logits in several])
    weigh = torch.randn(single.shape, generator=torch.Generator().manual_seed(3), dtype=single.dtype)
    results = [joint, *torch.autograd.grad((joint * weigh).sum(), leaves)]
    expected = [single, *torch.autograd.grad((single * weigh).sum(), leaves)]
    for left, right in zip(results, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)
    assert pooled_attention_weights([], context_logits, mask, "reference") == []


def test_weighted_sum_equals_matrix_product() -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7, 4), (1, 1, 1, 1, 1), (2, 2, 0, 3, 2), (2, 1, 3, 0, 2)):
        m, heads, contexts, n, d = shape
        weights = torch.rand(m, heads, contexts, n, generator=rng, dtype=torch.float64)
        values = torch.randn(m, heads, n, d, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(weighted_sum(weights, values), weights @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_shared_mask_equals_repeated_mask(impl: str, scale: float) -> None:
    cam, (x, context) = build(scale=scale), inputs()
    shared_mask = make_mask("random")[:, :1] | (torch.arange(N) == 0)
    shared, repeated = (cam.pool(x, context, mask, impl=impl) for mask in (shared_mask, shared_mask.expand(M, T, N)))
    torch.testing.assert_close(shared, repeated, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
def test_weights_are_a_mean_of_distributions(impl: str) -> None:
    cam = build(scale=30.0)
    mask = make_mask("random")
    shared, context_logits = get_logits(cam, *inputs())
    (weights,) = pooled_attention_weights([shared], context_logits, mask, impl)
    assert (weights >= 0).all()
    has_keys = mask.any(-1)[:, None].expand(M, HEADS, T)
    torch.testing.assert_close(weights.sum(-1), has_keys.double(), rtol=1e-9, atol=1e-9)
    assert not weights.masked_select(~mask[:, None].expand_as(weights)).any()


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_empty_mask_gives_residual(impl: str, residual: str, scale: float) -> None:
    cam = build(residual, scale=scale)
    x, context = (part.requires_grad_() for part in inputs())
    mask = make_mask("random")
    mask[1] = False
    assert not mask[0, 2].any()
    out = cam.pool(x, context, mask, impl=impl)
    assert torch.equal(out[1], cam.context(context)[1])
    assert torch.equal(out[0, 2], cam.context(context)[0, 2])
    leaves = [x, context, *cam.parameters()]
    assert all(part.isfinite().all() for part in with_gradients(out, leaves))
    blind = torch.autograd.grad(cam.pool(x, context, mask, impl=impl)[1].square().sum(), x)[0]
    assert not blind.any(), "masked positions have no gradient"


def test_positions_without_key_give_residual() -> None:
    cam = build()
    x, context = (part.requires_grad_() for part in inputs(contexts=None))
    mask = torch.ones(M, N, dtype=torch.bool)
    mask[1] = False
    out = cam(x, context, mask)
    assert torch.equal(out[1], cam.context(context)[1].expand(N, -1))
    assert all(part.isfinite().all() for part in with_gradients(out, [x, context, *cam.parameters()]))


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("residual", ["context", "both"])
def test_padding_has_no_effect(impl: str, residual: str) -> None:
    """Random padded tokens, more padding, and single sequences without padding have equal results."""
    cam = build(residual)
    x, context = inputs()
    lengths = [N, 4, 2]
    mask = make_mask("random") & (torch.arange(N) < torch.tensor(lengths)[:, None])[:, None]
    joint = cam.pool(x, context, mask, impl=impl)
    junk = x.clone()
    for m, length in enumerate(lengths):
        junk[m, length:] = 1e3
        single = cam.pool(x[m : m + 1, :length], context[m : m + 1], mask[m : m + 1, :, :length], impl=impl)
        torch.testing.assert_close(joint[m : m + 1], single, rtol=1e-9, atol=1e-9)
    junk = torch.cat([junk, torch.full((M, 3, D_X), -50.0, dtype=torch.float64)], dim=1)
    wider = torch.cat([mask, torch.zeros(M, T, 3, dtype=torch.bool)], dim=2)
    torch.testing.assert_close(cam.pool(junk, context, wider, impl=impl), joint, rtol=1e-9, atol=1e-9)

    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    padded = cam(x, context[:, 0], mask)
    for m, length in enumerate(lengths):
        single = cam(x[m : m + 1, :length], context[m : m + 1, 0])[0]
        torch.testing.assert_close(padded[m, :length], single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", ["context", "both"])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_decode_step_equals_causal_forward(residual: str, mlp_ratio: float) -> None:
    cam = build(residual, mlp_ratio)
    x, context = inputs(contexts=None)
    expected = cam(x, context, causal=True)
    kv: Tensor | None = None
    for i in range(N):
        out, kv = cam.decode_step(cam.project_tokens(x[:, i]), cam.project_context(context), kv)
        assert kv.shape == (i + 1, M, 2 * DIM)
        torch.testing.assert_close(out, expected[:, i], rtol=1e-9, atol=1e-9)


def test_causal_outputs_ignore_later_tokens() -> None:
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
