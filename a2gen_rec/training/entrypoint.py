"""Training entry point: one model, or ForkMerge branches."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.training.forkmerge import fork_and_merge
from a2gen_rec.training.loaded_run import reject_gbdt
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.run_lock import lock_run
from a2gen_rec.training.trainer import Trainer
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import process_group, sync_errors


def train(config: Config, data: str, run: str) -> dict[str, Any]:
    """Train a run on the ranks of this job; see :class:`Trainer`.

    Raises:
        UserError: As for :class:`Trainer`, or another training uses the run.
    """
    data, run_dir = paths.abspath(data), RunDir(run)
    with process_group(config.train.device) as process, ExitStack() as stack:
        with sync_errors():
            lock = stack.enter_context(lock_run(run)) if process.is_main else None
        with sync_errors():
            reject_gbdt(run)
        trainer = Trainer(config, data, run, process, lock=lock)
        with sync_errors():
            if process.is_main:
                paths.ensure_writable_dir(run_dir.checkpoints)
                settings = {"data": data, **asdict(config)}
                paths.write_text(run_dir.config_file, yaml.safe_dump(settings, sort_keys=False))
                trainer.card.save(run)
        if not config.train.forkmerge.merge_interval_epochs:
            return trainer.fit()
        del trainer  # frees memory before the branches allocate the same amount
        return fork_and_merge(config, data, run, process, lock)
