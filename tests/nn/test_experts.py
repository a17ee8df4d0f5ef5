"""Experts, gates and towers against loops over targets, tasks and experts, and the initialization of towers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.experts import PLE, CustomizedGateControl, MMoE, SharedBottom, TaskLinear, TaskTowers

D, DIM, TASKS, TARGETS = 6, 4, 3, 5


def double(module: nn.Module) -> nn.Module:
    """Return the module in float64 without zero parameters."""
    torch.manual_seed(2)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def same(module: nn.Module, results: Tensor, expected: Tensor) -> None:
    """Return values and the gradients of every parameter."""
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(results.shape, generator=torch.Generator().manual_seed(1), dtype=results.dtype)
    parameters = list(module.parameters())
    left, right = (
        torch.autograd.grad((one * weight).sum(), parameters, retain_graph=True) for one in (results, expected)
    )
    for a, b in zip(left, right, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def mix(gate: Tensor, experts: list[Tensor]) -> Tensor:
    share = torch.exp(gate) / torch.exp(gate).sum()
    return sum((share[e] * expert for e, expert in enumerate(experts)), torch.zeros(DIM, dtype=torch.float64))


def task_slice(layer: TaskLinear, task: int, x: Tensor) -> Tensor:
    return x @ layer.weight[task] + layer.bias[task, 0]


@pytest.mark.parametrize("experts", [1, 3])
def test_mmoe_equals_loops(experts: int) -> None:
    module, context = double(MMoE(D, DIM, TASKS, experts)), inputs(TARGETS, D)
    rows = []
    for c in context:
        x = module.norm(c)
        weight, bias = module.experts.weight.view(experts, DIM, D), module.experts.bias.view(experts, DIM)
        known = [F.gelu(weight[e] @ x + bias[e]) for e in range(experts)]
        gates, shift = module.gates.weight.view(TASKS, experts, D), module.gates.bias.view(TASKS, experts)
        rows.append(torch.stack([mix(gates[k] @ x + shift[k], known) for k in range(TASKS)]))
    if experts == 1:  # the softmax of one logit is always 1
        torch.testing.assert_close(module(context), torch.stack(rows))
    else:
        same(module, module(context), torch.stack(rows))


def level_by_loops(level: CustomizedGateControl, common: Tensor, one: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the shared path [d] and the tasks' paths, each [d], of one target."""
    shared, task_experts = [], [[] for _ in range(TASKS)]
    for e in range(level.shared):
        rows = slice(e * DIM, (e + 1) * DIM)
        shared.append(F.gelu(level.shared_experts.weight[rows] @ common + level.shared_experts.bias[rows]))
    for k in range(TASKS):
        for e in range(level.task_specific):
            weight = level.task_experts.weight[k][:, e * DIM : (e + 1) * DIM]
            task_experts[k].append(F.gelu(one[k] @ weight + level.task_experts.bias[k, 0, e * DIM : (e + 1) * DIM]))
    mixed = [mix(task_slice(level.gates, k, one[k]), shared + task_experts[k]) for k in range(TASKS)]
    if level.shared_gate is None:
        return common, mixed
    all_experts = shared + [expert for experts in task_experts for expert in experts]
    return mix(level.shared_gate(common), all_experts), mixed


@pytest.mark.parametrize(("shared", "task_specific"), [(2, 2), (1, 1), (3, 0), (0, 2)])
def test_ple_equals_loops(shared: int, task_specific: int) -> None:
    module, context = double(PLE(D, DIM, TASKS, shared, task_specific)), inputs(TARGETS, D)
    assert len(module.levels) == 2
    rows = []
    for c in context:
        common = module.norm(c)
        one = [common] * TASKS
        for level in module.levels:
            common, one = level_by_loops(level, common, one)
        rows.append(torch.stack(one))
    same(module, module(context), torch.stack(rows))


def test_task_experts_affect_other_tasks_only_through_next_level() -> None:
    module, context = double(PLE(D, DIM, TASKS, 1, 2)), inputs(TARGETS, D)
    for level, reaches_others in ((0, True), (1, False)):
        before = module(context)
        with torch.no_grad():
            module.levels[level].task_experts.weight[1] += 1.0
        moved = (module(context) != before).flatten(2).any(2).any(0)
        assert moved.tolist() == [reaches_others, True, reaches_others]


def test_towers_and_shared_bottom_equal_loops() -> None:
    towers, x = double(TaskTowers(TASKS, DIM, 7)), inputs(TARGETS, TASKS, DIM)
    rows = [
        [task_slice(towers.last, k, F.gelu(task_slice(towers.hidden, k, row[k])))[0] for k in range(TASKS)] for row in x
    ]
    same(towers, towers(x), torch.stack([torch.stack(row) for row in rows]))
    bottom, context = double(SharedBottom(D, DIM, TASKS)), inputs(TARGETS, D)
    rows = [F.gelu(bottom.hidden.weight @ bottom.norm(c) + bottom.hidden.bias) for c in context]
    same(bottom, bottom(context), torch.stack(rows)[:, None].expand(-1, TASKS, -1))


def test_init_output_bias_sets_output_for_any_input() -> None:
    towers = TaskTowers(TASKS, DIM, 7)
    towers.init_output_bias(torch.tensor([0.5, -1.0, 2.0]))
    results = towers(torch.randn(TARGETS, TASKS, DIM))
    assert torch.equal(results, torch.tensor([0.5, -1.0, 2.0]).expand(TARGETS, -1))
    results.sum().backward()
    assert towers.last.weight.grad.any(), "the last layer must still learn"


def test_dropout_of_towers() -> None:
    towers, x = double(TaskTowers(TASKS, DIM, 64, dropout=0.5)), inputs(TARGETS, TASKS, DIM)
    assert not torch.equal(towers(x), towers(x))
    towers.eval()
    assert torch.equal(towers(x), towers(x))
