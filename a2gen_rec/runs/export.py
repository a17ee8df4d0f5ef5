"""Export of a trained run to a directory for ranking and serving (``a2gen export``).

The exported model is loaded again and evaluated with the same code as the run before it is published. Its manifest
records the change in AUC.
"""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from a2gen_rec import __version__
from a2gen_rec.artifact.artifact import ENSEMBLE, Artifact, ModelSettings, load_artifact
from a2gen_rec.artifact.manifest import Manifest, write_manifest
from a2gen_rec.artifact.quantized_tables import TableDtype
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.data.vectors import VectorTable
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
"""Minimum number of positives and of negatives of an action; below it, an AUC drop of 0.001 is within noise."""


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        folder: Directory of the exported model.
        manifest: Manifest of the exported model.
        size_bytes: Total size of its files, in bytes.
    """

    folder: str
    manifest: Manifest
    size_bytes: int


def export_run(
    run: str,
    out: str,
    dtype: TableDtype = "int8",
    data: str = "",
    max_auc_drop: float = 1e-3,
    ensemble: str = "",
    split: Literal["valid", "test"] = "test",
) -> ExportResult:
    """Write a run's best checkpoint, its ensemble and the vocabularies to the new directory ``out``.

    Args:
        run: Run directory.
        out: Output directory, must be empty or missing.
        dtype: Data type of the tables looked up by id.
        data: Dataset directory; by default that of the run.
        max_auc_drop: Maximum drop of the AUC of an action or label on ``split``. Actions with fewer than
            ``MIN_POSITIVES`` positives or negatives are measured but exempt.
        ensemble: Ensemble directory; by default that of the run, if any.
        split: Split of the evaluation.

    Raises:
        ConfigError: ``max_auc_drop`` is negative, or the job has several ranks.
        UserError: The run does not exist, ``out`` is not empty, or the AUC drops too far. Nothing is left behind.
    """
    if not max_auc_drop >= 0:
        raise ConfigError(f"--max-auc-drop {max_auc_drop} must be at least 0")
    require_empty_dir(out)
    with load_run(run, data, "cpu") as loaded:
        if loaded.process.world_size > 1:
            raise ConfigError("`a2gen export` is single-process; do not launch it with torchrun")
        ensemble = ensemble or fit.default_ensemble_dir(run)
        if ensemble:
            fit.load_compatible_ensemble(loaded, ensemble)
        card, permutation = loaded.dataset.card, export_permutation(loaded.dataset)
        before = _evaluate(loaded, loaded.model.model_parallel, loaded.model.model.ranker, split)
        with atomic_output_dir(out) as output:
            settings = ModelSettings(
                loaded.config.model,
                loaded.config.evaluate.max_unexplored_mass,
                loaded.config.loader.bucket_overhead_tokens,
            )
            write_model(output, card, settings, full_state_dict(loaded.model.model), dtype, permutation)
            write_vocabularies(output, loaded.dataset, permutation, dtype)
            if ensemble:
                (output / ENSEMBLE).mkdir()
                for name in (CARD_FILE, WEIGHTS_FILE):
                    shutil.copyfile(paths.to_local_path(paths.join(ensemble, name)), output / ENSEMBLE / name)
            source = {
                "run": run,
                "step": loaded.step,
                "checkpoint": loaded.fingerprint,
                "dataset": card.name,
                "data_digest": loaded.identity.data_digest,
                "lineage": loaded.identity.lineage,
                "training_lineage": loaded.card.identity.lineage,
            }
            write_manifest(output, dtype, source, _versions(), {})
            artifact = load_artifact(str(output))
            model = artifact.model
            for name, rows in permutation.items():  # the dataset's windows contain row numbers of the dataset
                model.embeddings.permute_rows(name, torch.from_numpy(rows))
            dataset = replace(loaded.dataset, vectors=_stored_vectors(artifact, loaded.dataset))
            task = ModelWithLoss(model, _loss(loaded))
            after = evaluate(task, model.ranker, dataset, split, loaded.config, loaded.process)
            metrics = compare_auc(before, after, max_auc_drop)
            check_auc_drop(metrics, out)
            manifest = write_manifest(output, dtype, source, _versions(), metrics)
    return ExportResult(out, manifest, sum(file["bytes"] for file in manifest.files.values()))


def compare_auc(before: Mapping[str, Any], after: Mapping[str, Any], max_auc_drop: float) -> dict[str, Any]:
    """Compare loss and AUC of the original and the exported model.

    Args:
        before: Evaluation of the original model (see :func:`evaluate`).
        after: Evaluation of the exported model.
        max_auc_drop: Maximum drop of the AUC.
    """
    actions = {}
    for name, original in before["actions"].items():
        exported = after["actions"][name]["auc"]
        positives = original["positives"]
        has_enough = MIN_POSITIVES <= positives <= before["targets"] - MIN_POSITIVES
        actions[name] = {
            "original": original["auc"],
            "exported": exported,
            "positives": positives,
            "within_tolerance": None if not has_enough else bool(original["auc"] - exported <= max_auc_drop),
        }
    return {
        "split": before["split"],
        "targets": before["targets"],
        "tolerance": max_auc_drop,
        "min_positives": MIN_POSITIVES,
        "auc": actions,
        "loss": {"original": before["loss"]["total"], "exported": after["loss"]["total"]},
    }


def check_auc_drop(metrics: Mapping[str, Any], out: str) -> None:
    """Raise UserError if the AUC of an action with enough data drops by more than the tolerance."""
    dropped = {name: auc for name, auc in metrics["auc"].items() if auc["within_tolerance"] is False}
    if dropped:
        changes = ", ".join(f"{name} {auc['original']:.4f} -> {auc['exported']:.4f}" for name, auc in dropped.items())
        raise UserError(
            f"{out}: not written: on {metrics['split']} the AUC drops by more than --max-auc-drop "
            f"{metrics['tolerance']:g} ({changes}); export with --dtype fp16 or fp32"
        )


def _stored_vectors(artifact: Artifact, dataset: Dataset) -> dict[str, VectorTable]:
    """Return the exported vectors in the order of the dataset's items."""
    if not artifact.vectors:
        return {}
    order = artifact.items.lookup(read_table(dataset.items_file, ["item"])["item"].to_pylist())
    return {
        name: VectorTable(table.values[order], None if table.scale is None else table.scale[order])
        for name, table in artifact.vectors.items()
    }


def _evaluate(loaded: LoadedRun, task: torch.nn.Module, ranker: Any, split: str) -> dict[str, Any]:
    return evaluate(task, ranker, loaded.dataset, split, loaded.config, loaded.process)


def _loss(loaded: LoadedRun) -> Loss:
    """Return the run's loss with its learned weights."""
    return loaded.model.model_parallel.module.loss


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "torchrec", "safetensors", "pyarrow", "duckdb")}
    return {"a2gen_rec": __version__, "python": platform.python_version(), **packages}
