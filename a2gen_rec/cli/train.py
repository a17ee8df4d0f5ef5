"""``a2gen train``: train a model on one rank or on all ranks of a job."""

import shlex

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_config_file, build_parser, is_main_rank, print_line
from a2gen_rec.config import TrainConfig
from a2gen_rec.config.parse import add_config_arguments, config_from_args
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = build_parser(
        "Train a model, or resume a run. Under torchrun or TorchX, all ranks train together.",
        usage="a2gen train --run DIR [--data DIR] [--init-from RUN] [--config FILE] [--SECTION.SETTING X]",
    )
    add_config_file(command)
    command.add_argument("--data", type=str, default="", help="dataset directory from `a2gen prepare`")
    command.add_argument("--run", type=str, required=True, help="run directory; an existing run is resumed")
    command.add_argument(
        "--init-from",
        type=str,
        default="",
        help="earlier run to start from, for a later increment of its dataset: its settings unless --config is given, "
        "its best checkpoint, and one epoch unless --train.epochs is given",
    )
    command.add_argument("--plan", type=str, default="", help="sharding plan to apply, from `a2gen plan --save`")
    add_config_arguments(command)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.training.entrypoint import train
    from a2gen_rec.utils import paths

    config = config_from_args(args)
    if not args.data:
        raise ConfigError("--data is missing: the dataset directory from `a2gen prepare`")
    if args.plan:
        config.sharding.plan_file = paths.abspath(args.plan)
    if config.model.name == "gbdt":
        from a2gen_rec.gbdt.fit import train_gbdt

        if args.plan:
            raise ConfigError("--plan: model.name gbdt has no embedding tables")
        if args.init_from:
            raise ConfigError("--init-from: model.name gbdt has no parameters to start from")
        train_gbdt(config, args.data, args.run)
        return
    train(config, args.data, args.run, args.init_from)
    if is_main_rank() and (line := _next_step(args.run, config.train)):
        print_line(line)


def _next_step(run: str, config: TrainConfig) -> str:
    """Return the state of a run and the command that follows; empty without a checkpoint."""
    from a2gen_rec.training.checkpoint import TrainState, best
    from a2gen_rec.training.run_dir import RunDir
    from a2gen_rec.training.trainer import is_finished

    latest = RunDir(run).latest_checkpoint()
    if latest is None:
        return ""
    state = TrainState.read(latest)
    if not is_finished(state, config):
        return f"{run}: stopped at step {state.step}; to resume: {shlex.join(['a2gen', 'train', '--run', run])}"
    best_state = TrainState.read(best(run))
    step = best_state.step
    if not best_state.card["splits"]["test"]["targets"]:
        command = shlex.join(["a2gen", "train", "--init-from", run, "--data"])
        return f"{run}: best checkpoint is step {step}; to train on the next day: {command} DATA --run NEXT_RUN"
    return f"{run}: best checkpoint is step {step}; to evaluate: {shlex.join(['a2gen', 'evaluate', '--run', run])}"
