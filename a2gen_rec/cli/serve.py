"""``a2gen serve``: an exported model as a ranking service."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, config_from_args
from a2gen_rec.config import ServeConfig


def parser() -> ArgumentParser:
    command = build_parser(
        "Serve an exported model over HTTP: rank candidates, record what users did.",
        usage="a2gen serve --model MODEL [--config FILE] [--SETTING VALUE ...]",
    )
    command.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    command.add_argument(
        "--model",
        type=str,
        required=True,
        help="folder that `a2gen export` wrote, a link to one, or a folder whose file CURRENT names one in it; "
        "SIGHUP loads it again",
    )
    command.add_class_arguments(ServeConfig)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.serving.http.server import serve

    def tell(line: str) -> None:
        print(line, flush=True)

    serve(options.model, config_from_args(ServeConfig, options), tell)
