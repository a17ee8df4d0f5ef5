"""The service's log: lines on stderr, which name neither users nor items."""

import logging
import sys
import traceback

MAX_FRAMES = 6
"""Of a traceback, the innermost: those before are the framework's."""


def configure_logging() -> None:
    """Have this process log there."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("a2gen_rec.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level)


def format_location(error: Exception) -> str:
    """Where in the code it was raised. Its message is left out: it may name whatever was asked for."""
    return "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]))
