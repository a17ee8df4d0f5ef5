"""Files of a trained ensemble: its card in YAML and its weights in safetensors; loading executes no code.

The directory contains ``ensemble.yaml``, ``ensemble.safetensors`` and a ``baseline-NAME.safetensors`` per baseline.
It is written to a temporary directory and moved into place, so that it is complete or absent.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.model import Ensemble, Objective
from a2gen_rec.utils import paths

CARD_FILE, WEIGHTS_FILE = "ensemble.yaml", "ensemble.safetensors"
_FORMAT = 5


@dataclass(frozen=True)
class EnsembleCard:
    """Description of a trained ensemble without its weights.

    Attributes:
        objectives: Objectives in the order of the values.
        behavior_weights: Behavior that the ensemble was trained for -> its weight ω after the best epoch.
        d_event: Width of a history event.
        d_context: Width of the candidate's context.
        config: Configuration of the training.
        run: Training run of the ranker whose predictions the ensemble combines.
        step: Step of the ranker's checkpoint.
        checkpoint: Digest that distinguishes the checkpoint from others of the step, see :func:`checkpoint.digest`.
        lineage: Lineage of the dataset that the ensemble was trained on.
        max_monotonicity_violation: Objective -> see :meth:`Ensemble.max_monotonicity_violation`.
        metrics: Evaluation results as plain data.
        format: Format version of the directory.
    """

    objectives: list[Objective]
    behavior_weights: dict[str, float]
    d_event: int
    d_context: int
    config: EnsembleConfig
    run: str
    step: int
    checkpoint: str
    lineage: list[str] = field(default_factory=list)
    max_monotonicity_violation: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    def build(self) -> Ensemble:
        """Return an untrained ensemble of this shape."""
        config = self.config
        return Ensemble(
            self.objectives, self.d_event, self.d_context, config.dim, config.hidden_dims, config.quadrature_degree
        )

    @classmethod
    def read(cls, folder: str) -> "EnsembleCard":
        """Read the card of a directory.

        Raises:
            UserError: The card is missing, corrupted or in another format version.
        """
        file = paths.join(folder, CARD_FILE)
        if not paths.exists(file):
            paths.require_dir(folder)
            raise UserError(f"{folder}: not an ensemble directory ({CARD_FILE} not found)")
        try:
            raw = paths.read_yaml(file)
            if raw["format"] != _FORMAT:
                raise UserError(f"{file}: unsupported format version {raw['format']}, expected {_FORMAT}")
            objectives = [Objective(**objective) for objective in raw["objectives"]]
            return cls(**{**raw, "objectives": objectives, "config": EnsembleConfig(**raw["config"])})
        except (TypeError, KeyError, AttributeError, ConfigError) as error:
            raise UserError(f"{file}: invalid ensemble card ({error})") from error


def check_output_dir(output_dir: str) -> None:
    """Check that an ensemble can be written to a directory.

    Raises:
        UserError: The directory is not readable, or contains something other than an ensemble.
    """
    try:
        occupied = paths.listdir(output_dir) and not paths.exists(paths.join(output_dir, CARD_FILE))
    except OSError as error:
        raise UserError(f"{output_dir}: cannot write the ensemble ({error.strerror or error})") from error
    if occupied:
        raise UserError(f"{output_dir}: exists but is not an ensemble directory")


def save_ensemble(folder: str, model: Ensemble, card: EnsembleCard, baselines: Mapping[str, nn.Module] = {}) -> None:
    """Write an ensemble to a directory and replace an ensemble that is there.

    Args:
        folder: Output directory.
        model: Trained ensemble.
        card: Card of the model.
        baselines: Name -> baseline whose weights are stored in addition.

    Raises:
        UserError: The directory cannot be written, or exists but is not an ensemble directory.
    """
    check_output_dir(folder)
    local = paths.is_local(folder)
    folder = folder.rstrip("/") if local else folder
    try:
        if local:
            os.makedirs(paths.dirname(folder), exist_ok=True)
        parent = paths.dirname(folder) if local else None
        with tempfile.TemporaryDirectory(prefix=".ensemble-", dir=parent) as temporary:
            new, previous = f"{temporary}/new", f"{temporary}/previous"
            os.mkdir(new)
            _save(model, f"{new}/{WEIGHTS_FILE}")
            for name, module in baselines.items():
                _save(module, f"{new}/{_baseline_file(name)}")
            paths.write_text(f"{new}/{CARD_FILE}", yaml.safe_dump(asdict(card), sort_keys=False))
            if local and os.path.isdir(folder):
                os.rename(folder, previous)
            try:
                paths.move_dir(new, folder)
            except OSError:
                if os.path.isdir(previous):
                    os.rename(previous, folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot write the ensemble ({reason})") from error


def load_ensemble(folder: str) -> tuple[Ensemble, EnsembleCard]:
    """Return an ensemble on CPU in evaluation mode, and its card.

    Raises:
        UserError: The ensemble is missing or corrupted.
    """
    card = EnsembleCard.read(folder)
    model = card.build()
    _load(model, paths.join(folder, WEIGHTS_FILE))
    return model, card


def load_baseline(folder: str, name: str, module: nn.Module) -> None:
    """Load the stored weights of a baseline into a module of the same shape.

    Raises:
        UserError: The weights are missing, corrupted or of another shape.
    """
    _load(module, paths.join(folder, _baseline_file(name)))


def _baseline_file(name: str) -> str:
    return f"baseline-{name}.safetensors"


def _save(module: nn.Module, file: str) -> None:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})
    with open(file, "wb") as stream:  # files written by safetensors itself are readable by their owner only
        stream.write(data)


def _load(module: nn.Module, file: str) -> None:
    try:
        module.load_state_dict(load_file(paths.to_local_path(file)))
    except (SafetensorError, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{file}: incompatible with its config, or corrupted ({lines[-1] if lines else error})"
        ) from error
    module.eval()
