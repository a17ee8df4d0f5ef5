"""The extraction level against tasks, experts and targets in loops, its limits, and where it starts."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.nn.objectives import MultiObjectiveHead, ObjectivePredictions

D, DIM, TARGETS = 6, 4, 5


def build(objectives: int = 3, watch_time: bool = True, shared: int = 2, own: int = 2) -> MultiObjectiveHead:
    """Float64 heads of which nothing starts at zero."""
    module = MultiObjectiveHead(D, DIM, objectives, watch_time, shared, own, tower_ratio=1.5).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module


def contexts(targets: int = TARGETS) -> Tensor:
    return torch.randn(targets, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def together(predicted: ObjectivePredictions) -> Tensor:
    """[targets, tasks]"""
    return torch.cat([predicted.logits, *([] if predicted.watch_time is None else [predicted.watch_time[:, None]])], 1)


def naive(module: MultiObjectiveHead, context: Tensor) -> Tensor:
    """[targets, tasks], one target, one task and one expert at a time."""
    width = module.shared + module.task_specific
    rows = []
    for c in context:
        x = F.layer_norm(c, (D,), module.norm.weight, module.norm.bias)

        def expert(e: int, x: Tensor = x) -> Tensor:
            rows = slice(e * DIM, (e + 1) * DIM)
            return F.gelu(module.experts.weight[rows] @ x + module.experts.bias[rows])

        row = []
        for k in range(module.num_tasks):
            mine = [
                *range(module.shared),
                *(module.shared + k * module.task_specific + o for o in range(module.task_specific)),
            ]
            part = slice(k * width, (k + 1) * width)
            scores = torch.exp(module.gates.weight[part] @ x + module.gates.bias[part])
            mixed = sum(score / scores.sum() * expert(e) for score, e in zip(scores, mine, strict=True))
            hidden = F.gelu(mixed @ module.tower_weight[k] + module.tower_bias[k, 0])
            row.append(hidden @ module.last_weight[k, :, 0] + module.last_bias[k, 0, 0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("objectives", "watch_time"), [(3, True), (3, False), (1, False), (0, True)])
@pytest.mark.parametrize(("shared", "own"), [(2, 2), (1, 1), (3, 0), (0, 2)])
def test_equals_loops_with_gradients(objectives: int, watch_time: bool, shared: int, own: int) -> None:
    module, context = build(objectives, watch_time, shared, own), contexts()
    predicted = module(context)
    assert predicted.logits.shape == (TARGETS, objectives)
    assert (predicted.watch_time is not None) is watch_time
    leaves = [context, *module.parameters()]
    weight = torch.linspace(-1, 2, module.num_tasks)
    values = [
        [each, *torch.autograd.grad((each * weight).square().sum(), leaves)]
        for each in (together(predicted), naive(module, context))
    ]
    for fast, slow in zip(*values, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    assert all(gradient.any() for gradient in values[0][1:])
    assert together(module(contexts(0).detach())).shape == (0, module.num_tasks)


def test_own_experts_learn_of_their_own_task_and_shared_ones_of_all() -> None:
    module, context = build(), contexts()
    predicted = together(module(context))
    for task in range(module.num_tasks):
        (gradient,) = torch.autograd.grad(predicted[:, task].sum(), module.experts.weight, retain_graph=True)
        reached = gradient.unflatten(0, (-1, DIM)).flatten(1).any(1)
        mine = {0, 1, 2 + 2 * task, 3 + 2 * task}
        assert reached.nonzero().flatten().tolist() == sorted(mine)


def test_a_saturated_gate_takes_one_expert() -> None:
    """The experts left out have no say, whatever they hold."""
    module, context = build(), contexts()
    with torch.no_grad():
        module.gates.weight.zero_()
        module.gates.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]).repeat(module.num_tasks))
    expected = together(module(context))
    with torch.no_grad():
        module.experts.weight[DIM:] = 100.0
    torch.testing.assert_close(together(module(context)), expected, rtol=0, atol=0)
    with torch.no_grad():
        module.experts.bias[:DIM] += 1.0
    assert not torch.isclose(together(module(context)), expected).any()


def test_starts_at_base_rates_and_the_typical_watch_time() -> None:
    module, context = build(), contexts()
    rate = torch.tensor([0.25, 0.01, 0.0], dtype=torch.float64)
    module.init_output_bias(rate, math.log1p(8.0))
    predicted = module(context)
    expected = torch.tensor([0.25, 0.01, 1e-4], dtype=torch.float64).expand(TARGETS, -1)
    torch.testing.assert_close(torch.sigmoid(predicted.logits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.expm1(predicted.watch_time), torch.full((TARGETS,), 8.0).double())
    (gradient,) = torch.autograd.grad(together(predicted).sum(), module.last_weight)
    assert gradient.flatten(1).any(1).all(), "every task can leave its start"
    module.init_output_bias(rate)
    assert not module(context).watch_time.any(), "nothing known of watch times is 0, not NaN"
    alone = build(watch_time=False)
    alone.init_output_bias(rate)
    torch.testing.assert_close(torch.sigmoid(alone(context).logits), expected, rtol=1e-12, atol=1e-12)


def test_targets_and_objectives_do_not_mix() -> None:
    module, context = build(), contexts()
    expected = together(module(context))
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(together(module(context[order])), expected[order], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected[2].sum(), context)
    assert gradient.any(1).nonzero().flatten().tolist() == [2]
