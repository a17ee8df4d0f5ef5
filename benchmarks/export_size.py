"""How large is an exported model, by dtype and width of its tables, and how much AUC does int8 cost?

A simulated log is prepared, models of several widths are trained for a few steps, and each is exported with every table
dtype. A size is the total of all files of an export, manifest included. Identifiers and features of users and items are
the same in every export of a dataset: the larger they are, the less int8 saves of the total. All items have equal
popularity, so that few impressions cover nearly all of them, and the catalog has about as many items as were simulated.

`a2gen export` measures the AUC of the run and of the export. A float32 export must have the AUC of its run.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness import CellValue, Goal, Report, ReportTable, main
from serving_fixture import CONFIG_FILE, run_command

from a2gen_rec.artifact.artifact import DENSE, ENTITY_TABLES, IDENTIFIERS, TABLES
from a2gen_rec.artifact.manifest import MANIFEST, Manifest, read_manifest
from a2gen_rec.artifact.quantized_tables import TableDtype
from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.schema import RAW_DURATION_COLUMN
from a2gen_rec.errors import ConfigError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

GOAL_DIM, MAX_INT8_PERCENT = 32, 30.0
"""Table width of the size goal, and maximum size of its int8 export in percent of the float32 export."""
MAX_AUC_LOSS = 1e-3
"""Maximum AUC loss of an action."""
VALID_FRACTION, TEST_FRACTION = 0.005, 0.02
"""Fractions of the impressions: enough to distinguish AUCs, few enough to evaluate for every export."""
MIB = 2**20


@dataclass
class Settings:
    """Simulated log, models and exports.

    Attributes:
        items: simulated items.
        users: simulated users.
        impressions_per_user: simulated impressions of each user.
        max_history: maximum impressions before a target.
        dims: widths of the tables.
        dtypes: dtypes of the exported tables; must include fp32.
        steps: training steps.
        seed: random seed.
    """

    items: int = 400_000
    users: int = 40_000
    impressions_per_user: int = 50
    max_history: int = 20
    dims: list[int] = field(default_factory=lambda: [32, 64])
    dtypes: list[TableDtype] = field(default_factory=lambda: ["int8", "fp16", "fp32"])
    steps: int = 300
    seed: int = 0


QUICK = {"items": 20_000, "users": 4_000, "impressions_per_user": 25, "dims": [32], "steps": 30}


@dataclass(frozen=True)
class Export:
    """One exported model."""

    dim: int
    dtype: TableDtype
    folder: Path
    manifest: Manifest

    @property
    def total_bytes(self) -> int:
        """Total bytes of all files."""
        return sum(self.bytes_by_part.values())

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of each part of the export."""
        sizes = {name: entry["bytes"] for name, entry in self.manifest.files.items()}
        vocabularies = sum(size for name, size in sizes.items() if name.startswith("vocabulary/"))
        parts = {"tables": sizes[TABLES], "dense": sizes[DENSE], "vocabularies": vocabularies}
        parts |= {f"{level}s": sizes[file] for level, file in ENTITY_TABLES.items()}
        rest = sum(sizes.values()) - sum(parts.values()) + (self.folder / MANIFEST).stat().st_size
        return {**parts, "rest": rest}

    def auc_loss(self) -> dict[str, float]:
        """Return the AUC loss of each action with enough positives and negatives."""
        auc = {
            name: values
            for name, values in self.manifest.metrics["auc"].items()
            if values["within_tolerance"] is not None
        }
        return {name: values["original"] - values["exported"] for name, values in auc.items()}


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Train a model of every width and export it with every dtype."""
    _check_settings(settings, process)
    with tempfile.TemporaryDirectory(prefix="a2gen-export-size-") as scratch:
        folder = Path(scratch)
        raw, data = str(folder / "log"), str(folder / "data")
        log(f"simulating {settings.items:,} items and {settings.users:,} users")
        simulation = SimulateConfig(
            users=settings.users,
            items=settings.items,
            authors=max(1, settings.items // 5),
            impressions_per_user=settings.impressions_per_user,
            popularity_exponent=0.0,
            seed=settings.seed,
        )
        simulate(raw, simulation)
        config = PrepareConfig(
            max_history=settings.max_history, valid_fraction=VALID_FRACTION, test_fraction=TEST_FRACTION
        )
        prepare("simulated", raw, data, config)
        exports = [export for dim in settings.dims for export in train_and_export(folder, data, dim, settings)]
        check_exports(exports)
        return make_report(exports, settings)


def _check_settings(settings: Settings, process: DistributedContext) -> None:
    if process.world_size > 1:
        raise ConfigError(f"exports run in one process: use one rank, not {process.world_size}")
    if not settings.dims or "fp32" not in settings.dtypes:
        raise ConfigError("dims must not be empty, and dtypes must include fp32")
    for name in ("items", "users", "impressions_per_user", "max_history", "steps"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} {getattr(settings, name)} must be at least 1")


def train_and_export(folder: Path, data: str, dim: int, settings: Settings) -> list[Export]:
    """Train a model of one width and export it with every dtype."""
    log(f"width {dim}: training {settings.steps:,} steps, exporting")
    run = str(folder / f"run-{dim}")
    options = [
        f"--train.max_steps={settings.steps}",
        f"--train.validation_interval={settings.steps}",
        "--train.epochs=1000",
    ]
    run_command(
        folder, "train", "--config", str(CONFIG_FILE), f"--model.dim={dim}", "--data", data, "--run", run, *options
    )
    exports = []
    for dtype in settings.dtypes:
        out = folder / f"model-{dim}-{dtype}"
        # The export must succeed at any AUC loss.
        run_command(folder, "export", "--run", run, "--out", str(out), "--dtype", dtype, "--max-auc-drop", "1")
        exports.append(Export(dim, dtype, out, read_manifest(str(out))))
    return exports


def check_exports(exports: list[Export]) -> None:
    """Check that float32 exports lose no AUC and that all exports have the same entity tables.

    Raises:
        RuntimeError: they do not.
    """
    for export in exports:
        if export.dtype == "fp32" and (loss := max(map(abs, export.auc_loss().values()), default=0.0)) > 1e-6:
            raise RuntimeError(
                f"the AUC of the float32 export of width {export.dim} differs from the run by {loss:.2g}"
            )
        for file in ENTITY_TABLES.values():
            if export.manifest.files[file] != exports[0].manifest.files[file]:
                raise RuntimeError(f"exports of one dataset differ in {file}")


def make_report(exports: list[Export], settings: Settings) -> Report:
    """Build tables, goals and metrics from the exports of one dataset."""
    fp32_bytes = {export.dim: export.total_bytes for export in exports if export.dtype == "fp32"}
    percents = {(export.dim, export.dtype): 100 * export.total_bytes / fp32_bytes[export.dim] for export in exports}
    goals, metrics = [], {f"{dtype}_{dim}_percent": percent for (dim, dtype), percent in percents.items()}
    if (percent := percents.get((GOAL_DIM, "int8"))) is not None:
        claim = f"{settings.items:,} items, width {GOAL_DIM}: int8 export relative to float32"
        goals.append(Goal(claim, f"at most {MAX_INT8_PERCENT:g} %", f"{percent:.2f} %", percent <= MAX_INT8_PERCENT))
    int8_exports = [export for export in exports if export.dtype == "int8"]
    if losses := [loss for export in int8_exports for loss in export.auc_loss().values()]:
        worst = max(losses)
        goals.append(
            Goal(
                "int8: largest AUC loss of an action",
                f"at most {MAX_AUC_LOSS:g}",
                f"{worst:.2g}",
                worst <= MAX_AUC_LOSS,
            )
        )
        metrics["int8_auc_loss"] = worst
    catalog, columns = _catalog_tables(exports[0], settings)
    return Report([_size_table(exports, percents), catalog, columns, *_auc_tables(exports)], goals, metrics)


def _size_table(exports: list[Export], percents: Mapping[tuple[int, TableDtype], float]) -> ReportTable:
    names = list(exports[0].bytes_by_part)
    rows: list[list[CellValue]] = []
    for export in exports:
        sizes = [export.total_bytes, *export.bytes_by_part.values()]
        rows.append([export.dim, export.dtype, percents[export.dim, export.dtype], *(size / MIB for size in sizes)])
    columns = ["width", "dtype", "% of fp32", "total MiB", *(f"{name} MiB" for name in names)]
    note = "dense: float32 weights after the lookups; users, items: identifiers and feature rows"
    return ReportTable("Exports", columns, rows, note)


def _catalog_tables(export: Export, settings: Settings) -> tuple[ReportTable, ReportTable]:
    """Count users and items, and their bytes apart from table rows."""
    entries: list[list[CellValue]] = []
    columns: list[list[CellValue]] = []
    for level, simulated in (("item", settings.items), ("user", settings.users)):
        file = export.folder / ENTITY_TABLES[level]
        stored = pq.read_table(file, columns=[IDENTIFIERS[level]])
        with_row, size = pc.sum(pc.greater(stored[0], 0)).as_py(), file.stat().st_size
        entries.append([f"{level}s", simulated, len(stored), with_row, size / len(stored)])
        metadata = pq.read_metadata(file)
        for column in range(metadata.num_columns):
            name = metadata.schema.column(column).path.split(".")[0]  # "statistics.list.element" of a list
            chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
            columns.append([f"{level}s", name, sum(chunk.total_compressed_size for chunk in chunks) / len(stored)])
    note = "with a row: present in the training data, with a table row each"
    names = ["entity", "simulated", "in the catalog", "with a row", "bytes per entity"]
    return (
        ReportTable("Catalog, equal in all exports", names, entries, note),
        ReportTable(
            "Catalog columns",
            ["entity", "column", "bytes per entity"],
            columns,
            f"{RAW_DURATION_COLUMN}: exact duration of a video",
        ),
    )


def _auc_tables(exports: list[Export]) -> list[ReportTable]:
    """Build one table per width: the AUC of every action and its loss by dtype."""
    tables = []
    for dim in dict.fromkeys(export.dim for export in exports):
        same_width = [export for export in exports if export.dim == dim]
        rows: list[list[CellValue]] = []
        metrics = same_width[0].manifest.metrics
        for name, auc in metrics["auc"].items():
            losses = [export.auc_loss().get(name) for export in same_width]
            rows.append([name, auc["positives"], auc["original"], *losses])
        columns = ["action", "positives", "AUC of the run", *(f"{export.dtype} loss" for export in same_width)]
        note = f"–: fewer than {metrics['min_positives']} positives or negatives; negative: AUC gain"
        tables.append(ReportTable(f"Width {dim}: AUC of {metrics['targets']:,} targets", columns, rows, note))
    return tables


def log(line: str) -> None:
    """Print a progress line to stderr."""
    print(f"export_size: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
