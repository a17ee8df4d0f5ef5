"""``a2gen doctor``: what is wrong with an installation."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import new_console, new_parser


def parser() -> ArgumentParser:
    return new_parser("Check versions, the torch/fbgemm/torchrec match, devices and backends.")


def run(_: Namespace) -> int:
    from a2gen_rec.cli.doctor_checks import diagnose, failed, render

    findings = diagnose()
    new_console().print(render(findings))
    return int(failed(findings))
