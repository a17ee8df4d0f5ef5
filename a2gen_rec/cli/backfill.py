"""``a2gen backfill``: a log's latest impressions into a service's store."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser
from a2gen_rec.cli.prepare import SOURCE_NAMES
from a2gen_rec.config import PrepareConfig, ServeConfig


def parser() -> ArgumentParser:
    command = build_parser("Record the latest impressions of a raw log's users in the store of a service.")
    command.add_argument("source", type=Literal[SOURCE_NAMES], help=f"kind of raw log: {', '.join(SOURCE_NAMES)}")
    command.add_argument("--raw", type=str, required=True, help="the log's file or folder, local or remote")
    command.add_argument("--model", type=str, required=True, help="exported model that is served, as of `a2gen serve`")
    command.add_argument(
        "--store", type=str, default=ServeConfig.event_store, help="a SQLite file, or redis://HOST:PORT/0"
    )
    command.add_argument("--last", type=int, default=0, help="impressions of a user; 0: as many as the model reads")
    command.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    command.add_argument(
        "--memory_gb", type=float, default=PrepareConfig.memory_limit_gb, help="bound on DuckDB's memory"
    )
    command.add_argument("--threads", type=int, default=PrepareConfig.threads, help="DuckDB's; 0 takes all cores")
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.serving.backfill import backfill

    done = backfill(
        options.source,
        options.raw,
        options.model,
        options.store,
        options.last,
        options.memory_gb,
        options.threads,
        options.spec,
        progress=True,
    )
    print(f"{options.store}: {done.impressions:,} impressions of {done.users:,} users")
