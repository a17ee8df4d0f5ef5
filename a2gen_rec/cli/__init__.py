"""``a2gen``: the command line, one module per command.

Every command imports its dependencies when it runs, so that help appears immediately.
"""
