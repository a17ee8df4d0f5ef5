"""``a2gen report``: a page of what there is to see."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import new_parser


def parser() -> ArgumentParser:
    command = new_parser("Write a page of a dataset: what users do inside videos, when, and in which order.")
    command.add_argument("--data", type=str, required=True, help="dataset folder")
    command.add_argument("--out", type=str, default="", help="folder to write to; DATA-report where not given")
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.reporting.data_page import report_data

    for line in report_data(options.data, options.out, progress=True):
        print(line)
