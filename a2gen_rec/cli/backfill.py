"""``a2gen backfill``: load the latest impressions of a raw log into an event store."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_duckdb_options, build_parser
from a2gen_rec.config import ServeConfig
from a2gen_rec.config.data import SOURCE_NAMES


def parser() -> ArgumentParser:
    command = build_parser("Load each user's latest impressions from a raw log into an event store.")
    command.add_argument("source", type=Literal[SOURCE_NAMES], help="kind of raw log")
    command.add_argument("--raw", type=str, required=True, help="file or directory of the log, local or remote")
    command.add_argument("--model", type=str, required=True, help="exported model, as for `a2gen serve`")
    command.add_argument(
        "--event-store", type=str, default=ServeConfig.event_store, help="SQLite file, or redis://HOST:PORT/0"
    )
    command.add_argument(
        "--max-impressions", type=int, default=0, help="maximum number of impressions per user; 0: as the model reads"
    )
    command.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    add_duckdb_options(command)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.serving.backfill import backfill

    done = backfill(
        args.source,
        args.raw,
        args.model,
        args.event_store,
        args.max_impressions,
        args.memory_limit_gb,
        args.threads,
        args.spec,
        progress=True,
    )
    print(f"{args.event_store}: {done.impressions:,} impressions of {done.users:,} users")
