"""``a2gen rank``: candidates ranked for one user."""

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec.cli.common import add_device, new_console, new_parser
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = new_parser("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    command.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is used")
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
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.reporting.ensemble_tables import explanation_tables
    from a2gen_rec.reporting.tables import ranking_tables
    from a2gen_rec.training.ranking import rank

    ranking = rank(
        options.run,
        options.user,
        options.candidates,
        options.by or ("ensemble" if options.explain else ""),
        options.top,
        options.data,
        options.device,
        options.ensemble,
    )
    console = new_console()
    for table in [*ranking_tables(ranking), *(explanation_tables(ranking.candidates) if options.explain else [])]:
        console.print(table)
