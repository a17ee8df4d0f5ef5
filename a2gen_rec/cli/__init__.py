"""``a2gen``: the command line, one module per command.

Every command imports what it needs when it runs, so that help comes at once.
"""
