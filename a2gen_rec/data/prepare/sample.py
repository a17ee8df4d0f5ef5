"""Dry run of ``prepare``: a log's first impressions as they were read, and the counts of its rows."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.prepare import splits
from a2gen_rec.data.prepare.pipeline import PreparePipeline
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.sql import connect, fetch_one, read_parquet_sql, translate_errors
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class LogSample:
    """First impressions of a log.

    Attributes:
        info: metadata of the log.
        columns: roles of the columns.
        impressions: earliest clean impressions in the order of time, user and item: column -> value, as in
            ``prepare.staging``.
        kept: number of clean impressions.
        dropped: dropped rows by reason, duplicates included.
    """

    info: SourceInfo
    columns: StagedColumns
    impressions: list[dict[str, Any]]
    kept: int
    dropped: dict[str, int]


def sample_log(
    source_name: str,
    raw: str,
    config: PrepareConfig,
    num_impressions: int,
    spec: str | None = None,
    progress: bool = False,
) -> LogSample:
    """Read and clean a whole log as ``prepare`` does, in a temporary directory.

    Args:
        source_name: one of ``sources.SOURCE_NAMES``.
        raw: file or directory of the log, local or remote.
        config: limits and resources.
        num_impressions: maximum number of impressions to return.
        spec: YAML file that describes the columns, for the source ``generic``.
        progress: show a progress bar per phase.

    Raises:
        ConfigError: a setting or the spec is invalid.
        DataError: the log is invalid; with file, row, field and reason.
        UserError: the memory limit is exceeded.
    """
    if num_impressions < 1:
        raise ConfigError(f"sample {num_impressions} must be at least 1")
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    with translate_errors(raw):
        info = source.describe()
    columns = StagedColumns.from_source(info)
    rule = splits.resolve_split_rule(info, config)
    with tempfile.TemporaryDirectory(prefix="a2gen-sample-") as scratch, Progress(disable=not progress) as bars:
        directory = Path(scratch)
        connection = connect(config.memory_limit_gb, config.threads, directory / "spill")
        with connection, translate_errors(raw):
            pipeline = PreparePipeline(connection, source, info, columns, rule, config, directory, directory, bars)
            dropped = pipeline.stage_log()
            clean = read_parquet_sql(directory / "clean", pattern="*.parquet")
            (kept,) = fetch_one(connection, f"SELECT count(*) FROM {clean}")
            query = f"SELECT * FROM {clean} ORDER BY ts_ms, user_id, item_id LIMIT {num_impressions}"
            impressions = connection.sql(query).to_arrow_table().to_pylist()
    return LogSample(info, columns, impressions, int(kept), dropped)
