"""Silence the messages of torch 2.13 and torchrec 1.8 that ask nothing of our users.

Each is named by its own text, so a message that is new still shows. Call :func:`quiet` before importing torchrec.
"""

import logging
import warnings

# What it says (a regular expression at its beginning), and why no one needs to act on it.
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # torchrec's DistributedModelParallel passes the old name of a DistributedDataParallel option.
    (FutureWarning, r"`broadcast_buffers` is deprecated"),
    # torchrec's sharded state dicts are ShardedTensors by default.
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor"),
    # torchrec and fbgemm script some of their functions on import.
    (DeprecationWarning, r"`torch\.jit\.\w+` is deprecated"),
)

# torchrec asks torch whether it is being traced; torch explains on first use what the answer will mean.
_LOGGER, _LOGGED = "torch.fx._symbolic_trace", "is_fx_tracing will return true for both"


def _unknown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)


def silence_known_warnings() -> None:
    """Filter the known messages, in this process; calling it again changes nothing."""
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger(_LOGGER).addFilter(_unknown)
