"""``a2gen serve``: serve an exported model over HTTP."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_config_file, build_parser, config_from_args, print_line
from a2gen_rec.config import ServeConfig


def parser() -> ArgumentParser:
    command = build_parser(
        "Serve an exported model over HTTP: rank candidates and record user events.",
        usage="a2gen serve --model MODEL [--config FILE] [--SETTING VALUE ...]",
    )
    add_config_file(command)
    command.add_argument(
        "--model",
        type=str,
        required=True,
        help="exported model directory, a symlink to one, or a directory whose CURRENT file names one; "
        "reloaded on SIGHUP",
    )
    command.add_class_arguments(ServeConfig)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.serving.http.server import serve

    serve(args.model, config_from_args(ServeConfig, args), print_line)
