"""``a2gen rank``: candidates ranked for one user."""

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec.cli.common import add_device, build_parser, new_console
from a2gen_rec.errors import ConfigError

if TYPE_CHECKING:
    from a2gen_rec.ranking.types import RankedList


def parser() -> ArgumentParser:
    command = build_parser("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    command.add_argument("--run", type=str, default="", help="run folder; its best checkpoint is used")
    command.add_argument(
        "--model", type=str, default="", help="or an exported model, as `a2gen serve` takes it; no past is in it"
    )
    command.add_argument("--user", type=str, required=True, help="raw user identifier, as in the log")
    command.add_argument(
        "--candidates", type=str, default="", help="file of raw item identifiers, one a line; default: popular ones"
    )
    command.add_argument(
        "--by",
        type=str,
        default="",
        help="ensemble, watch (time) or an outcome; default: the first there is. "
        "Of what less is better, as of glances and negative actions, the least likely come first",
    )
    command.add_argument("--explain", action="store_true", help="show what each candidate's ensemble score is made of")
    command.add_argument("--top", type=PositiveInt, default=10, help="rows shown")
    command.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    command.add_argument("--ensemble", type=str, default="", help="ensemble folder; by default the run's own, if any")
    add_device(command)
    return command


def run(options: Namespace) -> None:
    if options.explain and options.by not in ("", "ensemble"):
        raise ConfigError(f"--explain tells why the ensemble orders as it does: it does not go with --by {options.by}")
    if bool(options.run) == bool(options.model):
        raise ConfigError("give either --run or --model")
    if options.model and (options.data or options.ensemble or not options.candidates):
        raise ConfigError("--model needs --candidates, and goes with neither --data nor --ensemble")
    if options.model and options.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {options.device} does not go with --model: an exported model ranks on the CPU")
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.ensemble import explanation_tables
    from a2gen_rec.reporting.console.ranking import ranking_tables

    ranking = _rank_exported(options) if options.model else _rank_run(options)
    console = new_console()
    for table in [*ranking_tables(ranking), *(explanation_tables(ranking.candidates) if options.explain else [])]:
        console.print(table)


def _rank_run(options: Namespace) -> "RankedList":
    from a2gen_rec.runs.rank import rank_run

    by = options.by or ("ensemble" if options.explain else "")
    places = (options.candidates, by, options.top, options.data, options.device, options.ensemble)
    return rank_run(options.run, options.user, *places)


def _rank_exported(options: Namespace) -> "RankedList":
    from a2gen_rec.artifact.artifact import resolve_model_dir
    from a2gen_rec.ranking.ranker import Ranker
    from a2gen_rec.ranking.types import RankQuery
    from a2gen_rec.ranking.window import read_candidates

    names = read_candidates(options.candidates)
    by = options.by or ("ensemble" if options.explain else "")
    request = RankQuery(options.user, names, k=options.top, sort_by=by, explain=options.explain)
    return Ranker.load(resolve_model_dir(options.model)).rank(request)
