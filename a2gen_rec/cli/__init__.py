"""``a2gen``: the command line, one module per command.

Every command imports what it needs when it runs, so that help comes at once.
"""

from a2gen_rec.cli.entry import main

__all__ = ["main"]
