"""``a2gen report experiment``: write a report of an experiment's results."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, new_console


def parser() -> ArgumentParser:
    command = build_parser(
        "Write a report of an experiment's results, as HTML and Markdown with charts.",
        usage="a2gen report experiment DIR [--out DIR] [--markdown FILE] [--bootstrap-resamples N]",
    )
    command.add_argument("experiment", type=str, metavar="DIR", help="output directory of `a2gen experiment`")
    command.add_argument("--out", type=str, default="", help="output directory; default: DIR")
    command.add_argument(
        "--markdown", type=str, default="", help="path of the Markdown file; its charts go to a directory next to it"
    )
    command.add_argument(
        "--bootstrap-resamples", type=int, default=1000, help="number of bootstrap resamples of users, for intervals"
    )
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.pages.experiment.page import write_experiment_report
    from a2gen_rec.reporting.pages.experiment.tables import summary_table

    console = new_console()
    with console.status("reading") as status:
        written = write_experiment_report(
            args.experiment, args.out, args.markdown, args.bootstrap_resamples, lambda line: status.update(line)
        )
    for comparison in written.comparisons:
        console.print(summary_table(comparison))
    charts = len(written.files) - 2
    for file in written.files[:2]:
        console.print(f"report: {file}", soft_wrap=True)
    console.print(f"{charts} {'chart' if charts == 1 else 'charts'} next to the Markdown file", soft_wrap=True)
