"""``a2gen benchmark``: the checkout's measurements of speed."""

import argparse
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.errors import ConfigError


class BenchmarkParser(ArgumentParser):
    """Ends its help with the checkout's benchmarks, which are looked up only then."""

    def format_help(self) -> str:
        from a2gen_rec.launch import benchmark_scripts

        lines = [f"  {name}: {question}" for name, question in benchmark_scripts.list_benchmarks().items()]
        self.epilog = "\n".join(["benchmarks:", *lines]) if lines else None
        return str(super().format_help())


def parser() -> ArgumentParser:
    command = BenchmarkParser(
        description="Measure the speed of one part on this machine, or of all in turn.",
        usage="a2gen benchmark NAME [--quick] [--out DIR] [--device cpu|cuda] [-- OPTION ...]",
        exit_on_error=False,
    )
    command.add_argument("name", type=str, metavar="NAME", help="a benchmark, or `all`; its own options follow --")
    command.add_argument("--quick", action="store_true", help="smaller sizes; all take a few minutes")
    command.add_argument("--out", type=str, default="benchmark_results", help="folder of the results, as JSON")
    command.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to run")
    command.add_argument("--options", type=list[str], default=[], help=argparse.SUPPRESS)
    return command


def run(options: Namespace) -> int:
    from a2gen_rec.launch import benchmark_scripts

    if options.name != "all":
        return benchmark_scripts.run_benchmark(
            options.name, options.out, options.quick, options.device, options.options
        )
    if options.options:
        raise ConfigError(f"all: {options.options[0]} is an option of one benchmark; name that one")
    benchmark_scripts.run_all_benchmarks(options.out, options.quick, options.device)
    return 0
