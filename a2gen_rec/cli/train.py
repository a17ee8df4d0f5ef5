"""``a2gen train``: a training run, on one rank or all ranks of a job."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser
from a2gen_rec.config.parse import add_config_arguments, config_from_args
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = build_parser(
        "Train a model, or resume a run. Under torchrun or TorchX: on all their ranks together.",
        usage="a2gen train --run DIR [--config FILE] [--data DIR] [--SECTION.SETTING VALUE ...]",
    )
    command.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    command.add_argument("--data", type=str, default="", help="dataset folder from `a2gen prepare`")
    command.add_argument("--run", type=str, required=True, help="run folder; one that exists is resumed")
    command.add_argument("--plan", type=str, default="", help="sharding plan to follow, from `a2gen plan --save`")
    add_config_arguments(command)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.training.entrypoint import train
    from a2gen_rec.utils import paths

    config = config_from_args(options)
    if not options.data:
        raise ConfigError("--data is missing: the dataset folder from `a2gen prepare`")
    if options.plan:
        config.sharding.plan_file = paths.abspath(options.plan)
    train(config, options.data, options.run)
