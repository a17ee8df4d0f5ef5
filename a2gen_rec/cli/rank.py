"""``a2gen rank``: rank candidates for one user."""

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec.cli.common import add_data, add_device, add_ensemble, add_run, build_parser, new_console
from a2gen_rec.errors import ConfigError

if TYPE_CHECKING:
    from a2gen_rec.ranking.types import RankedList


def parser() -> ArgumentParser:
    command = build_parser("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    add_run(command, "used", required=False)
    command.add_argument(
        "--model",
        type=str,
        default="",
        help="or an exported model, as for `a2gen serve`; it contains no user history",
    )
    command.add_argument("--user", type=str, required=True, help="raw user id, as in the log")
    command.add_argument(
        "--candidates", type=str, default="", help="file of raw item ids, one a line; default: popular items"
    )
    command.add_argument(
        "--sort-by",
        type=str,
        default="",
        help="sort key: ensemble, watch (expected watch time) or an outcome; default: the first available. "
        "Outcomes where lower is better (glance, negative actions) sort ascending",
    )
    command.add_argument("--explain", action="store_true", help="show the contributions to each ensemble score")
    command.add_argument("--k", type=PositiveInt, default=10, help="number of candidates to show")
    add_data(command)
    add_ensemble(command)
    add_device(command)
    return command


def run(args: Namespace) -> None:
    if args.explain and args.sort_by not in ("", "ensemble"):
        raise ConfigError(f"--explain requires --sort-by ensemble, not {args.sort_by}")
    if bool(args.run) == bool(args.model):
        raise ConfigError("exactly one of --run and --model is required")
    if args.model and (args.data or args.ensemble or not args.candidates):
        raise ConfigError("--model requires --candidates and cannot be combined with --data or --ensemble")
    if args.model and args.device not in ("auto", "cpu"):
        raise ConfigError(f"exported models run on CPU only; drop --device {args.device}")
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.ensemble import explanation_tables
    from a2gen_rec.reporting.console.ranking import ranking_tables

    sort_by = args.sort_by or ("ensemble" if args.explain else "")
    ranking = _rank_exported(args, sort_by) if args.model else _rank_run(args, sort_by)
    console = new_console()
    for table in [*ranking_tables(ranking), *(explanation_tables(ranking.candidates) if args.explain else [])]:
        console.print(table)


def _rank_run(args: Namespace, sort_by: str) -> "RankedList":
    from a2gen_rec.runs.rank import rank_run

    return rank_run(args.run, args.user, args.candidates, sort_by, args.k, args.data, args.device, args.ensemble)


def _rank_exported(args: Namespace, sort_by: str) -> "RankedList":
    from a2gen_rec.artifact.model_dir import resolve_model_dir
    from a2gen_rec.ranking.ranker import Ranker
    from a2gen_rec.ranking.types import RankQuery
    from a2gen_rec.ranking.window import read_candidates

    items = read_candidates(args.candidates)
    query = RankQuery(args.user, items, k=args.k, sort_by=sort_by, explain=args.explain)
    return Ranker.load(resolve_model_dir(args.model)).rank(query)
