"""Datasets of an experiment: prepared once, and bound to their log, spec and settings."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.experiments.command_runner import cli_arguments
from a2gen_rec.experiments.log_state import differing, read_log_state
from a2gen_rec.experiments.suite import Dataset
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest


@dataclass(frozen=True)
class PreparedDataset:
    """Prepared dataset.

    Attributes:
        folder: Dataset directory.
        card: :meth:`DatasetCard.without_command` of its card.
    """

    folder: str
    card: dict[str, Any]


def prepare_dataset(
    dataset: Dataset, raw_dir: str, out: str, command: Callable[[Sequence[str], str], None], log: Callable[[str], None]
) -> str:
    """Return the directory of a dataset, after preparing it if it is missing.

    Args:
        dataset: Dataset of a suite.
        raw_dir: Directory that paths of data and logs are relative to.
        out: Output directory of the experiment.
        command: Runs ``a2gen`` with arguments, and appends its output to a file.
        log: Called with lines of progress.

    Raises:
        UserError: A command failed, or the existing dataset was prepared with other settings or from another log.
    """
    if dataset.data:
        return paths.abspath(paths.resolve_relative(raw_dir, dataset.data))
    folder = paths.abspath(paths.join(out, "data", dataset.name))
    settings_file, preparation = f"{folder}.json", dataset.preparation
    log_file, source, raw = f"{folder}.txt", dataset.source, paths.resolve_relative(raw_dir, dataset.raw)
    if dataset.simulate is None:
        preparation |= read_log_state(raw, dataset.spec, out)
    settings = json.dumps(preparation, indent=1, default=str) + "\n"
    if paths.exists(folder):
        if not paths.exists(settings_file):
            raise UserError(f"{folder}: {settings_file} is missing, so its settings are unknown; remove the directory")
        _check_preparation(folder, settings_file, json.loads(settings))
        return folder
    paths.ensure_writable_dir(paths.dirname(folder))
    paths.write_text(settings_file, settings)
    if dataset.simulate is not None:
        digest = hex_digest(json.dumps(dataset.simulate, default=str), 8)
        source, raw = "simulated", f"{folder}-log-{digest}"
        if not paths.exists(raw):
            command(["simulate", "--out", raw, *cli_arguments(dataset.simulate)], log_file)
    spec = ["--spec", dataset.spec] if dataset.spec else []
    log(f"preparing {dataset.name}")
    command(["prepare", source, "--raw", raw, "--out", folder, *spec, *cli_arguments(dataset.prepare)], log_file)
    return folder


def _check_preparation(folder: str, settings_file: str, settings: dict[str, Any]) -> None:
    """Raise UserError if the dataset in ``folder`` was prepared with other settings or from another log."""
    try:
        keys = differing(json.loads(paths.read_text(settings_file)), settings)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{settings_file}: not the settings of a dataset ({error}); remove it and {folder}") from error
    if keys:
        raise UserError(
            f"{folder}: was prepared with other settings (see {settings_file}; {', '.join(keys)}); "
            "remove both or choose another --out"
        )
