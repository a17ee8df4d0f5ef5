"""ForkMerge (Jiang et al., NeurIPS 2023): branches with different loss weights, merged by validation, METHODS §7.

Every few epochs, branches are trained from the same parameters. Each branch is a run in its own directory, such as
``RUN/branches/step-00000120/0``. Then they are merged: parameters and optimizer states become a weighted mean over
branches. An interrupted job resumes within its current branch. Only merged parameters become checkpoints of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from a2gen_rec.config import Config, LossConfig
from a2gen_rec.training import checkpoint
from a2gen_rec.training.logger import TrainingLogger
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import RunLock
from a2gen_rec.training.trainer import Trainer, is_finished
from a2gen_rec.utils.distributed import DistributedContext, sync_errors

WEIGHT_GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Trial weights of a branch, relative to the mean weight of the branches merged so far; 0 needs no trial."""


def fork_and_merge(
    config: Config, data: str, run: str, process: DistributedContext, lock: RunLock | None = None
) -> dict[str, float]:
    """Train a run with ``config.train.forkmerge``, or resume it. Called by all ranks.

    Returns:
        Validation metrics of the merged parameters; empty if nothing was merged.
    """
    settings = config.train.forkmerge
    # Early stopping uses the validations of the merged parameters only.
    branch_config = replace(config, train=replace(config.train, patience=0, keep_latest_k=1))
    while True:
        with sync_errors():
            start = RunDir(run).latest_checkpoint()
            start_state = None if start is None else checkpoint.TrainState.read(start)
        if start_state is not None and is_finished(start_state, config.train):
            return start_state.metrics
        step, epoch = (0, 0) if start_state is None else (start_state.step, start_state.loader_states[0].epoch)
        folders = [RunDir(run).branch(step, i) for i in range(len(settings.branch_loss_weights))]
        for i, (folder, weights) in enumerate(zip(folders, settings.branch_loss_weights, strict=True)):
            branch = Trainer(
                branch_config,
                data,
                folder,
                process,
                resume_from=RunDir(folder).latest_checkpoint() or start,
                loss=with_weights(config.loss, weights),
                log_prefix=f"branch {i + 1} of {len(folders)}, ",
                lock=lock,
            )
            branch.fit(until_epoch=epoch + settings.merge_interval_epochs)
            if branch.stopped:
                return {} if start_state is None else start_state.metrics
            del branch  # frees memory before the next branch allocates the same amount
        _merge(config, data, run, process, lock, folders, start_state)


def with_weights(loss: LossConfig, weights: dict[str, float]) -> LossConfig:
    """Return ``loss`` with other weights: fields of :class:`LossConfig`, and objectives by name."""
    terms = {field.name for field in fields(LossConfig)}
    objective_weights = {name: weight for name, weight in weights.items() if name not in terms}
    term_weights = {name: weight for name, weight in weights.items() if name in terms}
    return replace(loss, **term_weights, objective_weights=loss.objective_weights | objective_weights)  # type: ignore[arg-type]


@torch.no_grad()
def greedy_weights(
    scores: Sequence[float], load: Callable[[int], None], tensors: Sequence[Tensor], measure: Callable[[], float]
) -> dict[int, float]:
    """Search the branches' weights greedily, from the best branch on.

    Args:
        scores: Score of each branch, lower is better.
        load: Loads a branch into ``tensors``.
        tensors: Parameters that ``measure`` scores.
        measure: Returns the score of ``tensors``.

    Returns:
        Branch -> weight, best branch first; the weights sum to 1.
    """
    order = sorted(range(len(scores)), key=lambda branch: scores[branch])
    weights, best = {order[0]: 1.0}, scores[order[0]]
    load(order[0])
    mixed = _copy(tensors)
    for branch in order[1:]:
        load(branch)
        candidate, weight_sum, best_weight = _copy(tensors), sum(weights.values()), 0.0
        for relative_weight in WEIGHT_GRID:
            weight = relative_weight * weight_sum / len(weights)
            for tensor, mixed_tensor, candidate_tensor in zip(tensors, mixed, candidate, strict=True):
                tensor.copy_(mixed_tensor.lerp(candidate_tensor, weight / (weight_sum + weight)))
            if (score := measure()) < best:
                best, best_weight = score, weight
        for mixed_tensor, candidate_tensor in zip(mixed, candidate, strict=True):
            mixed_tensor.lerp_(candidate_tensor, best_weight / (weight_sum + best_weight))
        weights[branch] = best_weight
    return {branch: weight / sum(weights.values()) for branch, weight in weights.items()}


@torch.no_grad()
def merge_parameters(weights: dict[int, float], load: Callable[[int], None], tensors: Sequence[Tensor]) -> None:
    """Set ``tensors`` to the weighted mean of the branches; ``load`` as in :func:`greedy_weights`."""
    mixed: list[Tensor] = []
    weight_sum = 0.0
    for branch, weight in weights.items():
        if not weight:
            continue
        load(branch)
        weight_sum += weight
        if not mixed:
            mixed = _copy(tensors)
            continue
        # Unlike a weighted sum, lerp keeps values that are equal in all branches exact, such as step counts.
        for mixed_tensor, tensor in zip(mixed, tensors, strict=True):
            mixed_tensor.lerp_(tensor.to(mixed_tensor), weight / weight_sum)
    for tensor, mixed_tensor in zip(tensors, mixed, strict=True):
        tensor.copy_(mixed_tensor)


def _merge(
    config: Config,
    data: str,
    run: str,
    process: DistributedContext,
    lock: RunLock | None,
    folders: list[str],
    start_state: checkpoint.TrainState | None,
) -> None:
    """Save the merged branches as the run's next checkpoint."""
    checkpoints = [RunDir(folder).latest_checkpoint() or "" for folder in folders]
    merged = Trainer(config, data, run, process, resume_from=checkpoints[-1], log_prefix="merging, ", lock=lock)
    parameters = checkpoint.state_tensors(merged.training_model, with_optimizer=False)
    full_state = checkpoint.state_tensors(merged.training_model)

    def load(branch: int) -> None:
        checkpoint.load(checkpoints[branch], merged.training_model, with_optimizer=False)

    def measure() -> float:
        # Load the tensors changed in place as from a checkpoint; load_state_dict renames keys, hence the copy.
        merged.training_model.model_parallel.load_state_dict(parameters["model"].copy())
        return merged.monitored_value(merged.validate())

    scores = []
    for branch in range(len(checkpoints)):
        load(branch)
        scores.append(measure())
    weights = greedy_weights(scores, load, _local(parameters["model"]), measure)
    merge_parameters(
        weights, lambda branch: checkpoint.load(checkpoints[branch], merged.training_model), _local(full_state)
    )
    merged.training_model.model_parallel.load_state_dict(full_state["model"])
    merged.training_model.optimizer.load_state_dict(full_state["optimizer"])

    state = merged.state
    if start_state is None:
        state.best, state.best_step, state.validations_since_best = None, None, 0
    else:
        state.best, state.best_step = start_state.best, start_state.best_step
        state.validations_since_best = start_state.validations_since_best
    with TrainingLogger(
        run, process.is_main, config.train.epochs, merged.train_windows.num_windows, state.step, "merging, "
    ) as progress:
        summary = ", ".join(f"branch {branch + 1}: {weight:.2f}" for branch, weight in sorted(weights.items()))
        progress.info(f"merged with weights {summary}")
        merged.record_validation(merged.validate(), progress)
    merged.save()
    with sync_errors():
        if process.is_main:
            for folder in folders:
                checkpoint.delete_all(folder)


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    # At least fp32, so that the mean of fp16 rows is rounded once, not once per branch.
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for tensor in tensors]


def _local(tree: object) -> list[Tensor]:
    """Return this rank's shards of all floating-point tensors, ordered by name; shards of ranks do not overlap."""
    if isinstance(tree, dict):
        return [tensor for name in sorted(tree) if name != "rng" for tensor in _local(tree[name])]
    if isinstance(tree, ShardedTensor):
        return [shard.tensor.detach() for shard in tree.local_shards()]
    return [tree.detach()] if isinstance(tree, Tensor) and tree.is_floating_point() else []
