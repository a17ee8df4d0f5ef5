"""The multi-objective head against loops over tasks, experts and targets, its limits and its initialization."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.nn.objectives import MultiObjectiveHead, ObjectivePredictions

D, DIM, TARGETS = 6, 4, 5


def build(objectives: int = 3, watch_time: bool = True, shared: int = 2, task_experts: int = 2) -> MultiObjectiveHead:
    """Return a float64 head without zero parameters."""
    module = MultiObjectiveHead(D, DIM, objectives, watch_time, shared, task_experts, tower_ratio=1.5).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module


def contexts(targets: int = TARGETS) -> Tensor:
    return torch.randn(targets, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def joint(predicted: ObjectivePredictions) -> Tensor:
    """[targets, tasks]"""
    return torch.cat([predicted.logits, *([] if predicted.watch_time is None else [predicted.watch_time[:, None]])], 1)


def reference(module: MultiObjectiveHead, context: Tensor) -> Tensor:
    """Return [targets, tasks], computed with one target, task and expert at a time."""
    width = module.shared + module.task_specific
    rows = []
    for c in context:
        x = F.layer_norm(c, (D,), module.norm.weight, module.norm.bias)

        def expert(e: int, x: Tensor = x) -> Tensor:
            rows = slice(e * DIM, (e + 1) * DIM)
            return F.gelu(module.experts.weight[rows] @ x + module.experts.bias[rows])

        row = []
        for k in range(module.num_tasks):
            task_experts = [
                *range(module.shared),
                *(module.shared + k * module.task_specific + o for o in range(module.task_specific)),
            ]
            part = slice(k * width, (k + 1) * width)
            scores = torch.exp(module.gates.weight[part] @ x + module.gates.bias[part])
            mixed = sum(score / scores.sum() * expert(e) for score, e in zip(scores, task_experts, strict=True))
            hidden = F.gelu(mixed @ module.tower_weight[k] + module.tower_bias[k, 0])
            row.append(hidden @ module.last_weight[k, :, 0] + module.last_bias[k, 0, 0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("objectives", "watch_time"), [(3, True), (3, False), (1, False), (0, True)])
@pytest.mark.parametrize(("shared", "task_experts"), [(2, 2), (1, 1), (3, 0), (0, 2)])
def test_equals_loops_with_gradients(objectives: int, watch_time: bool, shared: int, task_experts: int) -> None:
    module, context = build(objectives, watch_time, shared, task_experts), contexts()
    predicted = module(context)
    assert predicted.logits.shape == (TARGETS, objectives)
    assert (predicted.watch_time is not None) is watch_time
    leaves = [context, *module.parameters()]
    weight = torch.linspace(-1, 2, module.num_tasks)
    values = [
        [one, *torch.autograd.grad((one * weight).square().sum(), leaves)]
        for one in (joint(predicted), reference(module, context))
    ]
    for fast, slow in zip(*values, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    assert all(gradient.any() for gradient in values[0][1:])
    assert joint(module(contexts(0).detach())).shape == (0, module.num_tasks)


def test_task_experts_learn_from_their_task_and_shared_experts_from_all() -> None:
    module, context = build(), contexts()
    predicted = joint(module(context))
    for task in range(module.num_tasks):
        (gradient,) = torch.autograd.grad(predicted[:, task].sum(), module.experts.weight, retain_graph=True)
        reached = gradient.unflatten(0, (-1, DIM)).flatten(1).any(1)
        task_experts = {0, 1, 2 + 2 * task, 3 + 2 * task}
        assert reached.nonzero().flatten().tolist() == sorted(task_experts)


def test_saturated_gate_selects_one_expert() -> None:
    """The other experts have no effect, whatever their weights."""
    module, context = build(), contexts()
    with torch.no_grad():
        module.gates.weight.zero_()
        module.gates.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]).repeat(module.num_tasks))
    expected = joint(module(context))
    with torch.no_grad():
        module.experts.weight[DIM:] = 100.0
    torch.testing.assert_close(joint(module(context)), expected, rtol=0, atol=0)
    with torch.no_grad():
        module.experts.bias[:DIM] += 1.0
    assert not torch.isclose(joint(module(context)), expected).any()


def test_initial_outputs_are_base_rates_and_typical_watch_time() -> None:
    module, context = build(), contexts()
    rate = torch.tensor([0.25, 0.01, 0.0], dtype=torch.float64)
    module.init_output_bias(rate, math.log1p(8.0))
    predicted = module(context)
    expected = torch.tensor([0.25, 0.01, 1e-4], dtype=torch.float64).expand(TARGETS, -1)
    torch.testing.assert_close(torch.sigmoid(predicted.logits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.expm1(predicted.watch_time), torch.full((TARGETS,), 8.0).double())
    (gradient,) = torch.autograd.grad(joint(predicted).sum(), module.last_weight)
    assert gradient.flatten(1).any(1).all(), "every task must have a gradient"
    module.init_output_bias(rate)
    assert not module(context).watch_time.any(), "an unknown watch time counts as 0, not NaN"
    single = build(watch_time=False)
    single.init_output_bias(rate)
    torch.testing.assert_close(torch.sigmoid(single(context).logits), expected, rtol=1e-12, atol=1e-12)


def test_targets_and_objectives_are_independent() -> None:
    module, context = build(), contexts()
    expected = joint(module(context))
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(joint(module(context[order])), expected[order], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected[2].sum(), context)
    assert gradient.any(1).nonzero().flatten().tolist() == [2]
