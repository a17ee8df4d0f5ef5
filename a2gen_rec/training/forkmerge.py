"""ForkMerge (Jiang et al., NeurIPS 2023): branches under other loss weights, merged by validation, METHODS §7.

Every few epochs, branches are trained from the same parameters, each in a folder ``RUN/branches/step-00000120/0`` of
its own as any run is, and then merged: parameters and optimizer states become a weighted mean over branches. What is
stopped or killed goes on within the branch it was in. Only merged parameters become checkpoints of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from a2gen_rec.config import Config, LossConfig
from a2gen_rec.training import checkpoint
from a2gen_rec.training.logger import TrainingLogger
from a2gen_rec.training.trainer import Trainer, is_finished
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext, sync_errors

BRANCHES_DIR = "branches"
WEIGHT_GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
"""What is tried of the mean weight of the branches before; 0, which leaves a branch out, needs no trial."""


def fork_and_merge(config: Config, data: str, run: str, process: DistributedContext) -> dict[str, float]:
    """Train a run by ``config.train.forkmerge``, or resume it. All ranks call it.

    Returns:
        the metrics of the merged parameters on validation; empty when none were merged.
    """
    settings = config.train.forkmerge
    # Only the merged parameters' validations tell when to stop.
    of_branches = replace(config, train=replace(config.train, patience=0, keep_latest_k=1))
    while True:
        with sync_errors():
            begin = checkpoint.latest(run)
            before = None if begin is None else checkpoint.TrainState.read(begin)
        if before is not None and is_finished(before, config.train):
            return before.metrics
        step, epoch = (0, 0) if before is None else (before.step, before.loader_states[0].epoch)
        folders = [
            paths.join(run, BRANCHES_DIR, f"step-{step:08d}", str(i)) for i in range(len(settings.branch_loss_weights))
        ]
        for i, (folder, weights) in enumerate(zip(folders, settings.branch_loss_weights, strict=True)):
            branch = Trainer(
                of_branches,
                data,
                folder,
                process,
                resume_from=checkpoint.latest(folder) or begin,
                loss=with_weights(config.loss, weights),
                log_prefix=f"branch {i + 1} of {len(folders)}, ",
            )
            branch.fit(until=epoch + settings.merge_interval_epochs)
            if branch.stopped:
                return {} if before is None else before.metrics
            del branch  # before the next takes as much memory
        _merge(config, data, run, process, folders, before)


def with_weights(loss: LossConfig, weights: dict[str, float]) -> LossConfig:
    """``loss`` with other weights: of the terms that are settings of it, and of objectives by their names."""
    terms = {field.name for field in fields(LossConfig)}
    objectives = {name: weight for name, weight in weights.items() if name not in terms}
    of_terms = {name: weight for name, weight in weights.items() if name in terms}
    return replace(loss, **of_terms, objective_weights=loss.objective_weights | objectives)  # type: ignore[arg-type]


@torch.no_grad()
def greedy_weights(
    scores: Sequence[float], load: Callable[[int], None], tensors: Sequence[Tensor], measure: Callable[[], float]
) -> dict[int, float]:
    """How much each branch is to have in the mixture, found by trial from the best branch on.

    Args:
        scores: of the branches, lower is better.
        load: fills ``tensors`` with those of a branch.
        tensors: the parameters, which ``measure`` scores.

    Returns:
        branch -> weight, best branch first; they sum to 1.
    """
    order = sorted(range(len(scores)), key=lambda branch: scores[branch])
    weights, best = {order[0]: 1.0}, scores[order[0]]
    load(order[0])
    mixed = _copy(tensors)
    for branch in order[1:]:
        load(branch)
        own, sum_before, chosen = _copy(tensors), sum(weights.values()), 0.0
        for share in WEIGHT_GRID:
            weight = share * sum_before / len(weights)
            for tensor, of_mixed, of_own in zip(tensors, mixed, own, strict=True):
                tensor.copy_(of_mixed.lerp(of_own, weight / (sum_before + weight)))
            if (score := measure()) < best:
                best, chosen = score, weight
        for of_mixed, of_own in zip(mixed, own, strict=True):
            of_mixed.lerp_(of_own, chosen / (sum_before + chosen))
        weights[branch] = chosen
    return {branch: weight / sum(weights.values()) for branch, weight in weights.items()}


@torch.no_grad()
def merge_parameters(weights: dict[int, float], load: Callable[[int], None], tensors: Sequence[Tensor]) -> None:
    """Fill ``tensors`` with the mean of the branches by their weights; ``load`` as in :func:`greedy_weights`."""
    mixed: list[Tensor] = []
    so_far = 0.0
    for branch, weight in weights.items():
        if not weight:
            continue
        load(branch)
        so_far += weight
        if not mixed:
            mixed = _copy(tensors)
            continue
        # Unlike weighted sums, this leaves alone what is the same in all branches: counts of steps.
        for of_mixed, tensor in zip(mixed, tensors, strict=True):
            of_mixed.lerp_(tensor.to(of_mixed), weight / so_far)
    for tensor, of_mixed in zip(tensors, mixed, strict=True):
        tensor.copy_(of_mixed)


def _merge(
    config: Config,
    data: str,
    run: str,
    process: DistributedContext,
    folders: list[str],
    before: checkpoint.TrainState | None,
) -> None:
    """Make the branches' mixture the run's next checkpoint."""
    places = [checkpoint.latest(folder) or "" for folder in folders]
    merged = Trainer(config, data, run, process, resume_from=places[-1], log_prefix="merging, ")
    parameters = checkpoint.state_tensors(merged.built, with_optimizer=False)
    everything = checkpoint.state_tensors(merged.built)

    def load(branch: int) -> None:
        checkpoint.load(places[branch], merged.built, with_optimizer=False)

    def measure() -> float:
        # What was changed in place is loaded as from a checkpoint; loading changes the names in the dictionary.
        merged.built.model_parallel.load_state_dict(parameters["model"].copy())
        return merged.monitored_value(merged.validate())

    scores = []
    for branch in range(len(places)):
        load(branch)
        scores.append(measure())
    weights = greedy_weights(scores, load, _local(parameters["model"]), measure)
    merge_parameters(weights, lambda branch: checkpoint.load(places[branch], merged.built), _local(everything))
    merged.built.model_parallel.load_state_dict(everything["model"])
    merged.built.optimizer.load_state_dict(everything["optimizer"])

    state = merged.state
    state.best, state.best_step, state.validations_since_best = (
        (None, None, 0) if before is None else (before.best, before.best_step, before.validations_since_best)
    )
    with TrainingLogger(
        run, process.is_main, config.train.epochs, merged.stream.windows, state.step, "merging, "
    ) as progress:
        shares = ", ".join(f"{weight:.2f} of branch {branch + 1}" for branch, weight in sorted(weights.items()))
        progress.info(f"merged {shares}")
        merged.record_validation(merged.validate(), progress)
    merged.save()
    with sync_errors():
        if process.is_main:
            for folder in folders:
                checkpoint.delete_all(folder)


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    # At least fp32: the mean of fp16 rows is rounded once, not with every branch.
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for tensor in tensors]


def _local(tree: object) -> list[Tensor]:
    """This rank's part of all floating-point tensors, in the order of their names: no two ranks' parts overlap."""
    if isinstance(tree, dict):
        return [tensor for name in sorted(tree) if name != "rng" for tensor in _local(tree[name])]
    if isinstance(tree, ShardedTensor):
        return [shard.tensor.detach() for shard in tree.local_shards()]
    return [tree.detach()] if isinstance(tree, Tensor) and tree.is_floating_point() else []
