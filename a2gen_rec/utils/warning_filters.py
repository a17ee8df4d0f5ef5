"""Filters for messages of torch 2.13 and torchrec 1.8 that require no action from users.

Each filter matches one message text, so that new messages still appear. Call :func:`silence_known_warnings` before
importing torchrec.
"""

import logging
import warnings

# Category and start of each message (a regular expression), and why it requires no action.
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # torchrec's DistributedModelParallel passes the old name of a DistributedDataParallel option.
    (FutureWarning, r"`broadcast_buffers` is deprecated"),
    # torchrec's sharded state dicts are ShardedTensors by default.
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor"),
    # torchrec and fbgemm script some of their functions on import.
    (DeprecationWarning, r"`torch\.jit\.\w+` is deprecated"),
)

# torchrec asks torch whether it is being traced; torch logs an explanation on first use.
_LOGGER, _LOGGED = "torch.fx._symbolic_trace", "is_fx_tracing will return true for both"


def _is_unknown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)


def silence_known_warnings() -> None:
    """Filter the known messages in this process; repeated calls have no effect."""
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger(_LOGGER).addFilter(_is_unknown)
