"""``a2gen``: the command line. Every command imports what it needs when it runs, so that help comes at once."""

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec import __version__
from a2gen_rec.config import Config, EvaluateConfig, PlannedFeature, PrepareConfig, SimulateConfig, WorkloadConfig
from a2gen_rec.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.console import Console

Section = TypeVar("Section", SimulateConfig, PrepareConfig, EvaluateConfig)

SOURCES = ("kuairand", "jd", "rec_tmall", "tenrec", "simulated", "generic")


class Lines(DefaultHelpFormatter):
    """Help whose texts keep their lines. Subcommands take over the main parser's formatter."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        hang = ["    " if line.startswith(" ") else "" for line in lines]
        filled = [textwrap.fill(line, width, subsequent_indent=by) for line, by in zip(lines, hang, strict=True)]
        return textwrap.indent("\n".join(filled), indent)


class BenchmarkParser(ArgumentParser):
    """Ends its help with the checkout's benchmarks, which are looked up only then."""

    def format_help(self) -> str:
        from a2gen_rec import benchmarks

        lines = [f"  {name}: {question}" for name, question in benchmarks.questions().items()]
        self.epilog = "\n".join(["benchmarks:", *lines]) if lines else None
        return str(super().format_help())


@dataclass(frozen=True)
class Command:
    """A subcommand: its parser and what runs it."""

    parser: ArgumentParser
    run: Any


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0 when done, 1 for unusable input, 2 for unusable settings."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # Ranks of one job agree on their errors; the first one tells.
        if os.environ.get("RANK", "0") == "0":
            print(f"a2gen: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    sys.stdout.flush()
    if code:
        sys.exit(code)


def _run(argv: list[str]) -> int:
    parser, commands = _parser()
    try:
        options = parser.parse_args(_with_benchmark_options(_with_saved_config(argv)))
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(_one_line(error)) from error
    name = options.subcommand
    command = commands[name]
    try:
        settings = command.parser.instantiate(options[name])
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    return int(command.run(settings) or 0)


def _with_saved_config(argv: list[str]) -> list[str]:
    """Let `a2gen train --run DIR` go on with the run's own settings, and read a remote --config through iopath."""
    from a2gen_rec import paths

    if argv[:1] not in (["train"], ["plan"]):
        return argv
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    known.add_argument("--run")
    given, others = known.parse_known_args(argv[1:])
    run = ["--run", given.run] if given.run else []
    saved = paths.join(given.run, "config.yaml") if given.run else ""
    config = given.config or (saved if saved and paths.exists(saved) else "")
    return [argv[0], *(["--config", paths.local_copy(config)] if config else []), *run, *others]


def _with_benchmark_options(argv: list[str]) -> list[str]:
    """What follows ``--`` is the benchmark's; the parser would take it only right after the name."""
    if argv[:1] != ["benchmark"] or "--" not in argv:
        return argv
    end = argv.index("--")
    return [*argv[:end], "--options", json.dumps(argv[end + 1 :])]


def _parser() -> tuple[ArgumentParser, dict[str, Command]]:
    parser = ArgumentParser(
        prog="a2gen",
        description="Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables.",
        version=f"a2gen {__version__}",
        formatter_class=Lines,
        exit_on_error=False,
    )
    commands = {
        "simulate": Command(_simulate_parser(), _simulate),
        "prepare": Command(_prepare_parser(), _prepare),
        "train": Command(_train_parser(), _train),
        "evaluate": Command(_evaluate_parser(), _evaluate),
        "rank": Command(_rank_parser(), _rank),
        "plan": Command(_plan_parser(), _plan),
        "benchmark": Command(_benchmark_parser(), _benchmark),
        "doctor": Command(_new("Check versions, the torch/fbgemm/torchrec match, devices and backends."), _doctor),
    }
    subcommands = parser.add_subcommands(dest="subcommand", title="commands", metavar="COMMAND")
    for name, command in commands.items():
        subcommands.add_subcommand(name, command.parser, help=command.parser.description)
    return parser, commands


def _new(description: str, usage: str | None = None) -> ArgumentParser:
    return ArgumentParser(description=description, usage=usage, exit_on_error=False)


def _simulate_parser() -> ArgumentParser:
    parser = _new("Write the log of a simulated short-video world whose true probabilities are known.")
    parser.add_argument("--out", type=str, required=True, help="folder to write; must be new or empty")
    parser.add_class_arguments(SimulateConfig)
    return parser


def _prepare_parser() -> ArgumentParser:
    parser = _new("Turn a raw log into a dataset of user windows.")
    parser.add_argument("source", type=Literal[SOURCES], help=f"kind of raw log: {', '.join(SOURCES)}")
    parser.add_argument("--raw", type=str, required=True, help="the log's file or folder, local or remote")
    parser.add_argument("--out", type=str, required=True, help="dataset folder to write; must be new or empty")
    parser.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    parser.add_class_arguments(PrepareConfig)
    return parser


def _train_parser() -> ArgumentParser:
    parser = _new(
        "Train a model, or resume a run. Under torchrun or TorchX: on all their ranks together.",
        usage="a2gen train --run DIR [--config FILE] [--data DIR] [--SECTION.SETTING VALUE ...]",
    )
    parser.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    parser.add_argument("--data", type=str, default="", help="dataset folder from `a2gen prepare`")
    parser.add_argument("--run", type=str, required=True, help="run folder; one that exists is resumed")
    parser.add_argument("--plan", type=str, default="", help="sharding plan to follow, from `a2gen plan --save`")
    _add_sections(parser)
    return parser


def _add_sections(parser: ArgumentParser) -> None:
    for section in fields(Config):
        kind: Any = section.type
        parser.add_argument(f"--{section.name}", type=kind, default=kind())


def _evaluate_parser() -> ArgumentParser:
    parser = _new("Measure a run on one split, beside trivial references. Also under torchrun or TorchX.")
    parser.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is evaluated")
    parser.add_argument("--split", type=Literal["train", "valid", "test"], default="test", help="part to measure on")
    parser.add_argument("--json", type=str, default="", help="also write the result to this file")
    parser.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    _add_device(parser)
    parser.add_class_arguments(EvaluateConfig)
    return parser


def _rank_parser() -> ArgumentParser:
    parser = _new("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    parser.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is used")
    parser.add_argument("--user", type=str, required=True, help="raw user identifier, as in the log")
    parser.add_argument(
        "--candidates", type=str, default="", help="file of raw item identifiers, one a line; default: popular ones"
    )
    parser.add_argument("--by", type=str, default="", help="action or label to rank by; default: expected watch time")
    parser.add_argument("--top", type=PositiveInt, default=10, help="rows shown")
    parser.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    _add_device(parser)
    return parser


def _plan_parser() -> ArgumentParser:
    parser = _new(
        "Tell whether and how the embedding tables fit on a cluster. Needs neither the cluster nor a GPU.",
        usage="a2gen plan --config FILE --topology FILE [--data DIR] [--sweep ranks=8,16] [--html PAGE] [--save PLAN]\n"
        "       a2gen plan --config FILE [--data DIR] --compare A.yaml B.yaml",
    )
    parser.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    parser.add_argument("--data", type=str, default="", help="dataset folder; takes the place of `features`")
    parser.add_argument("--topology", type=str, default="", help="YAML of the cluster, as in configs/topologies/")
    parser.add_argument("--ranks", type=int, default=0, help="ranks on such hosts; 0 takes the topology's")
    parser.add_argument("--rows", type=dict[str, int], default={}, help="--rows.TABLE N: other number of rows")
    parser.add_argument("--sweep", type=str, default="", help="also plan for other numbers of ranks: ranks=8,16,32")
    parser.add_argument(
        "--compare",
        type=str,
        nargs=2,
        default=None,
        help="two topologies, or saved plans with --topology",
    )
    parser.add_argument("--json", type=str, default="", help="also write the report to this file")
    parser.add_argument("--html", type=str, default="", help="also write the report as a page to this file")
    parser.add_argument("--save", type=str, default="", help="write the plan for `a2gen train --plan` to this file")
    parser.add_argument(
        "--features", type=dict[str, PlannedFeature], default={}, help="tables, where there is no --data"
    )
    parser.add_argument("--workload", type=WorkloadConfig, default=WorkloadConfig())
    _add_sections(parser)
    return parser


def _benchmark_parser() -> ArgumentParser:
    parser = BenchmarkParser(
        description="Measure the speed of one part on this machine, or of all in turn.",
        usage="a2gen benchmark NAME [--quick] [--out DIR] [--device cpu|cuda] [-- OPTION ...]",
        exit_on_error=False,
    )
    parser.add_argument("name", type=str, metavar="NAME", help="a benchmark, or `all`; its own options follow --")
    parser.add_argument("--quick", action="store_true", help="smaller sizes; all take a few minutes")
    parser.add_argument("--out", type=str, default="benchmark_results", help="folder of the results, as JSON")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--options", type=list[str], default=[], help=argparse.SUPPRESS)
    return parser


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")


def _simulate(options: Namespace) -> None:
    from a2gen_rec.data.simulator import simulate

    summary = simulate(options.out, _section(SimulateConfig, options), progress=True)
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in summary.rates.items())
    print(f"{summary.impressions:,} impressions of {summary.users:,} users on {summary.items:,} items in {options.out}")
    print(f"rates: {rates}")


def _prepare(options: Namespace) -> None:
    from a2gen_rec.data.prepare import prepare
    from a2gen_rec.data.summary import summary_tables

    command = shlex.join(["a2gen", *sys.argv[1:]])
    config = _section(PrepareConfig, options)
    card = prepare(options.source, options.raw, options.out, config, options.spec, command, progress=True)
    console = _console()
    for table in summary_tables(card):
        console.print(table)
    console.print(f"dataset: {options.out}", soft_wrap=True)


def _train(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec import paths
    from a2gen_rec.training.trainer import train

    config = _config(options)
    if not options.data:
        raise ConfigError("--data is missing: the dataset folder from `a2gen prepare`")
    if options.plan:
        config.sharding.plan = paths.absolute(options.plan)
    train(config, options.data, options.run)


def _evaluate(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec import paths
    from a2gen_rec.reporting.tables import evaluation_tables
    from a2gen_rec.training.run import evaluate_run

    if options.json:
        paths.make_folder(paths.parent(options.json))
    config = _section(EvaluateConfig, options)
    result = evaluate_run(options.run, options.split, options.data, config, options.device)
    if not result:
        return
    console = _console()
    for table in evaluation_tables(result):
        console.print(table)
    console.print(f"run: {options.run}", soft_wrap=True)
    if options.json:
        paths.write_text(options.json, json.dumps(result, indent=1) + "\n")


def _rank(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.reporting.tables import ranking_table
    from a2gen_rec.serving.rank import rank

    ranking = rank(options.run, options.user, options.candidates, options.by, options.top, options.data, options.device)
    _console().print(ranking_table(ranking))


def _plan(options: Namespace) -> int:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec import paths
    from a2gen_rec.reporting import plan_page, plan_tables
    from a2gen_rec.sharding import questions
    from a2gen_rec.sharding.placement import Placement
    from a2gen_rec.sharding.planner import Problem

    config, console = _config(options), _console()
    alone = [name for name in ("ranks", "sweep", "html", "save") if options[name]]
    if options.compare and alone:
        raise ConfigError(f"--{alone[0]} is for one plan, --compare for two: give one of them")
    for file in filter(None, (options.json, options.html, options.save)):
        paths.make_folder(paths.parent(file))
    workload = questions.read_workload(options.data, options.features, options.workload, config, options.rows)
    if options.compare:
        a, b = (questions.report_of(file, workload, options.topology, config) for file in options.compare)
        plan_tables.show_comparison(console, a, b)
        result: dict[str, Any] = {"a": a.to_dict(), "b": b.to_dict()}
        fits = a.fits and b.fits
    else:
        problem = Problem(workload, questions.read_cluster(options.topology, options.ranks, config), config)
        clusters = questions.read_sweep(options.sweep, problem.cluster) if options.sweep else []
        report, found = questions.answer(problem)
        plan_tables.show(console, report)
        swept = questions.sweep(problem, clusters)
        if swept:
            plan_tables.show_sweep(console, swept)
        if options.html:
            paths.write_text(options.html, plan_page.render(report, swept))
        if options.save and found is not None:
            Placement.of(found, problem).save(options.save)
        result = {**report.to_dict(), "sweep": [each.to_dict() for each in swept]}
        fits = report.fits
    if options.json:
        paths.write_text(options.json, json.dumps(result, indent=1) + "\n")
    return int(not fits)


def _benchmark(options: Namespace) -> int:
    from a2gen_rec import benchmarks

    if options.name != "all":
        return benchmarks.run(options.name, options.out, options.quick, options.device, options.options)
    if options.options:
        raise ConfigError(f"all: {options.options[0]} is an option of one benchmark; name that one")
    benchmarks.run_all(options.out, options.quick, options.device)
    return 0


def _doctor(_: Namespace) -> int:
    from a2gen_rec.doctor import diagnose, failed, render

    findings = diagnose()
    _console().print(render(findings))
    return int(failed(findings))


def _console() -> "Console":
    """Where tables go: as wide as the terminal, or 100 columns in a file or pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def _config(options: Namespace) -> Config:
    return Config(**{field.name: options[field.name] for field in fields(Config)})


def _section(kind: type[Section], options: Namespace) -> Section:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def _one_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)


if __name__ == "__main__":
    main()
