"""Files of a finished run: boosters as text, and one JSON file that is written last."""

import json
import re
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.gbdt.ranker import GBDTRanker
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths

FORMAT_VERSION = 1
"""Format of ``gbdt.json``."""


@dataclass(frozen=True)
class GBDTRecord:
    """Content of ``gbdt.json``.

    Attributes:
        config: Resolved configuration.
        data: Dataset directory.
        card: Dataset card.
        metrics: Validation metrics.
        boosters: Boosters with ``outcome``, ``kind``, ``file``, ``trees`` and ``leaves``.
        importance: Column -> share of the total gain of its splits, mean over boosters; descending.
        format_version: Format of the file.
    """

    config: dict[str, Any]
    data: str
    card: dict[str, Any]
    metrics: dict[str, float]
    boosters: list[dict[str, Any]]
    importance: dict[str, float]
    format_version: int = FORMAT_VERSION

    @property
    def trees(self) -> int:
        """Number of trees of all boosters."""
        return sum(booster["trees"] for booster in self.boosters)

    @property
    def num_parameters(self) -> int:
        """Number of leaf values and split thresholds."""
        return sum(2 * booster["leaves"] - booster["trees"] for booster in self.boosters)


def import_lightgbm() -> ModuleType:
    """Return the module ``lightgbm``.

    Raises:
        UserError: It is not installed, or the shared library of OpenMP is missing.
    """
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        raise UserError(f"model.name gbdt requires LightGBM: pip install 'a2gen_rec[gbdt]' ({error})") from None
    module: ModuleType = lightgbm
    return module


def write_run(
    run: str,
    ranker: GBDTRanker,
    config: dict[str, Any],
    data: str,
    card: DatasetCard,
    metrics: dict[str, float],
) -> GBDTRecord:
    """Write the boosters of a ranker, then ``gbdt.json``, whose presence marks the run as finished."""
    run_dir, entries = RunDir(run), []
    paths.ensure_writable_dir(run_dir.boosters)
    for number, ((outcome, kind), booster) in enumerate(ranker.boosters.items()):
        file, text = f"{number:02d}.txt", booster.model_to_string()
        paths.write_text(paths.join(run_dir.boosters, file), text)
        leaves = sum(map(int, re.findall(r"^num_leaves=(\d+)$", text, re.MULTILINE)))
        entries.append({"outcome": outcome, "kind": kind, "file": file, "trees": booster.num_trees(), "leaves": leaves})
    record = GBDTRecord(config, data, card.to_dict(), metrics, entries, _importance(ranker))
    paths.write_text(run_dir.gbdt_file, json.dumps(asdict(record), indent=1) + "\n")
    return record


def read_record(run: str) -> GBDTRecord:
    """Read ``gbdt.json`` of a run.

    Raises:
        UserError: The file is missing, corrupted, or has another format version.
    """
    file = RunDir(run).gbdt_file
    try:
        raw = json.loads(paths.read_text(file))
        if raw["format_version"] != FORMAT_VERSION:
            raise UserError(f"{file}: unsupported format version {raw['format_version']}, expected {FORMAT_VERSION}")
        return GBDTRecord(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not the record of a gbdt run ({error})") from error


def read_boosters(run: str, record: GBDTRecord) -> dict[tuple[str, str], Any]:
    """Read the boosters of a run by outcome and kind.

    Raises:
        UserError: A file is missing or corrupted, or LightGBM is not installed.
    """
    lightgbm = import_lightgbm()
    boosters = {}
    for entry in record.boosters:
        file = paths.join(RunDir(run).boosters, entry["file"])
        try:
            boosters[entry["outcome"], entry["kind"]] = lightgbm.Booster(model_str=paths.read_text(file))
        except lightgbm.basic.LightGBMError as error:
            raise UserError(f"{file}: not a LightGBM model ({error})") from error
    return boosters


def _importance(ranker: GBDTRanker) -> dict[str, float]:
    """Return the mean share of gain of each column that a booster uses, descending."""
    gains = [booster.feature_importance("gain") for booster in ranker.boosters.values()]
    shares = [gain / gain.sum() for gain in gains if gain.sum() > 0]
    mean = np.mean(shares, axis=0) if shares else np.zeros(len(ranker.columns))
    order = np.argsort(-mean, kind="stable")
    return {ranker.columns[column]: float(mean[column]) for column in order if mean[column] > 0}
