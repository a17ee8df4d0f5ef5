"""Train a run, as one model or as forked and merged branches."""

from dataclasses import asdict
from typing import Any

import yaml

from a2gen_rec.config import Config
from a2gen_rec.training import checkpoint
from a2gen_rec.training.forkmerge import fork_and_merge
from a2gen_rec.training.trainer import CONFIG_FILE, Trainer
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import agreed, process_group


def train(config: Config, data: str, run: str) -> dict[str, Any]:
    """Train a run on the ranks this process is one of; see :class:`Trainer`."""
    data = paths.absolute(data)
    with process_group(config.train.device) as process:
        trainer = Trainer(config, data, run, process)
        with agreed():
            if process.leads:
                paths.make_folder(paths.join(run, checkpoint.FOLDER))
                settings = {"data": data, **asdict(config)}
                paths.write_text(paths.join(run, CONFIG_FILE), yaml.safe_dump(settings, sort_keys=False))
                trainer.card.save(run)
        if not config.train.forkmerge.every:
            return trainer.fit()
        del trainer  # before the branches take as much memory
        return fork_and_merge(config, data, run, process)
