"""Training entry point: one model, or ForkMerge branches."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.training.forkmerge import fork_and_merge
from a2gen_rec.training.loaded_run import reject_gbdt
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import lock_run
from a2gen_rec.training.trainer import Trainer
from a2gen_rec.training.warm_start import WarmStart
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import process_group, sync_errors


def train(config: Config, data: str, run: str, init_from: str = "") -> dict[str, Any]:
    """Train a run on the ranks of this job; see :class:`Trainer`.

    With a warm start on later data, the earlier run's model is evaluated on them first, into ``RUN/progressive.json``.

    Raises:
        ConfigError: ForkMerge is set with ``init_from``.
        UserError: As for :class:`Trainer`, or another training uses the run.
    """
    if init_from and config.train.forkmerge.merge_interval_epochs:
        raise ConfigError(
            "--init-from: ForkMerge cannot start from an earlier run; set --train.forkmerge.merge-interval-epochs 0"
        )
    data, run_dir = paths.abspath(data), RunDir(run)
    with process_group(config.train.device) as process, ExitStack() as stack:
        with sync_errors():
            lock = stack.enter_context(lock_run(run)) if process.is_main else None
        with sync_errors():
            reject_gbdt(run)
        trainer = Trainer(config, data, run, process, lock=lock, init_from=init_from)
        if config.train.forkmerge.merge_interval_epochs and not trainer.has_validation:
            raise UserError(f"{data}: the validation split is empty, which train.forkmerge needs to merge branches")
        with sync_errors():
            if process.is_main:
                paths.ensure_writable_dir(run_dir.checkpoints)
                # A training that is resumed before its first checkpoint starts from the same run again.
                start = {"init_from": paths.abspath(init_from)} if init_from else {}
                settings = {"data": data, **start, **asdict(config)}
                paths.write_text(run_dir.config_file, yaml.safe_dump(settings, sort_keys=False))
                trainer.card.save(run)
        if trainer.warm_start is not None:
            _evaluate_earlier(trainer, trainer.warm_start)
        if not config.train.forkmerge.merge_interval_epochs:
            return trainer.fit()
        del trainer  # frees memory before the branches allocate the same amount
        return fork_and_merge(config, data, run, process, lock)


def _evaluate_earlier(trainer: Trainer, warm_start: WarmStart) -> None:
    """Evaluate the loaded model of an earlier run on the new data. Called by all ranks, before training."""
    result = warm_start.evaluate(trainer.training_model, trainer.config, trainer.process)
    if trainer.process.is_main and not result:
        print("before training: no later data than the earlier run has learned, hence no evaluation", flush=True)
    file = RunDir(trainer.run).progressive_file
    with sync_errors():
        if result:
            paths.write_text(file, json.dumps(result, indent=1) + "\n")
    if result:
        aucs = [row["auc"] for row in result["actions"].values() if row["auc"] is not None]
        mean_auc = f", mean AUC {sum(aucs) / len(aucs):.4f}" if aucs else ""
        print(f"before training: {result['targets']:,} targets{mean_auc}; {file}", flush=True)
