"""``a2gen spec``: propose the YAML that describes a log."""

import shlex

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_duckdb_options, build_parser
from a2gen_rec.config import PrepareConfig
from a2gen_rec.errors import UserError


def parser() -> ArgumentParser:
    command = build_parser(
        "Propose the YAML that describes a log to `a2gen prepare generic`, with the reason of each line."
    )
    command.add_argument(
        "--raw", type=str, required=True, help="file or directory of the log, local or remote: CSV or Parquet"
    )
    command.add_argument("--out", type=str, default="", help="file to write; must not exist; default: standard output")
    add_duckdb_options(command)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.data.sources.proposal import propose_spec
    from a2gen_rec.utils import paths

    PrepareConfig(memory_limit_gb=args.memory_limit_gb, threads=args.threads)  # validates both
    if args.out and paths.exists(args.out):
        raise UserError(f"{args.out}: already exists")
    proposal = propose_spec(args.raw, args.memory_limit_gb, args.threads)
    if args.out:
        paths.write_text(args.out, proposal.text)
        print(f"spec: {args.out}")
    else:
        print(proposal.text, end="", flush=True)
    if proposal.missing:
        missing = " and ".join(proposal.missing)
        raise UserError(f"{args.raw}: no column was recognized as {missing}; replace TODO in {args.out or 'the spec'}")
    if args.out:
        command = ["a2gen", "prepare", "generic", "--raw", args.raw, "--spec", args.out, "--sample", "5"]
        print(f"next: check the spec, then run {shlex.join(command)}")
