"""``a2gen report``: what an experiment found, or what is in a dataset, as a page."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, new_console
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = build_parser(
        "Write what an experiment found, or what users do in a dataset, as a page and as Markdown, with charts.",
        usage="a2gen report DIR [--out DIR] [--markdown FILE] | a2gen report --data DATA [--out DIR]",
    )
    command.add_argument("experiment", nargs="?", type=str, default="", help="folder of `a2gen experiment`")
    command.add_argument("--data", type=str, default="", help="folder of a dataset instead")
    command.add_argument(
        "--out", type=str, default="", help="folder of the report; by default the experiment's own, or DATA-report"
    )
    command.add_argument(
        "--markdown", type=str, default="", help="file for the Markdown, its charts in a folder beside"
    )
    command.add_argument("--resamples", type=int, default=1000, help="resamples of users, for intervals")
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    if bool(options.experiment) == bool(options.data):
        raise ConfigError("give the folder of an experiment, or --data and that of a dataset")
    if options.data and options.markdown:
        raise ConfigError("--markdown goes with an experiment; what is written of a dataset, Markdown too, is in --out")
    silence_known_warnings()
    if options.data:
        _data(options)
    else:
        _experiment(options)


def _data(options: Namespace) -> None:
    from a2gen_rec.reporting.pages.dataset.page import write_dataset_report

    for line in write_dataset_report(options.data, options.out, progress=True):
        print(line)


def _experiment(options: Namespace) -> None:
    from a2gen_rec.reporting.pages.experiment.page import write_experiment_report
    from a2gen_rec.reporting.pages.experiment.tables import summary_table

    console = new_console()
    with console.status("reading") as status:
        written = write_experiment_report(
            options.experiment, options.out, options.markdown, options.resamples, lambda line: status.update(line)
        )
    for comparison in written.comparisons:
        console.print(summary_table(comparison))
    charts = len(written.files) - 2
    for file in written.files[:2]:
        console.print(f"report: {file}", soft_wrap=True)
    console.print(f"{charts} {'chart' if charts == 1 else 'charts'} beside the Markdown", soft_wrap=True)
