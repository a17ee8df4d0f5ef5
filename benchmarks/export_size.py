"""How large is an exported model, by type and width of its tables, and what does int8 cost?

A simulated world is prepared, models of several widths are trained a little, and each is exported with every type of
tables. Sizes are those of all files of a folder, manifest included. What users and items are called and made of is the
same in every export of a dataset, so the more it takes, the less int8 can save of the whole. All items are shown alike
often: few impressions then show nearly all of them, and the catalogue is about as large as the world.

AUC is what `a2gen export` measures, of the run and of what was written. Exports in float32 must have the run's own.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness import Cell, Goal, Report, ReportTable, main
from serving_fixture import CONFIG, a2gen

from a2gen_rec.artifact.artifact import DENSE, ENTITY_TABLES, IDENTIFIERS, TABLES
from a2gen_rec.artifact.manifest import MANIFEST, Manifest, read_manifest
from a2gen_rec.artifact.quantized_tables import TableDtype
from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.errors import ConfigError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

DIM, WANTED = 32, 30.0
"""Width of tables of which an int8 export is to be at most so many percent of the float32 one."""
MOST_LOST = 1e-3
"""AUC that an action may lose."""
VALID_SHARE, TEST_SHARE = 0.005, 0.02
"""Of the impressions: enough to tell AUCs apart, few enough to be evaluated for every export."""
MIB = 2**20


@dataclass
class Settings:
    """What is exported.

    Attributes:
        items, users, impressions_per_user: of the simulated world.
        history: most impressions before a target.
        dims: widths of the tables.
        dtypes: of the exported tables, float32 among them.
        steps: of training.
    """

    items: int = 400_000
    users: int = 40_000
    impressions_per_user: int = 50
    history: int = 20
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
    def whole(self) -> int:
        """Bytes of all files."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part of the folder."""
        size = {name: each["bytes"] for name, each in self.manifest.files.items()}
        vocabularies = sum(each for name, each in size.items() if name.startswith("vocabulary/"))
        named = {"tables": size[TABLES], "dense": size[DENSE], "vocabularies": vocabularies}
        named |= {f"{level}s": size[file] for level, file in ENTITY_TABLES.items()}
        rest = sum(size.values()) - sum(named.values()) + (self.folder / MANIFEST).stat().st_size
        return {**named, "rest": rest}

    def lost(self) -> dict[str, float]:
        """AUC lost of each action that happened often enough to tell."""
        told = {
            name: each for name, each in self.manifest.metrics["auc"].items() if each["within_tolerance"] is not None
        }
        return {name: each["original"] - each["exported"] for name, each in told.items()}


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Export every model as every type."""
    _check(settings, process)
    with tempfile.TemporaryDirectory(prefix="a2gen-export-size-") as scratch:
        folder = Path(scratch)
        log, data = str(folder / "log"), str(folder / "data")
        tell(f"simulating a world of {settings.items:,} items and {settings.users:,} users")
        world = SimulateConfig(
            users=settings.users,
            items=settings.items,
            authors=max(1, settings.items // 5),
            impressions_per_user=settings.impressions_per_user,
            popularity_exponent=0.0,
            seed=settings.seed,
        )
        simulate(log, world)
        config = PrepareConfig(max_history=settings.history, valid_fraction=VALID_SHARE, test_fraction=TEST_SHARE)
        prepare("simulated", log, data, config)
        exports = [each for dim in settings.dims for each in exported(folder, data, dim, settings)]
        check(exports)
        return report(exports, settings)


def _check(settings: Settings, process: DistributedContext) -> None:
    if process.world_size > 1:
        raise ConfigError(f"one process exports: measure it on one rank, not {process.world_size}")
    if not settings.dims or "fp32" not in settings.dtypes:
        raise ConfigError("there must be a width of tables in dims, and fp32 in dtypes to compare with")
    for name in ("items", "users", "impressions_per_user", "history", "steps"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} {getattr(settings, name)} must be at least 1")


def exported(folder: Path, data: str, dim: int, settings: Settings) -> list[Export]:
    """Train a model of one width and export it as every type."""
    tell(f"width {dim}: training {settings.steps:,} steps, exporting")
    run = str(folder / f"run-{dim}")
    bounds = [
        f"--train.max_steps={settings.steps}",
        f"--train.validation_interval={settings.steps}",
        "--train.epochs=1000",
    ]
    a2gen(folder, "train", "--config", str(CONFIG), f"--model.dim={dim}", "--data", data, "--run", run, *bounds)
    found = []
    for dtype in settings.dtypes:
        out = folder / f"model-{dim}-{dtype}"
        # Whatever it costs is to be measured.
        a2gen(folder, "export", "--run", run, "--out", str(out), "--dtype", dtype, "--max-auc-drop", "1")
        found.append(Export(dim, dtype, out, read_manifest(str(out))))
    return found


def check(exports: list[Export]) -> None:
    """Raise RuntimeError unless the exports differ in what they must, and exact tables cost nothing."""
    for each in exports:
        if each.dtype == "fp32" and (off := max(map(abs, each.lost().values()), default=0.0)) > 1e-6:
            raise RuntimeError(f"the AUC of an export in float32 at width {each.dim} is off by {off:.2g}")
        for file in ENTITY_TABLES.values():
            if each.manifest.files[file] != exports[0].manifest.files[file]:
                raise RuntimeError(f"exports of one dataset differ in {file}")


def report(exports: list[Export], settings: Settings) -> Report:
    """Tables, targets and figures of exports of one dataset."""
    exact = {each.dim: each.whole for each in exports if each.dtype == "fp32"}
    share = {(each.dim, each.dtype): 100 * each.whole / exact[each.dim] for each in exports}
    targets, figures = [], {f"{dtype}_{dim}_percent": percent for (dim, dtype), percent in share.items()}
    if (percent := share.get((DIM, "int8"))) is not None:
        claim = f"{settings.items:,} items: int8 export of width {DIM}, of the float32 one"
        targets.append(Goal(claim, f"at most {WANTED:g} %", f"{percent:.2f} %", percent <= WANTED))
    coded = [each for each in exports if each.dtype == "int8"]
    if lost := [value for each in coded for value in each.lost().values()]:
        worst = max(lost)
        targets.append(
            Goal("int8: AUC lost by an action, at most", f"{MOST_LOST:g}", f"{worst:.2g}", worst <= MOST_LOST)
        )
        figures["int8_auc_lost"] = worst
    catalogue, columns = _catalogue(exports[0], settings)
    return Report([_sizes(exports, share), catalogue, columns, *_costs(exports)], targets, figures)


def _sizes(exports: list[Export], share: Mapping[tuple[int, TableDtype], float]) -> ReportTable:
    names = list(exports[0].parts)
    rows: list[list[Cell]] = []
    for each in exports:
        sizes = [each.whole, *each.parts.values()]
        rows.append([each.dim, each.dtype, share[each.dim, each.dtype], *(size / MIB for size in sizes)])
    columns = ["width", "tables as", "% of fp32", "whole MiB", *(f"{name} MiB" for name in names)]
    note = "dense: all after the lookups, in float32; users, items: their names, and rows of what they are made of"
    return ReportTable("Exports", columns, rows, note)


def _catalogue(export: Export, settings: Settings) -> tuple[ReportTable, ReportTable]:
    """How much users and items there are, and what each takes beside its row of a table."""
    entries: list[list[Cell]] = []
    columns: list[list[Cell]] = []
    for level, simulated in (("item", settings.items), ("user", settings.users)):
        file = export.folder / ENTITY_TABLES[level]
        stored = pq.read_table(file, columns=[IDENTIFIERS[level]])
        known, size = pc.sum(pc.greater(stored[0], 0)).as_py(), file.stat().st_size
        entries.append([f"{level}s", simulated, len(stored), known, size / len(stored)])
        described = pq.read_metadata(file)
        for place, name in enumerate(described.schema.names):
            groups = [described.row_group(number).column(place) for number in range(described.num_row_groups)]
            columns.append([f"{level}s", name, sum(each.total_compressed_size for each in groups) / len(stored)])
    note = "with a row: those that training has seen, each of which has a row of the table of its own"
    names = ["", "simulated", "in the catalogue", "with a row", "bytes each"]
    return (
        ReportTable("Catalogue, the same in every export", names, entries, note),
        ReportTable("Its columns", ["", "column", "bytes each"], columns, "raw_duration_s: raw duration of the video"),
    )


def _costs(exports: list[Export]) -> list[ReportTable]:
    """Of each width, the AUC of every action and what of it each type of tables loses."""
    tables = []
    for dim in dict.fromkeys(each.dim for each in exports):
        own = [each for each in exports if each.dim == dim]
        rows: list[list[Cell]] = []
        for name, told in own[0].manifest.metrics["auc"].items():
            lost = [each.lost().get(name) for each in own]
            rows.append([name, told["positives"], told["original"], *lost])
        columns = ["action", "positives", "AUC of the run", *(f"lost by {each.dtype}" for each in own)]
        metrics = own[0].manifest.metrics
        note = f"– where fewer than {metrics['least']} positives or negatives tell nothing; below 0 where it gains"
        tables.append(ReportTable(f"Width {dim}: AUC of {metrics['targets']:,} targets", columns, rows, note))
    return tables


def tell(line: str) -> None:
    print(f"export_size: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
