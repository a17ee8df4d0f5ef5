"""The monotonic network against in-graph quadrature with one MLP per objective."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from a2gen_rec.nn.monotonic import MonotonicTransform, clenshaw_curtis
from tests.helpers.properties import examples

D = 5


def make(objectives: int = 3, seed: int = 0, scale: float = 1.0, **options: object) -> MonotonicTransform:
    torch.manual_seed(seed)
    module = MonotonicTransform(objectives, D, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= scale
    return module


def slow_rate(module: MonotonicTransform, k: int, tau: Tensor, h: Tensor) -> Tensor:
    """Return f_k of [...] at contexts [..., D] by an MLP on the concatenation."""
    hidden = module.input.shape[1]
    rows = slice(k * hidden, (k + 1) * hidden)
    first = torch.cat([module.input[k], module.context.weight[rows]], dim=1)
    x = F.linear(torch.cat([tau[..., None], h], dim=-1), first, module.context.bias[rows])
    layers = list(module.layers)
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = F.linear(F.silu(x), weight[k], bias[k, :, 0])
    return F.elu(x).squeeze(-1) + 1 + 1e-4


def slow(module: MonotonicTransform, p: Tensor, h: Tensor) -> Tensor:
    """Evaluate all nodes of all objectives within the graph."""
    h = h.expand(*p.shape[:2], -1)
    transforms = []
    for k in range(p.shape[-1]):
        full = slow_integral(module, k, torch.ones_like(p[..., k]), h)
        transforms.append(slow_integral(module, k, p[..., k], h) / full)
    return torch.stack(transforms, dim=-1)


def slow_integral(module: MonotonicTransform, k: int, p: Tensor, h: Tensor) -> Tensor:
    """Return ∫_0^p f_k of [n, C] at contexts [n, C, D]."""
    nodes, weights = (torch.tensor(part, dtype=p.dtype) for part in clenshaw_curtis(module.degree))
    rate = slow_rate(module, k, p[..., None] * nodes, h[:, :, None].expand(-1, -1, len(nodes), -1))
    return p * (rate * weights).sum(-1)


def inputs(n: int, candidates: int, objectives: int, shared: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    p = torch.rand(n, candidates, objectives, generator=rng, dtype=torch.float64)
    h = torch.randn(n, 1 if shared else candidates, D, generator=rng, dtype=torch.float64)
    return p.requires_grad_(), h.requires_grad_()


def slopes(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)


def gradients(module: MonotonicTransform, out: Tensor, p: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [p, h, *module.parameters()], slopes(out))


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7, 31, 32])
def test_quadrature_is_exact_up_to_its_degree(degree: int) -> None:
    nodes, weights = (np.array(part) for part in clenshaw_curtis(degree))
    errors = [abs(weights @ nodes**power - 1 / (power + 1)) for power in range(degree + 3)]
    assert max(errors[: degree + 1]) < 1e-15
    assert degree > 10 or errors[degree + 2] > 1e-6
    assert len(nodes) == degree + 1
    assert weights.min() > 0


def test_quadrature_of_degree_two_is_simpsons_rule() -> None:
    nodes, weights = clenshaw_curtis(2)
    np.testing.assert_allclose(nodes, [0, 0.5, 1], atol=1e-16)
    np.testing.assert_allclose(weights, [1 / 6, 4 / 6, 1 / 6])


@examples(25)
@given(
    n=st.integers(1, 3),
    candidates=st.integers(0, 4),
    objectives=st.integers(1, 4),
    shared=st.booleans(),
    hidden=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_transforms_and_gradients_equal_in_graph_quadrature(
    n: int, candidates: int, objectives: int, shared: bool, hidden: list[int], seed: int
) -> None:
    module = make(objectives, seed, scale=2.0, hidden_dims=hidden)
    p, h = inputs(n, candidates, objectives, shared, seed)
    fast, reference = module(p, h), slow(module, p, h)
    torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)
    (by_p, *fast_gradients), (_, *others) = gradients(module, fast, p, h), gradients(module, reference, p, h)
    for one, other in zip(fast_gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    # By Leibniz, ∂t/∂p is the derivative itself, not the derivative of the quadrature.
    contexts = h.expand(-1, candidates, -1)
    one = torch.ones_like(p[..., 0])
    rates = torch.stack(
        [
            slow_rate(module, k, p[..., k], contexts) / slow_integral(module, k, one, contexts)
            for k in range(objectives)
        ],
        dim=-1,
    )
    torch.testing.assert_close(by_p, rates * slopes(fast), rtol=1e-9, atol=1e-9)


def test_transforms_equal_integral() -> None:
    """Compare with another rule of more nodes; the kink of f', where ELU becomes linear, leaves about 1e-8."""
    module = make(2, scale=2.0)
    p, h = inputs(3, 4, 2, shared=False)
    x, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(80))
    for k in range(2):
        tau = p[..., k, None] * (x + 1) / 2
        rate = slow_rate(module, k, tau, h[:, :, None].expand(-1, -1, 80, -1))
        full = slow_rate(module, k, ((x + 1) / 2).expand(*p.shape[:2], -1), h[:, :, None].expand(-1, -1, 80, -1))
        exact = p[..., k] * (rate * weights).sum(-1) / (full * weights).sum(-1)
        torch.testing.assert_close(module(p, h)[..., k], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_equal_finite_differences(shared: bool) -> None:
    module = make(2, scale=2.0, hidden_dims=(4, 3))
    p, h = inputs(2, 3, 2, shared)
    names = [name for name, _ in module.named_parameters()]

    def call(p: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (p, h))

    assert torch.autograd.gradcheck(call, (p, h, *module.parameters()))


def _saved_bytes(call: object, *arguments: Tensor) -> int:
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call(*arguments)  # type: ignore[operator]
    return sum(saved)


def _peak_bytes(call: object, *arguments: Tensor) -> int:
    """Return the peak number of bytes allocated in forward and backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(*arguments).sum().backward()  # type: ignore[operator]
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def test_memory_is_independent_of_number_of_nodes() -> None:
    few, many = make(4, degree=4), make(4, degree=32)
    p, h = inputs(2, 300, 4, shared=False)
    assert _saved_bytes(many, p, h) == _saved_bytes(few, p, h)
    assert _peak_bytes(many, p, h) < 1.01 * _peak_bytes(few, p, h)
    assert _peak_bytes(lambda p, h: slow(many, p, h), p, h) > 4 * _peak_bytes(lambda p, h: slow(few, p, h), p, h)


def test_autocast_has_no_effect() -> None:
    module = make().float()
    p, h = (part.detach().float().requires_grad_() for part in inputs(2, 6, 3, shared=True))
    plain = module(p, h)
    integrand = [p, module.input, *module.layers]
    with torch.autocast("cpu", torch.bfloat16):
        assert (h @ h.transpose(1, 2)).dtype == torch.bfloat16
        out = module(p, h)
        # The backward pass evaluates the nodes again, in float32 even under autocast.
        inside = torch.autograd.grad(out, integrand, slopes(plain), retain_graph=True)
    assert out.dtype == torch.float32
    assert torch.equal(out, plain)
    assert all(map(torch.equal, inside, torch.autograd.grad(plain, integrand, slopes(plain), retain_graph=True)))
    assert all(map(torch.equal, gradients(module, out, p, h), gradients(module, plain, p, h)))


def test_half_precision_inputs_are_computed_in_float32() -> None:
    module = make().float()
    p, h = (part.detach().bfloat16() for part in inputs(2, 6, 3, shared=True))
    out = module(p, h)
    assert out.dtype == torch.float32
    assert torch.equal(out, module(p.float(), h.float()))


def test_objectives_and_candidates_are_independent() -> None:
    module = make()
    p, h = inputs(2, 4, 3, shared=False)
    before = module(p, h)
    changed = p.detach().clone()
    changed[1, 2, 1] = 0.999 * changed[1, 2, 1]
    differs = module(changed, h) != before
    assert differs.nonzero().tolist() == [[1, 2, 1]]


@examples(50)
@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_transforms_are_strictly_increasing(scores: list[float], seed: int, scale: float) -> None:
    """In float64 for any two distinct float32 numbers; in float32 up to its rounding."""
    module = make(3, seed, scale)
    h = torch.randn(1, 1, D, dtype=torch.float64)
    p = torch.tensor(sorted({0.0, *scores, 1.0}), dtype=torch.float64)
    p = p[None, :, None].expand(1, -1, 3)
    with torch.no_grad():
        out = module(p, h)
        single = module.float()(p, h).double()
    assert (out.diff(dim=1) > 0).all()
    rounding = 8 * torch.finfo(torch.float32).eps * single.abs().max()
    assert (single.diff(dim=1) > 0).logical_or(out.diff(dim=1) < rounding).all()
    assert (single.diff(dim=1) > -rounding).all()


def test_equal_inputs_have_equal_transforms_from_zero_to_one() -> None:
    """Up to the rounding of kernels, which may compute the last elements of a tensor in another way."""
    module = make().float()
    h = torch.randn(1, 1, D)
    p = torch.tensor([0.0, 1.0, 0.37])[None, :, None].repeat(1, 333, 3)
    out = module(p, h)
    for value in range(3):
        equal = out[0, value::3]
        assert (equal.amax(0) - equal.amin(0)).max() <= 4 * torch.finfo(torch.float32).eps
    assert out[0, 0].tolist() == [0] * 3
    torch.testing.assert_close(out[0, 1], torch.ones(3))
