"""``a2gen experiment``: models compared on datasets, by a suite."""

import shlex
import sys

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser
from a2gen_rec.errors import UserError


def parser() -> ArgumentParser:
    command = build_parser(
        "Compare models on datasets: tune them alike on validation, train with several seeds, test once at the end.",
        usage="a2gen experiment --suite FILE --out DIR [--raw DIR] [--jobs N]",
    )
    command.add_argument("--suite", type=str, required=True, help="YAML of datasets, models, seeds and tuning")
    command.add_argument("--out", type=str, required=True, help="folder of runs and results; one begun is gone on with")
    command.add_argument("--raw", type=str, default=".", help="folder that the suite's logs and datasets lie in")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.experiments.runner import RESULTS_FILE, Experiment
    from a2gen_rec.experiments.suite import read_suite

    def tell(line: str) -> None:
        print(line, flush=True)

    suite, command = read_suite(options.suite), shlex.join(["a2gen", *sys.argv[1:]])
    results = Experiment(suite, options.out, options.raw, options.jobs, tell, command=command).run()
    tell(f"results of {len(results['runs'])} runs: {options.out}/{RESULTS_FILE}")
    if results["runs"]:
        tell(f"as a page: {shlex.join(['a2gen', 'report', options.out])}")
    if failed := len(results["failed"]):
        raise UserError(f"{failed} {'run' if failed == 1 else 'runs'} failed, as told above; the same command retries")
