"""``a2gen doctor``: check an installation."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, new_console


def parser() -> ArgumentParser:
    return build_parser("Check versions, the torch/fbgemm/torchrec match, devices and backends.")


def run(_: Namespace) -> int:
    from a2gen_rec.cli.doctor_checks import checks_table, has_failures, run_checks

    checks = run_checks()
    new_console().print(checks_table(checks))
    return int(has_failures(checks))
