"""Train a run, as one model or as forked and merged branches."""

from dataclasses import asdict
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.training import checkpoint
from a2gen_rec.training.forkmerge import fork_and_merge
from a2gen_rec.training.trainer import CONFIG_FILE, Trainer
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import process_group, sync_errors


def train(config: Config, data: str, run: str) -> dict[str, Any]:
    """Train a run on the ranks this process is one of; see :class:`Trainer`."""
    data = paths.abspath(data)
    with process_group(config.train.device) as process:
        trainer = Trainer(config, data, run, process)
        with sync_errors():
            if process.is_main:
                paths.ensure_writable_dir(paths.join(run, checkpoint.CHECKPOINTS_DIR))
                settings = {"data": data, **asdict(config)}
                paths.write_text(paths.join(run, CONFIG_FILE), yaml.safe_dump(settings, sort_keys=False))
                trainer.card.save(run)
        if not config.train.forkmerge.merge_interval_epochs:
            return trainer.fit()
        del trainer  # before the branches take as much memory
        return fork_and_merge(config, data, run, process)
