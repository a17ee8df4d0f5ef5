"""Layout of a run directory. Imports neither torch nor models, so that every command can use it."""

from dataclasses import dataclass

from a2gen_rec.utils import paths


@dataclass(frozen=True)
class RunDir:
    """Paths in the directory of one training run.

    Attributes:
        path: Directory given to ``a2gen train --run``, local or remote.
    """

    path: str

    @property
    def config_file(self) -> str:
        """Resolved configuration, with the path of the dataset."""
        return paths.join(self.path, "config.yaml")

    @property
    def lock_file(self) -> str:
        """File that exists while the run is trained."""
        return paths.join(self.path, "lock")

    @property
    def checkpoints(self) -> str:
        """Directory of all checkpoints."""
        return paths.join(self.path, "checkpoints")

    @property
    def progressive_file(self) -> str:
        """Evaluation of the earlier run on the data of this one, before training; only of a warm start."""
        return paths.join(self.path, "progressive.json")

    @property
    def gbdt_file(self) -> str:
        """Settings, metrics and outcomes of a finished run of ``model.name: gbdt``; other runs have none."""
        return paths.join(self.path, "gbdt.json")

    @property
    def boosters(self) -> str:
        """Directory of the boosters of a run of ``model.name: gbdt``, one text file per outcome."""
        return paths.join(self.path, "boosters")

    @property
    def tensorboard(self) -> str:
        """Directory of the TensorBoard event files."""
        return paths.join(self.path, "tensorboard")

    @property
    def ensemble(self) -> str:
        """Default directory of the run's ensemble."""
        return paths.join(self.path, "ensemble")

    @property
    def scores(self) -> str:
        """Directory of cached session lists, one sub-directory per checkpoint and setting."""
        return paths.join(self.path, "scores")

    def checkpoint(self, step: int) -> str:
        """Return the directory of a step's checkpoint."""
        return paths.join(self.checkpoints, f"step-{step:08d}")

    def branch(self, step: int, index: int) -> str:
        """Return the run directory of a ForkMerge branch forked at ``step``."""
        return paths.join(self.path, "branches", f"step-{step:08d}", str(index))

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        names = paths.listdir(self.checkpoints)
        return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())

    def latest_checkpoint(self) -> str | None:
        """Return the directory of the latest complete checkpoint; None if there is none."""
        steps = self.checkpoint_steps()
        return self.checkpoint(steps[-1]) if steps else None
