"""ForkMerge: greedy search against loops, and jobs with inspected branches and merges."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a2gen_rec.config import Config, ForkMergeConfig, LossConfig, OptimConfig, TrainConfig
from a2gen_rec.errors import ConfigError
from a2gen_rec.training import checkpoint, forkmerge
from a2gen_rec.training.entrypoint import train
from a2gen_rec.training.forkmerge import fork_and_merge, greedy_weights, merge_parameters, with_weights
from a2gen_rec.training.loaded_run import load_run
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.trainer import Trainer
from a2gen_rec.utils.distributed import DistributedContext
from tests.helpers.cards import checkpoint_tensors, make_card, small_config, write_dataset
from tests.helpers.distributed import on_ranks

pytestmark = pytest.mark.processes

CARD = make_card()
BRANCHES: list[dict[str, float]] = [{}, {"time_weight": 0.0}, {"action_weight": 0.0, "label_weight": 0.0}]


def toy(points: Tensor, best: Tensor) -> tuple[list[Tensor], Callable[[int], None], Callable[[], float]]:
    """Return parameters [2] in two tensors, with branches at ``points`` scored by squared distance from ``best``."""
    tensors = [torch.full((1,), torch.nan, dtype=torch.float64) for _ in range(2)]

    def load(branch: int) -> None:
        for tensor, value in zip(tensors, points[branch], strict=True):
            tensor.fill_(value)

    return tensors, load, lambda: float((torch.cat(tensors) - best).square().sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_greedy_weights_equal_loops_over_all_trials(count: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 2, generator=rng, dtype=torch.float64)
    best = 0.3 * torch.randn(2, generator=rng, dtype=torch.float64)

    def score(weights: list[float]) -> float:
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return float((share @ points - best).square().sum())

    scores = [score([float(i == branch) for i in range(count)]) for branch in range(count)]
    order = sorted(range(count), key=lambda branch: scores[branch])
    expected = [0.0] * count
    expected[order[0]] = 1.0
    for placed, branch in enumerate(order[1:], 1):
        trials = []
        for step in range(6):
            trial = expected.copy()
            trial[branch] = step / 5 * sum(expected) / placed
            trials.append((score(trial), trial))
        expected = min(trials, key=lambda trial: trial[0])[1]

    tensors, load, measure = toy(points, best)
    weights = greedy_weights(scores, load, tensors, measure)
    assert [weights[branch] for branch in range(count)] == pytest.approx([w / sum(expected) for w in expected])
    merge_parameters(weights, load, tensors)
    assert measure() == pytest.approx(score(expected))
    assert measure() <= min(scores) + 1e-12


def test_finds_a_known_mixture_and_keeps_equal_values_exact() -> None:
    points = torch.tensor([[0.0, 7.1], [1.0, 7.1], [50.0, 7.1]], dtype=torch.float64)
    tensors, load, measure = toy(points, torch.tensor([3 / 8, 7.1], dtype=torch.float64))  # 0.6 to 1: 0.625 and 0.375
    scores = [float((point - torch.tensor([3 / 8, 7.1])).square().sum()) for point in points]
    weights = greedy_weights(scores, load, tensors, measure)
    assert weights == pytest.approx({0: 0.625, 1: 0.375, 2: 0.0})
    merge_parameters({**weights, 2: 0.0}, load, tensors)
    assert tensors[0].item() == pytest.approx(3 / 8)
    assert tensors[1].item() == points[0, 1].item(), "equal values stay exact"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset without a test split, which training must not read."""
    folder = write_dataset(tmp_path_factory.mktemp("dataset") / "data", CARD, windows=20)
    shutil.rmtree(folder / "test")
    return folder


def make_config(epochs: int = 1, every: int = 1, tasks: str = "joint", **settings: Any) -> Config:
    config = small_config(name="ple", dropout=0.1)
    config.optim = OptimConfig(dense_lr=0.02, warmup_steps=0, weight_decay=0.0, multitask=tasks)  # type: ignore[arg-type]
    config.loader.max_impressions_per_batch = 150
    forked = ForkMergeConfig(merge_interval_epochs=every, branch_loss_weights=BRANCHES)
    config.train = TrainConfig(epochs=epochs, forkmerge=forked, device="cpu", **settings)
    return config


def tensors(checkpoint_dir: str, scratch: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint except random states."""
    saved = checkpoint_tensors(checkpoint_dir, scratch / f"{abs(hash(checkpoint_dir))}.pt")
    return {name: value for name, value in saved.items() if "rng" not in name}


@pytest.mark.parametrize("tasks", ["joint", "adatask"])
def test_merges_branches_trained_with_their_weights(
    tasks: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_used: list[dict[int, float]] = []

    def search(*args: Any) -> dict[int, float]:
        weights_used.append(greedy_weights(*args))
        weights_used[-1] = {0: 0.5, 1: 0.2, 2: 0.3}  # fixed weights, so that all three branches contribute
        return weights_used[-1]

    monkeypatch.setattr(forkmerge, "greedy_weights", search)
    monkeypatch.setattr(checkpoint, "delete_all", lambda run: None)
    run = tmp_path / "run"
    train(make_config(tasks=tasks), str(data), str(run))
    checkpoints = [RunDir(str(run / "branches" / "step-00000000" / str(i))).latest_checkpoint() or "" for i in range(3)]
    branches = [tensors(path, tmp_path) for path in checkpoints]
    merged = tensors(RunDir(str(run)).latest_checkpoint() or "", tmp_path)
    assert len(weights_used) == 1
    for name, value in merged.items():
        expected = sum(weight * branches[branch][name].double() for branch, weight in weights_used[0].items())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    steps = [name for name in merged if name.endswith("step")]
    assert steps
    assert all(torch.equal(merged[name], branches[0][name]) for name in steps)
    # Towers: 3 actions, 1 label, 3 times. Towers with zero loss weight keep their initial value, 0.
    moved = [branch["/model/model.ranker.towers.last.weight"].flatten(1).any(1).tolist() for branch in branches]
    assert moved == [[True] * 7, [True] * 4 + [False] * 3, [False] * 4 + [True] * 3]


def test_merged_runs_load_and_are_no_worse_than_the_best_branch(data: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", make_config(epochs=3, every=2, keep_latest_k=0)
    metrics = train(config, str(data), str(run))
    rounds = sorted(path.name for path in (run / "branches").iterdir())
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert rounds[0] == "step-00000000"
    assert rounds[1:] == checkpoints[:-1], "two rounds, the second with the remaining epoch"
    state = checkpoint.TrainState.read(RunDir(str(run)).latest_checkpoint() or "")
    assert state.loader_states[0].epoch == 3
    assert state.metrics == metrics
    assert state.best == min(
        checkpoint.TrainState.read(str(run / "checkpoints" / name)).metrics["loss"] for name in checkpoints
    )
    assert not list((run / "branches").rglob("*.distcp")), "branch checkpoints are deleted"
    assert train(config, str(data), str(run)) == metrics, "training is already complete"
    with load_run(str(run)) as opened:
        assert opened.config.train.forkmerge == config.train.forkmerge


def test_interrupted_job_resumes_within_its_branch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(epochs=2)
    train(config, str(data), str(tmp_path / "whole"))
    fit, fits = Trainer.fit, []

    def interrupted(self: Trainer, until_epoch: int | None = None) -> dict[str, float]:
        fits.append((self.run, self.state.step))
        if len(fits) == 5:  # second branch of the second round
            raise KeyboardInterrupt
        return fit(self, until_epoch)

    monkeypatch.setattr(Trainer, "fit", interrupted)
    run = str(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        train(config, str(data), run)
    before = len(fits)
    train(config, str(data), run)
    (first, step), (second, start_step), *_ = fits[before:]
    assert first.endswith("/0")
    assert step == 2 * start_step, "the first branch was complete"
    assert second.endswith("/1")
    left, right = (
        tensors(RunDir(str(tmp_path / name)).latest_checkpoint() or "", tmp_path) for name in ("whole", "interrupted")
    )
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def job(process: DistributedContext, config: Config, data: str, run: str) -> tuple[dict[str, float], list[float]]:
    scores: list[float] = []
    search = forkmerge.greedy_weights

    def record(branch_scores: list[float], *args: Any) -> dict[int, float]:
        scores.extend(branch_scores)
        return search(branch_scores, *args)

    forkmerge.greedy_weights = record
    return fork_and_merge(config, data, run, process), scores


@pytest.mark.parametrize("monitor", ["loss", "auc"])
def test_two_ranks_agree_and_are_no_worse_than_the_best_branch(monitor: str, data: Path, tmp_path: Path) -> None:
    config = make_config(monitor=monitor)
    one, two = on_ranks(2, tmp_path, job, config, str(data), str(tmp_path / "run"))
    assert one == two
    metrics, scores = one
    value = metrics["loss"] if monitor == "loss" else -metrics["auc"]
    assert len(scores) == 3
    assert value <= min(scores) + 1e-6


def test_branch_weights_replace_terms_and_objectives() -> None:
    loss = LossConfig(time_weight=0.5, objective_weights={"glance": 2.0})
    changed = with_weights(loss, {"time_weight": 0.0, "effective": 3.0})
    assert changed == replace(loss, time_weight=0.0, objective_weights={"glance": 2.0, "effective": 3.0})
    assert with_weights(loss, {}) == loss


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"merge_interval_epochs": -1}, "merge_interval_epochs -1"),
        ({"branch_loss_weights": [{}]}, "two or more"),
        ({"branch_loss_weights": [{}, {"time_weight": -1.0}]}, "time_weight -1.0"),
        ({"branch_loss_weights": [{}, {"order_power": 1.0}]}, "order_power"),
    ],
)
def test_rejects_invalid_branches(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ForkMergeConfig(**settings)


def test_rejects_learned_weights_and_unknown_objectives(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.uncertainty"):
        Config(
            loss=LossConfig(uncertainty_weighting=True),
            train=TrainConfig(forkmerge=ForkMergeConfig(merge_interval_epochs=1)),
        )
    config = make_config()
    config.train.forkmerge.branch_loss_weights = [{"tme": 0.0}, {}]
    with pytest.raises(ConfigError, match="tme"):
        train(config, str(data), str(tmp_path / "run"))
