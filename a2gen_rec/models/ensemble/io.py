"""A trained ensemble on disk: what it is, in YAML, and its weights, in safetensors: reading one runs no code.

The folder holds ``ensemble.yaml``, ``ensemble.safetensors`` and, of what the ensemble was compared with,
``baseline-NAME.safetensors``. It is written beside its place and moved there whole.
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
_FORMAT = 3


@dataclass(frozen=True)
class EnsembleCard:
    """All of a trained ensemble but its weights.

    Attributes:
        objectives: in the order of the values; behaviours: it was trained for -> ω at the end of the best epoch.
        d_event, d_context: widths it takes.
        config: it was trained with.
        run, step: the training run and checkpoint of the ranker whose predictions it combines.
        checkpoint: the digest that tells that checkpoint from others of the step, see :func:`checkpoint.digest`.
        largest_fall: objective -> see :meth:`Ensemble.largest_fall`.
        metrics: whatever was measured, plain data.
        format: of the folder.
    """

    objectives: list[Objective]
    behavior_weights: dict[str, float]
    d_event: int
    d_context: int
    config: EnsembleConfig
    run: str
    step: int
    checkpoint: str
    max_monotonicity_violation: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    def build(self) -> Ensemble:
        """An ensemble of this shape, untrained."""
        config = self.config
        return Ensemble(
            self.objectives, self.d_event, self.d_context, config.dim, config.hidden_dims, config.quadrature_degree
        )

    @classmethod
    def read(cls, folder: str) -> "EnsembleCard":
        """The card in a folder.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        file = paths.join(folder, CARD_FILE)
        if not paths.exists(file):
            raise UserError(f"{folder}: no ensemble here ({CARD_FILE} is missing)")
        try:
            raw = paths.read_yaml(file)
            if raw["format"] != _FORMAT:
                raise UserError(f"{file}: is of format {raw['format']}, this version reads {_FORMAT}")
            objectives = [Objective(**each) for each in raw["objectives"]]
            return cls(**{**raw, "objectives": objectives, "config": EnsembleConfig(**raw["config"])})
        except (TypeError, KeyError, AttributeError, ConfigError) as error:
            raise UserError(f"{file}: not an ensemble's card ({error})") from error


def check_output_dir(output_dir: str) -> None:
    """Raise a UserError if something else than an ensemble is there, which an ensemble would replace."""
    try:
        occupied = paths.listdir(output_dir) and not paths.exists(paths.join(output_dir, CARD_FILE))
    except OSError as error:
        raise UserError(f"{output_dir}: ensemble cannot be written ({error.strerror or error})") from error
    if occupied:
        raise UserError(f"{output_dir}: is there and holds no ensemble; give another folder")


def save_ensemble(folder: str, model: Ensemble, card: EnsembleCard, baselines: Mapping[str, nn.Module] = {}) -> None:
    """Write an ensemble to a folder, in place of one that is there.

    Args:
        card: of the model; baselines: name -> module, whose state is kept beside.

    Raises:
        UserError: the folder cannot be written, or is there and holds no ensemble.
    """
    check_output_dir(folder)
    local = paths.is_local(folder)
    folder = folder.rstrip("/") if local else folder
    try:
        if local:
            os.makedirs(paths.dirname(folder), exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ensemble-", dir=paths.dirname(folder) if local else None) as work:
            beside, before = f"{work}/new", f"{work}/before"
            os.mkdir(beside)
            _save(model, f"{beside}/{WEIGHTS_FILE}")
            for name, module in baselines.items():
                _save(module, f"{beside}/{_baseline(name)}")
            paths.write_text(f"{beside}/{CARD_FILE}", yaml.safe_dump(asdict(card), sort_keys=False))
            if local and os.path.isdir(folder):
                os.rename(folder, before)
            try:
                paths.move_into_place(beside, folder)
            except OSError:
                if os.path.isdir(before):
                    os.rename(before, folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: ensemble cannot be written ({reason})") from error


def load_ensemble(folder: str) -> tuple[Ensemble, EnsembleCard]:
    """An ensemble, ready to score on the CPU, and its card.

    Raises:
        UserError: it is missing or damaged.
    """
    card = EnsembleCard.read(folder)
    model = card.build()
    _load(model, paths.join(folder, WEIGHTS_FILE))
    return model, card


def load_baseline(folder: str, name: str, module: nn.Module) -> None:
    """Fill a module of the same shape with the state it was saved with.

    Raises:
        UserError: it is missing or damaged, or of another shape.
    """
    _load(module, paths.join(folder, _baseline(name)))


def _baseline(name: str) -> str:
    return f"baseline-{name}.safetensors"


def _save(module: nn.Module, file: str) -> None:
    data = save({name: each.detach().cpu().contiguous() for name, each in module.state_dict().items()})
    with open(file, "wb") as stream:  # the library's own files are for their owner alone
        stream.write(data)


def _load(module: nn.Module, file: str) -> None:
    try:
        module.load_state_dict(load_file(paths.to_local_path(file)))
    except (SafetensorError, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{file}: does not fit its card or is damaged ({lines[-1] if lines else error})") from error
    module.eval()
