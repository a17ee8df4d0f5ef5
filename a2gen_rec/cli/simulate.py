"""``a2gen simulate``: the log of a simulated world."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import new_parser, read_section
from a2gen_rec.config import SimulateConfig


def parser() -> ArgumentParser:
    command = new_parser("Write the log of a simulated short-video world whose true probabilities are known.")
    command.add_argument("--out", type=str, required=True, help="folder to write; must be new or empty")
    command.add_class_arguments(SimulateConfig)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.simulation.simulator import simulate

    summary = simulate(options.out, read_section(SimulateConfig, options), progress=True)
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in summary.rates.items())
    print(f"{summary.impressions:,} impressions of {summary.users:,} users on {summary.items:,} items in {options.out}")
    print(f"rates: {rates}")
