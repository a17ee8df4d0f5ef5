"""``a2gen benchmark``: run the benchmarks of the source checkout."""

import argparse
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.options import CommandParser
from a2gen_rec.errors import ConfigError


class BenchmarkParser(CommandParser):
    """Parser whose help lists the checkout's benchmarks, which are looked up only then."""

    def format_help(self) -> str:
        from a2gen_rec.launch import benchmark_scripts

        lines = [f"  {name}: {question}" for name, question in benchmark_scripts.list_benchmarks().items()]
        self.epilog = "\n".join(["benchmarks:", *lines]) if lines else None
        return str(super().format_help())


def parser() -> ArgumentParser:
    command = BenchmarkParser(
        description="Measure the speed of one component on this machine, or of all in turn.",
        usage="a2gen benchmark NAME [--quick] [--out DIR] [--device cpu|cuda] [-- OPTION ...]",
        exit_on_error=False,
    )
    command.add_argument("name", type=str, metavar="NAME", help="benchmark, or `all`; its own options follow --")
    command.add_argument("--quick", action="store_true", help="use smaller sizes; all take a few minutes")
    command.add_argument("--out", type=str, default="benchmark_results", help="output directory of the JSON results")
    command.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="device to run on")
    command.add_argument("--options", type=list[str], default=[], help=argparse.SUPPRESS)
    return command


def run(args: Namespace) -> int:
    from a2gen_rec.launch import benchmark_scripts

    if args.name != "all":
        return benchmark_scripts.run_benchmark(args.name, args.out, args.quick, args.device, args.options)
    if args.options:
        raise ConfigError(f"all: {args.options[0]} is an option of one benchmark; name that benchmark")
    benchmark_scripts.run_all_benchmarks(args.out, args.quick, args.device)
    return 0
