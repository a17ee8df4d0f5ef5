"""``a2gen simulate``: write a simulated log."""

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, config_from_args
from a2gen_rec.config import SimulateConfig


def parser() -> ArgumentParser:
    command = build_parser("Write a simulated short-video log whose true probabilities are known.")
    command.add_argument("--out", type=str, required=True, help="output directory; must be new or empty")
    command.add_class_arguments(SimulateConfig)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.simulation.simulator import simulate

    summary = simulate(args.out, config_from_args(SimulateConfig, args), progress=True)
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in summary.rates.items())
    print(f"{summary.impressions:,} impressions of {summary.users:,} users on {summary.items:,} items in {args.out}")
    print(f"rates: {rates}")
    if summary.days:
        print(f"days: {len(summary.days)} folders, {summary.days[0]} to {summary.days[-1]}")
