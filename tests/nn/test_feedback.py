"""Feedback views against loops over the formulas of METHODS §5, and both implementations against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from a2gen_rec.nn.attention import AttentionConfig
from a2gen_rec.nn.feedback import DualViewAttention
from tests.helpers.properties import examples

M, N, T, HEADS, D_X, D_C, DIM = 3, 8, 6, 2, 5, 6, 8
IMPLS = ["factorized", "reference"]


def build(residual: str = "context", mlp_ratio: float = 0.0, include_full_history: bool = False) -> DualViewAttention:
    """Return a float64 module without zero parameters."""
    module = DualViewAttention(
        D_X, D_C, AttentionConfig(DIM, HEADS, residual, mlp_ratio), include_full_history
    ).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module


def inputs(m: int = M, n: int = N, t: int = T, seed: int = 0) -> dict[str, Tensor]:
    """Return random windows. In window 0, context 0 sees nothing, 1 one view, 2 the other view, 3 no view.

    Window 1 has no negative impression, window 2 has all in one view or the other.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, D_X, generator=rng, dtype=torch.float64)
    context = torch.randn(m, t, D_C, generator=rng, dtype=torch.float64)
    bias = torch.randn(m, HEADS, t, n, generator=rng, dtype=torch.float64)
    mask = torch.rand(m, t, n, generator=rng) < 0.6
    view = torch.randint(0, 3, (m, n), generator=rng)
    if (m, n, t) == (M, N, T):
        view[0] = torch.arange(N) % 3
        view[1, view[1] == 2] = 0
        view[2, view[2] == 0] = 1
        mask[0, 0] = False
        mask[0, 1], mask[0, 2], mask[0, 3] = view[0] == 1, view[0] == 2, view[0] == 0
    return {"x": x, "context": context, "mask": mask, "positive": view == 1, "negative": view == 2, "bias": bias}


def reference(module: DualViewAttention, *, x: Tensor, context: Tensor, mask: Tensor, **views: Tensor) -> Tensor:
    """Evaluate the formulas with one window, context, view, query and head at a time."""
    cam, d = module.cam, DIM // HEADS
    w_q = torch.cat([cam.query_sequence.weight, cam.query_context.weight], dim=1)
    rows = []
    for m in range(len(x)):
        for t in range(context.shape[1]):
            c = context[m, t]
            s, e = x[m] @ cam.sequence.weight.T, cam.context.weight @ c
            visible_keys = mask[m, t].nonzero().flatten().tolist()

            def pooled(
                visible: list[int], value: Tensor, m: int = m, t: int = t, s: Tensor = s, e: Tensor = e, c: Tensor = c
            ) -> Tensor:
                total = torch.zeros(DIM, dtype=torch.float64)
                mix = torch.softmax(cam.gate.weight @ c, 0)
                for i in visible:
                    query = w_q @ torch.cat([s[i], e])
                    for h in range(HEADS):
                        part = slice(h * d, (h + 1) * d)
                        keys = s[visible] @ cam.key.weight[part].T
                        attention = torch.softmax(
                            keys @ query[part] / math.sqrt(d) + views["bias"][m, h, t, visible], 0
                        )
                        out = cam.output.weight[:, part] @ (value[part] @ (attention @ s[visible]))
                        total = total + mix[h] * out / len(visible)
                return total

            maps = {"positive": cam.value.weight, "negative": module.negative_value.weight}
            v = {name: pooled([j for j in visible_keys if views[name][m, j]], value) for name, value in maps.items()}
            liked, disliked = v["positive"], v["negative"]
            gate = 1 / (1 + torch.exp(-module.gate.weight @ torch.cat([c, liked, disliked]) - module.gate.bias))
            parts = [liked, gate * disliked, liked * e, disliked * e]
            parts += [pooled(visible_keys, cam.value.weight)] if module.include_full_history else []
            row = module.project.weight @ torch.cat(parts) + e
            if cam.residual == "both" and visible_keys:
                row = row + s[visible_keys].mean(0)
            rows.append(row)
    return cam.block(torch.stack(rows)).view(len(x), -1, DIM)


def with_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 2, output.numel()).to(output).view_as(output)
    objective = (output * weight + output.square()).sum()
    return [output.detach(), *torch.autograd.grad(objective, leaves, materialize_grads=True)]


def both_impls(module: DualViewAttention, case: dict[str, Tensor]) -> list[list[Tensor]]:
    """Return the output and all gradients of the factorized and the reference implementation."""
    named = {name: part.requires_grad_() if part.is_floating_point() else part for name, part in case.items()}
    leaves = [part for part in named.values() if part.requires_grad] + list(module.parameters())
    return [with_gradients(module(**named, impl=impl), leaves) for impl in IMPLS]


def assert_equal(fast: list[Tensor], slow: list[Tensor], tolerance: float) -> None:
    for left, right in zip(fast, slow, strict=True):
        assert left.isfinite().all()
        scale = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("include_full_history", [True, False])
@pytest.mark.parametrize(("residual", "mlp_ratio"), [("context", 0.0), ("both", 0.0), ("both", 1.5)])
def test_equals_formulas(impl: str, include_full_history: bool, residual: str, mlp_ratio: float) -> None:
    module, case = build(residual, mlp_ratio, include_full_history), inputs()
    torch.testing.assert_close(module(**case, impl=impl), reference(module, **case), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 3), st.integers(0, 7), st.integers(0, 5), st.integers(0, 1000), st.booleans())
@examples(60)
def test_factorized_equals_reference_with_gradients(
    m: int, n: int, t: int, seed: int, include_full_history: bool
) -> None:
    assert_equal(*both_impls(build("both", 1.5, include_full_history), inputs(m, n, t, seed)), 1e-9)


@pytest.mark.parametrize("include_full_history", [True, False])
def test_every_parameter_has_gradient_in_float32(include_full_history: bool) -> None:
    module, case = build("both", 1.5, include_full_history), inputs()
    slow = both_impls(module, case)[1]
    assert all(part.any() for part in slow)
    single = {name: part.detach().float() if part.is_floating_point() else part for name, part in case.items()}
    fast = both_impls(module.float(), single)[0]
    assert all(part.dtype == torch.float32 for part in fast)
    assert_equal([part.double() for part in fast], slow, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_margin_between_views_is_exact(dtype: torch.dtype) -> None:
    """A context may prefer one view over the other by any margin without any effect within the other.

    The margins run past where the exponentials of the other view, or all the denominators of it, are zero.
    """
    module = build("both", include_full_history=False).to(dtype)
    case = inputs()
    case = {name: part.to(dtype) if part.is_floating_point() else part for name, part in case.items()}
    near = module(**case)
    for margin in (10.0, 30.0, 60.0, 90.0, 120.0, 600.0, 800.0, 5e3):
        far = case["bias"].detach() - margin * case["negative"][:, None, None]
        assert (torch.exp(far.amin(-1) - far.amax(-1)) == 0).any() or margin < 800
        moved = {**case, "bias": far}
        fast, slow = both_impls(module, moved)
        assert_equal(fast, slow, 1e-9 if dtype == torch.float64 else 5e-3)
        torch.testing.assert_close(fast[0], near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", ["context", "both"])
def test_empty_view_is_zero(impl: str, residual: str) -> None:
    """Only contexts that see a view depend on its value projection."""
    module, case = build(residual), inputs()
    parts = {"positive": module.cam.value.weight, "negative": module.negative_value.weight}
    for name, value in parts.items():
        reached = (case["mask"] & case[name][:, None]).any(-1)
        assert reached.any()
        assert not reached.all()
        out = module(**case, impl=impl)
        for m, t in (~reached).nonzero().tolist():
            (gradient,) = torch.autograd.grad(out[m, t].square().sum(), value, retain_graph=True)
            assert not gradient.any()
        for m, t in reached.nonzero().tolist():
            (gradient,) = torch.autograd.grad(out[m, t].square().sum(), value, retain_graph=True)
            assert gradient.any()
    blind = module(**case, impl=impl)[0]
    residuals = module.cam.context(case["context"][0])
    assert torch.equal(blind[0], residuals[0])
    if residual == "both":
        visible = case["mask"][0, 3]
        residuals = residuals + module.cam.sequence(case["x"][0, visible]).mean(0)
    torch.testing.assert_close(blind[3], residuals[3], rtol=1e-12, atol=1e-12)
    assert all(part.isfinite().all() for impl in both_impls(module, case) for part in impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("include_full_history", [True, False])
def test_impressions_of_neither_view_affect_only_full_history(impl: str, include_full_history: bool) -> None:
    module, case = build("context", include_full_history=include_full_history), inputs()
    neither = ~(case["positive"] | case["negative"])
    moved = {**case, "x": torch.where(neither[..., None], 3.0, case["x"])}
    before, after = module(**case, impl=impl), module(**moved, impl=impl)
    touched = (case["mask"] & neither[:, None]).any(-1)
    assert touched.any()
    torch.testing.assert_close(before[~touched], after[~touched], rtol=1e-9, atol=1e-9)
    assert (
        torch.isclose(before, after, rtol=1e-9, atol=1e-9)
        .all(-1)[touched]
        .logical_xor(torch.tensor(include_full_history))
        .all()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("include_full_history", [True, False])
def test_order_and_padding_have_no_effect(impl: str, include_full_history: bool) -> None:
    module, case = build("both", include_full_history=include_full_history), inputs()
    expected = module(**case, impl=impl)
    pad = torch.full((M, 3, D_X), 50.0, dtype=torch.float64)
    order = torch.randperm(N + 3, generator=torch.Generator().manual_seed(1))
    changed = {
        "x": torch.cat([case["x"], pad], dim=1)[:, order],
        "context": case["context"],
        "mask": torch.cat([case["mask"], torch.zeros(M, T, 3, dtype=torch.bool)], dim=2)[..., order],
        "bias": torch.cat([case["bias"], torch.full((M, HEADS, T, 3), 9.0)], dim=3)[..., order],
        "positive": torch.cat([case["positive"], torch.tensor([[True, False, False]] * M)], dim=1)[:, order],
        "negative": torch.cat([case["negative"], torch.tensor([[False, True, False]] * M)], dim=1)[:, order],
    }
    torch.testing.assert_close(module(**changed, impl=impl), expected, rtol=1e-9, atol=1e-9)


def with_gate(value: float) -> DualViewAttention:
    module = build("both", 1.5)
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.fill_(value)
    return module


def test_closed_gate_keeps_only_interaction_of_negative_view() -> None:
    module, case = with_gate(-1e4), inputs()
    expected = module(**case)
    with torch.no_grad():
        module.project.weight[:, DIM : 2 * DIM] = 7.0
    assert torch.equal(module(**case), expected)
    with torch.no_grad():
        module.project.weight[:, 3 * DIM :] = 0.0
        cut = module(**case)
        module.negative_value.weight.zero_()
    assert torch.equal(module(**case), cut)
    assert not torch.equal(cut, expected)


def test_views_are_symmetric_with_open_gate() -> None:
    """Swapping the views with their value projections and columns of the output projection has no effect."""
    module, case = with_gate(1e4), inputs()
    expected = module(**case)
    swapped = {**case, "positive": case["negative"], "negative": case["positive"]}
    assert not torch.allclose(module(**swapped), expected)
    with torch.no_grad():
        first, second = module.cam.value.weight.clone(), module.negative_value.weight.clone()
        module.cam.value.weight.copy_(second)
        module.negative_value.weight.copy_(first)
        blocks = module.project.weight.clone().split(DIM, dim=1)
        module.project.weight.copy_(torch.cat([blocks[1], blocks[0], blocks[3], blocks[2]], dim=1))
    torch.testing.assert_close(module(**swapped), expected, rtol=1e-9, atol=1e-9)
