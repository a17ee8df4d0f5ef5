"""From a trained run to a folder that ``serving`` ranks with (``a2gen export``).

The exported model is read back and evaluated like the run before it is given out: what it costs in AUC is measured
on what was written, by the evaluation's own path, and stands in its manifest.
"""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch

from a2gen_rec import __version__
from a2gen_rec.artifact.artifact import ENSEMBLE, ModelSettings, load_artifact
from a2gen_rec.artifact.manifest import Manifest, write_manifest
from a2gen_rec.artifact.quantized_tables import TableDtype
from a2gen_rec.ensemble import fit
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.ensemble.io import CARD_FILE, WEIGHTS_FILE
from a2gen_rec.runs.export_files import full_state_dict, write_model, write_vocabularies
from a2gen_rec.runs.row_order import export_permutation
from a2gen_rec.training.build import ModelWithLoss
from a2gen_rec.training.loaded_run import LoadedRun, load_run
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

MIN_POSITIVES = 100
"""Positives and negatives of an action without which its AUC cannot tell a loss of a thousandth from chance."""


@dataclass(frozen=True)
class ExportResult:
    """What an export gave: the folder, its manifest, and its size in bytes."""

    folder: str
    manifest: Manifest
    size_bytes: int


def export_run(
    run: str,
    out: str,
    dtype: TableDtype = "int8",
    data: str = "",
    tolerance: float = 1e-3,
    ensemble: str = "",
    split: Literal["valid", "test"] = "test",
) -> ExportResult:
    """Write a run's best checkpoint, its ensemble and all it knows of raw values to the new folder ``out``.

    Args:
        dtype: of the tables looked up by id.
        data: dataset folder; by default the run's own.
        tolerance: most that the AUC of an action or label may fall by on ``split``; of those that have fewer than
            ``LEAST`` positives or negatives there, it is only measured.
        ensemble: its folder; by default the run's own, if it has one.

    Raises:
        ConfigError: the tolerance is negative.
        UserError: no such run; ``out`` is not empty; the AUC falls by more than the tolerance. Nothing is left behind.
    """
    if not tolerance >= 0:
        raise ConfigError(f"--max-auc-drop {tolerance} must be at least 0")
    require_empty_dir(out)
    with load_run(run, data, "cpu") as opened:
        if opened.process.world_size > 1:
            raise ConfigError("one process exports a model, however many trained it; run this without torchrun")
        folder = ensemble or fit.default_ensemble_dir(run)
        if folder:
            fit.load_compatible_ensemble(opened, folder)
        card, order = opened.card, export_permutation(opened.dataset)
        before = _measured(opened, opened.model.model_parallel, opened.model.model.ranker, split)
        with atomic_output_dir(out) as made:
            settings = ModelSettings(
                opened.config.model,
                opened.config.evaluate.max_unexplored_mass,
                opened.config.loader.bucket_overhead_tokens,
            )
            write_model(made, card, settings, full_state_dict(opened.model.model), dtype, order)
            write_vocabularies(made, opened.dataset, order)
            if folder:
                (made / ENSEMBLE).mkdir()
                for name in (CARD_FILE, WEIGHTS_FILE):
                    shutil.copyfile(paths.to_local_path(paths.join(folder, name)), made / ENSEMBLE / name)
            source = {"run": run, "step": opened.step, "checkpoint": opened.fingerprint, "dataset": card.name}
            write_manifest(made, dtype, source, _versions(), {})
            model = load_artifact(str(made)).model
            for name, rows in order.items():  # the dataset's windows hold the dataset's rows
                model.embeddings.permute_rows(name, torch.from_numpy(rows))
            after = _measured(opened, ModelWithLoss(model, _loss(opened)), model.ranker, split)
            metrics = compare_auc(before, after, tolerance)
            check_auc_drop(metrics, out)
            manifest = write_manifest(made, dtype, source, _versions(), metrics)
    return ExportResult(out, manifest, sum(file["bytes"] for file in manifest.files.values()))


def compare_auc(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> dict[str, Any]:
    """Loss, and AUC per action and label, of the original and of what was exported; arguments as ``evaluate`` gives."""
    actions = {}
    for name, original in before["actions"].items():
        exported = after["actions"][name]["auc"]
        positives = original["positives"]
        tells = MIN_POSITIVES <= positives <= before["targets"] - MIN_POSITIVES
        actions[name] = {
            "original": original["auc"],
            "exported": exported,
            "positives": positives,
            "within_tolerance": None if not tells else bool(original["auc"] - exported <= tolerance),
        }
    return {
        "split": before["split"],
        "targets": before["targets"],
        "tolerance": tolerance,
        "min_positives": MIN_POSITIVES,
        "auc": actions,
        "loss": {"original": before["loss"]["total"], "exported": after["loss"]["total"]},
    }


def check_auc_drop(metrics: Mapping[str, Any], out: str) -> None:
    """Raise a UserError unless the AUC of each action that can tell has stayed within the tolerance."""
    fell = {name: auc for name, auc in metrics["auc"].items() if auc["within_tolerance"] is False}
    if fell:
        told = ", ".join(f"{name} {auc['original']:.4f} -> {auc['exported']:.4f}" for name, auc in fell.items())
        raise UserError(
            f"{out}: not written: on {metrics['split']} the AUC falls by more than --max-auc-drop {metrics['tolerance']:g}"
            f" ({told}); export with --dtype fp16 or fp32"
        )


def _measured(opened: LoadedRun, task: torch.nn.Module, ranker: Any, split: str) -> dict[str, Any]:
    return evaluate(task, ranker, opened.dataset, split, opened.config, opened.process)


def _loss(opened: LoadedRun) -> Loss:
    """The run's own: what is learned of it is part of what is measured."""
    return opened.model.model_parallel.module.loss


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "torchrec", "safetensors", "pyarrow", "duckdb")}
    return {"a2gen_rec": __version__, "python": platform.python_version(), **packages}
