"""Log of the service: lines on stderr, which contain neither users nor items."""

import logging
import sys
import traceback

MAX_FRAMES = 6
"""Number of innermost traceback frames to log; outer ones belong to the framework."""


def configure_logging() -> None:
    """Configure the loggers of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("a2gen_rec.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level)


def format_location(error: Exception) -> str:
    """Return the traceback of an error without its message, which may contain parts of the request."""
    return "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]))
