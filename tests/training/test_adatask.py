"""AdaTask against loops over tasks, steps and rows, and against AdamW for one task."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.config import Config, LossConfig, ModelConfig, OptimConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.losses.loss import loss_sums, task_losses, term_means, total_loss
from a2gen_rec.models.factory import build_model
from a2gen_rec.training import checkpoint
from a2gen_rec.training.adatask import TaskAdam
from a2gen_rec.training.build import build_training_model
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils.distributed import DistributedContext, all_reduce_sum
from tests.helpers.cards import checkpoint_tensors, full_tables, make_card, make_columns, small_config, write_dataset
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.processes

CARD = make_card(labels=("click", "long_view"))
TOWERS = 3 + 2 + 3  # events, labels, times; with objectives, 2 more


def task_losses_of_matrix(matrix: Tensor, step: int) -> list[Tensor]:
    """Return losses of two tasks on one matrix with gradients of very different size and direction."""
    x = torch.sin(torch.arange(6, dtype=matrix.dtype).view(3, 2) + step)
    y = matrix @ x
    return [100 * (y[0] - 1).square().sum(), (y[1] * y[0] + step).square().sum()]


@pytest.mark.parametrize("clip_norm", [0.0, 5.0])
def test_three_steps_of_two_tasks_equal_loops(clip_norm: float) -> None:
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    matrix = torch.nn.Parameter(start.clone())
    optimizer = TaskAdam([matrix], 2, lr=0.1, weight_decay=0.2, max_grad_norm=clip_norm)
    expected = start.clone()
    mean, square = np.zeros((2, 6)), np.zeros((2, 6))
    for step in range(1, 4):
        for task, loss in enumerate(task_losses_of_matrix(matrix, step)):
            loss.backward(retain_graph=True)
            optimizer.collect_gradients(task)
        optimizer.step()

        slow = expected.clone().requires_grad_()
        gradients = [
            torch.autograd.grad(loss, slow, retain_graph=True)[0].flatten().numpy()
            for loss in task_losses_of_matrix(slow, step)
        ]
        after = expected.flatten().numpy() * (1 - 0.1 * 0.2)
        for task in range(2):
            norm = np.sqrt((gradients[task] ** 2).sum())
            share = min(1.0, clip_norm / norm) if clip_norm else 1.0
            for i in range(6):
                g = gradients[task][i] * share
                mean[task, i] = 0.9 * mean[task, i] + 0.1 * g
                square[task, i] = 0.999 * square[task, i] + 0.001 * g * g
                corrected = square[task, i] / (1 - 0.999**step)
                after[i] -= 0.1 * mean[task, i] / (1 - 0.9**step) / (np.sqrt(corrected) + 1e-8)
        expected = torch.from_numpy(after).view(2, 3)
        torch.testing.assert_close(matrix.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_with_one_task_it_equals_adamw(clip_norm: float) -> None:
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 1))
        x, y = torch.randn(20, 4), 10 * torch.randn(20, 1)
        task_adam = TaskAdam(model.parameters(), 1, 0.01, 0.1, clip_norm) if ours else None
        adamw = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        for _ in range(10):
            adamw.zero_grad()
            (model(x) - y).square().mean().backward()
            if task_adam is not None:
                task_adam.collect_gradients(0)
                task_adam.step()
                continue
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            adamw.step()
        results.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def make_config(tasks: str = "adatask", sharding: str = "row_wise", **model: Any) -> Config:
    config = small_config(**model)
    config.optim = OptimConfig(multitask=tasks, sparse_lr=0.1, dense_lr=0.01)  # type: ignore[arg-type]
    config.sharding.sharding_types = [sharding]  # type: ignore[list-item]
    return config


@pytest.mark.parametrize("name", ["mmoe", "ple", "hstu"])
@pytest.mark.parametrize("objectives", [False, True])
def test_task_losses_sum_to_the_loss_and_reach_one_tower_each(name: str, objectives: bool) -> None:
    config = small_config(name=name, predict_objectives=objectives)
    config.loss = LossConfig(action_weight=0.7, time_weight=0.3, label_weight=2.0, default_objective_weight=1.5)
    torch.manual_seed(0)
    model = build_model(CARD, config, torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = collate(make_columns(CARD, 8, np.random.default_rng(0)), np.arange(8), full_tables(CARD, config))
    output = model(batch)
    tasks = model.ranker.objective_tasks
    losses = task_losses(output, batch, config.loss, tasks, model.ranker.timed_actions)
    joint = total_loss(
        term_means(loss_sums(output, batch, config.loss), batch.counts, is_generative=False), config.loss, tasks
    )
    assert len(losses) == model.ranker.num_towers == TOWERS + 2 * objectives
    torch.testing.assert_close(losses.sum(), joint)
    for tower, loss in enumerate(losses):
        (weight,) = torch.autograd.grad(loss, [model.ranker.towers.last.weight], retain_graph=True)
        assert weight.flatten(1).any(1).nonzero().flatten().tolist() == [tower]


def rank_batch(dataset: str, config: Config, step: int, rank: int = 0, world_size: int = 1) -> WindowBatch:
    """Return a rank's part of a global batch of 16 windows."""
    files = sorted(str(file) for file in Path(dataset, "train").iterdir())
    columns = read_columns(read_row_groups(files), CARD)
    rows = np.random.default_rng(step).permutation(len(columns))[:16]
    return collate(columns, rows[rank::world_size], full_tables(CARD, config))


def run(
    process: DistributedContext, dataset: str, config: Config, source: str, first: int, last: int, out: str
) -> list[str]:
    """Load step ``first`` from ``source`` (if given), take steps, save the result in ``out``."""
    built = build_training_model(CARD, config, process)
    if source:
        checkpoint.load(RunDir(source).checkpoint(first), built)
    for step in range(first, last):
        built.optimizer.zero_grad()
        batch = rank_batch(dataset, config, step, process.rank, process.world_size)
        loss, _ = built.model_parallel(replace(batch, counts=all_reduce_sum(batch.counts.clone())))
        built.backward(loss)
        built.optimizer.step()
    state = checkpoint.TrainState(last, 0, [], None, None, 0, asdict(config), "", CARD.to_dict())
    checkpoint.save(out, built, state, keep_latest_k=0)
    return [parameter.sharding_type for module in built.plan.plan.values() for parameter in module.values()]


def tensors(run: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    """Return tensors of a checkpoint, without random states and without the currently loaded task state."""
    saved = checkpoint_tensors(RunDir(str(run)).checkpoint(step), scratch / f"{run.name}-{step}.pt")
    return {name: value for name, value in saved.items() if "rng" not in name and not name.endswith("momentum1")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD)


@pytest.fixture(scope="module")
def initial(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PLE run saved before its first step."""
    folder = tmp_path_factory.mktemp("initial") / "begin"
    on_ranks(1, folder.parent, run, str(dataset), make_config(name="ple"), "", 0, 0, str(folder))
    return folder


def reference_steps(dataset: str, config: Config, before: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Return parameters after the same steps, unsharded, with dense gradients and loops over tasks and rows."""
    model = build_model(CARD, config, torch.device("cpu"))
    model.load_state_dict(
        {name.removeprefix("/model/model."): value for name, value in before.items() if "/model/" in name}
    )
    tables = {name: parameter for name, parameter in model.named_parameters() if name.startswith("embeddings")}
    dense = [parameter for name, parameter in model.named_parameters() if name not in tables]
    towers, tasks = model.ranker.num_towers, model.ranker.objective_tasks
    moments = {name: torch.zeros(towers, len(table)) for name, table in tables.items()}
    optimizers = [torch.optim.Adam(dense, config.optim.dense_lr) for _ in range(towers)]
    for step in range(steps):
        batch = rank_batch(dataset, config, step)
        losses = task_losses(model(batch), batch, config.loss, tasks, model.ranker.timed_actions)
        parts = [*tables.values(), *dense]
        gradients = [torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True) for loss in losses]
        initial_values = [parameter.detach().clone() for parameter in dense]
        moved = [torch.zeros_like(parameter) for parameter in dense]
        with torch.no_grad():
            for task, task_gradients in enumerate(gradients):
                for (name, table), gradient in zip(tables.items(), task_gradients, strict=False):
                    for row in range(len(table)):
                        if gradient is not None and gradient[row].any():
                            moments[name][task, row] += gradient[row].square().mean()
                            table[row] -= (
                                config.optim.sparse_lr * gradient[row] / (moments[name][task, row].sqrt() + 1e-8)
                            )
                for parameter, gradient, start in zip(
                    dense, task_gradients[len(tables) :], initial_values, strict=True
                ):
                    parameter.copy_(start)
                    parameter.grad = torch.zeros_like(start) if gradient is None else gradient.clone()
                torch.nn.utils.clip_grad_norm_(dense, config.optim.max_grad_norm)
                optimizers[task].step()
                for total_move, parameter, start in zip(moved, dense, initial_values, strict=True):
                    total_move += parameter - start
            for parameter, start, move in zip(dense, initial_values, moved, strict=True):
                parameter.copy_(start * (1 - config.optim.dense_lr * config.optim.weight_decay) + move)
    return {f"/model/model.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_steps_equal_reference_loops(ranks: int, dataset: Path, initial: Path, tmp_path: Path) -> None:
    """Tables and dense parameters after three steps with moments per task, on one and two ranks."""
    config, out = make_config(name="ple"), tmp_path / "out"
    on_ranks(ranks, tmp_path, run, str(dataset), config, str(initial), 0, 3, str(out))
    before = tensors(initial, 0, tmp_path)
    expected = reference_steps(str(dataset), config, before, 3)
    trained = {name: value for name, value in tensors(out, 3, tmp_path).items() if "/model/" in name}
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not [n for n, value in trained.items() if n.endswith("weight") and torch.equal(value, before[n])]


def test_task_states_resume_under_another_plan_and_world_size(dataset: Path, initial: Path, tmp_path: Path) -> None:
    config, other = make_config(name="ple"), make_config(name="ple", sharding="table_wise")
    straight, half, rest = tmp_path / "straight", tmp_path / "half", tmp_path / "rest"
    on_ranks(1, tmp_path, run, str(dataset), config, str(initial), 0, 4, str(straight))
    on_ranks(2, tmp_path, run, str(dataset), config, str(initial), 0, 2, str(half))
    kinds = on_ranks(1, tmp_path, run, str(dataset), other, str(half), 2, 4, str(rest))
    assert set(kinds[0]) == {"table_wise"}
    left, right = tensors(straight, 4, tmp_path), tensors(rest, 4, tmp_path)
    assert left.keys() == right.keys()
    states = [name for name in left if "states_per_task" in name]
    assert len(states) == TOWERS * sum("embeddings" in name and "/model/" in name for name in left)
    rows = torch.stack([left[name] for name in states if "item_id" in name])
    assert (rows[0] != rows[-1]).any(), "tasks must have separate states"
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("optim", "model", "loss", "named"),
    [
        ({}, {}, {}, "model.name"),
        ({}, {"generator": "independent_heads"}, {}, "model.name"),
        ({}, {"name": "ple"}, {"uncertainty_weighting": True}, "loss.uncertainty_weighting"),
        ({"dense_optimizer": "adam", "weight_decay": 0.1}, {"name": "ple"}, {}, "optim.dense_optimizer must be adamw"),
        ({"sparse_weight_decay": 0.1}, {"name": "ple"}, {}, "optim.sparse_weight_decay"),
    ],
)
def test_rejects_unsupported_settings(optim: dict, model: dict, loss: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Config(model=ModelConfig(**model), loss=LossConfig(**loss), optim=OptimConfig(multitask="adatask", **optim))
    Config(
        model=ModelConfig(name="hstu"), optim=OptimConfig(multitask="adatask", dense_optimizer="adam", weight_decay=0.0)
    )


@pytest.mark.parametrize("generator", ["explicit", "independent_heads"])
def test_build_rejects_models_without_task_towers(generator: str) -> None:
    config = small_config(generator=generator)
    config.optim.multitask = "adatask"  # after the check of Config
    with pytest.raises(ConfigError, match=r"optim\.multitask adatask: model a2gen has no tower per task"):
        build_training_model(CARD, config, DistributedContext(0, 1, 1, torch.device("cpu")))


def test_rejects_a_checkpoint_of_joint_training(tmp_path: Path) -> None:
    card, joint = replace(CARD, identity=DataIdentity(["0"])), asdict(make_config("joint", name="ple"))
    saved = checkpoint.TrainState(1, 0, [], None, None, 0, joint, "", card.to_dict())
    with pytest.raises(UserError, match=r"optim\.multitask=joint"):
        checkpoint.check_compatible(saved, asdict(make_config(name="ple")), card, "data", str(tmp_path))
    checkpoint.check_compatible(saved, joint, card, "data", str(tmp_path))
