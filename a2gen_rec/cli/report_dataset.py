"""``a2gen report dataset``: write a report of a dataset."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser


def parser() -> ArgumentParser:
    command = build_parser(
        "Write a report of the user behavior in a dataset, as HTML and Markdown with charts.",
        usage="a2gen report dataset DIR [--out DIR]",
    )
    command.add_argument("data", type=str, metavar="DIR", help="dataset directory")
    command.add_argument("--out", type=str, default="", help="output directory; default: DIR-report")
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.pages.dataset.page import write_dataset_report

    for line in write_dataset_report(args.data, args.out, progress=True):
        print(line)
