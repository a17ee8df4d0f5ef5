"""``a2gen experiment``: compare models on datasets."""

import shlex
import sys

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, print_line
from a2gen_rec.errors import UserError


def parser() -> ArgumentParser:
    command = build_parser(
        "Compare models on datasets: tune them alike on validation, train with several seeds, test once at the end.",
        usage="a2gen experiment --suite FILE --out DIR [--raw DIR] [--jobs N]",
    )
    command.add_argument("--suite", type=str, required=True, help="YAML of datasets, models, seeds and tuning")
    command.add_argument("--out", type=str, required=True, help="output directory; an existing experiment is resumed")
    command.add_argument("--raw", type=str, default=".", help="directory of the suite's logs and datasets")
    command.add_argument("--jobs", type=int, default=1, help="number of concurrent runs, each on one thread")
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.experiments.runner import RESULTS_FILE, Experiment
    from a2gen_rec.experiments.suite import read_suite

    suite, command = read_suite(args.suite), shlex.join(["a2gen", *sys.argv[1:]])
    results = Experiment(suite, args.out, args.raw, args.jobs, print_line, command=command).run()
    print_line(f"results of {len(results['runs'])} runs: {args.out}/{RESULTS_FILE}")
    if results["runs"]:
        print_line(f"to write a report: {shlex.join(['a2gen', 'report', 'experiment', args.out])}")
    if failed := len(results["failed"]):
        runs = "run" if failed == 1 else "runs"
        raise UserError(f"{failed} {runs} failed (see above); rerun the same command to retry them")
