"""Experts, gates and towers against targets, tasks and experts in loops, and where towers start."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.experts import PLE, CustomizedGateControl, MMoE, SharedBottom, TaskLinear, TaskTowers

D, DIM, TASKS, TARGETS = 6, 4, 3, 5


def double(module: nn.Module) -> nn.Module:
    """In float64, nothing at zero."""
    torch.manual_seed(2)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def same(module: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Values, and gradients of every parameter."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    parameters = list(module.parameters())
    left, right = (
        torch.autograd.grad((each * weight).sum(), parameters, retain_graph=True) for each in (found, expected)
    )
    for a, b in zip(left, right, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def mix(gate: Tensor, experts: list[Tensor]) -> Tensor:
    share = torch.exp(gate) / torch.exp(gate).sum()
    return sum((share[e] * expert for e, expert in enumerate(experts)), torch.zeros(DIM, dtype=torch.float64))


def of_task(layer: TaskLinear, task: int, x: Tensor) -> Tensor:
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
    if experts == 1:  # its gate is always 1, whatever it says
        torch.testing.assert_close(module(context), torch.stack(rows))
    else:
        same(module, module(context), torch.stack(rows))


def level_by_loops(level: CustomizedGateControl, common: Tensor, each: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One target's shared path [d], and its tasks', each [d]."""
    shared, own = [], [[] for _ in range(TASKS)]
    for e in range(level.shared):
        rows = slice(e * DIM, (e + 1) * DIM)
        shared.append(F.gelu(level.shared_experts.weight[rows] @ common + level.shared_experts.bias[rows]))
    for k in range(TASKS):
        for e in range(level.task_specific):
            weight = level.task_experts.weight[k][:, e * DIM : (e + 1) * DIM]
            own[k].append(F.gelu(each[k] @ weight + level.task_experts.bias[k, 0, e * DIM : (e + 1) * DIM]))
    mixed = [mix(of_task(level.gates, k, each[k]), shared + own[k]) for k in range(TASKS)]
    if level.shared_gate is None:
        return common, mixed
    everyone = shared + [expert for of_one in own for expert in of_one]
    return mix(level.shared_gate(common), everyone), mixed


@pytest.mark.parametrize(("shared", "task_specific"), [(2, 2), (1, 1), (3, 0), (0, 2)])
def test_ple_equals_loops(shared: int, task_specific: int) -> None:
    module, context = double(PLE(D, DIM, TASKS, shared, task_specific)), inputs(TARGETS, D)
    assert len(module.levels) == 2
    rows = []
    for c in context:
        common = module.norm(c)
        each = [common] * TASKS
        for level in module.levels:
            common, each = level_by_loops(level, common, each)
        rows.append(torch.stack(each))
    same(module, module(context), torch.stack(rows))


def test_a_task_s_own_experts_matter_to_others_through_the_shared_path_of_the_next_level_alone() -> None:
    module, context = double(PLE(D, DIM, TASKS, 1, 2)), inputs(TARGETS, D)
    for level, reaches_others in ((0, True), (1, False)):
        before = module(context)
        with torch.no_grad():
            module.levels[level].task_experts.weight[1] += 1.0
        moved = (module(context) != before).flatten(2).any(2).any(0)
        assert moved.tolist() == [reaches_others, True, reaches_others]


def test_towers_and_shared_bottom_equal_loops() -> None:
    towers, x = double(TaskTowers(TASKS, DIM, 7)), inputs(TARGETS, TASKS, DIM)
    rows = [[of_task(towers.last, k, F.gelu(of_task(towers.hidden, k, row[k])))[0] for k in range(TASKS)] for row in x]
    same(towers, towers(x), torch.stack([torch.stack(row) for row in rows]))
    bottom, context = double(SharedBottom(D, DIM, TASKS)), inputs(TARGETS, D)
    rows = [F.gelu(bottom.hidden.weight @ bottom.norm(c) + bottom.hidden.bias) for c in context]
    same(bottom, bottom(context), torch.stack(rows)[:, None].expand(-1, TASKS, -1))


def test_towers_start_where_they_are_told_whatever_comes() -> None:
    towers = TaskTowers(TASKS, DIM, 7)
    towers.init_output_bias(torch.tensor([0.5, -1.0, 2.0]))
    found = towers(torch.randn(TARGETS, TASKS, DIM))
    assert torch.equal(found, torch.tensor([0.5, -1.0, 2.0]).expand(TARGETS, -1))
    found.sum().backward()
    assert towers.last.weight.grad.any(), "but it learns what comes"


def test_towers_forget_nothing_but_what_dropout_takes() -> None:
    towers, x = double(TaskTowers(TASKS, DIM, 64, dropout=0.5)), inputs(TARGETS, TASKS, DIM)
    assert not torch.equal(towers(x), towers(x))
    towers.eval()
    assert torch.equal(towers(x), towers(x))
