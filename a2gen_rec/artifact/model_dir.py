"""Resolution of the path of a served model to its directory."""

import os

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths

CURRENT_POINTER = "CURRENT"
"""File in a directory of models that contains the name of the one to serve."""


def resolve_model_dir(model: str) -> str:
    """Return the model directory of a path, following its ``CURRENT`` file and symlinks.

    Raises:
        UserError: ``CURRENT`` does not contain the name of a directory.
    """
    pointer = paths.join(model, CURRENT_POINTER)
    if paths.exists(pointer):
        name = paths.read_text(pointer).strip()
        if not name or "/" in name or name in (".", ".."):
            raise UserError(f"{pointer}: must contain the name of a directory next to it")
        model = paths.join(model, name)
    return os.path.realpath(model) if paths.is_local(model) else model
