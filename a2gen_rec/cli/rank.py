"""``a2gen rank``: candidates ranked for one user."""

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec.cli.common import add_device, new_console, new_parser


def parser() -> ArgumentParser:
    command = new_parser("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    command.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is used")
    command.add_argument("--user", type=str, required=True, help="raw user identifier, as in the log")
    command.add_argument(
        "--candidates", type=str, default="", help="file of raw item identifiers, one a line; default: popular ones"
    )
    command.add_argument("--by", type=str, default="", help="action or label to rank by; default: expected watch time")
    command.add_argument("--top", type=PositiveInt, default=10, help="rows shown")
    command.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    add_device(command)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.reporting.tables import ranking_table
    from a2gen_rec.serving.rank import rank

    ranking = rank(options.run, options.user, options.candidates, options.by, options.top, options.data, options.device)
    new_console().print(ranking_table(ranking))
