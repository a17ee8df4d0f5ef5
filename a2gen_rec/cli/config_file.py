"""Errors of ``--config`` files that name the file."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from a2gen_rec.cli.options import hyphenated
from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths

_KEY = re.compile(r"(?:unknown (?:setting|key) ')?(\w[\w.]*)")


def name_config_file(text: str, argv: Sequence[str]) -> str:
    """Return an error with the ``--config`` file in front whose content it is about.

    Args:
        text: Error of one line that starts with the key, such as ``train.epochs: must be an integer``.
        argv: Arguments of the command. Of files and an option that set the same key, the error has the value of one.
    """
    match = _KEY.match(text)
    key = match[1] if match else ""
    keys = [key, key.partition(".")[2]]  # range checks of commands without sections name one, as in ``serve.port``
    options = [f"--{hyphenated(key)}" for key in keys]
    is_overridden = any(hyphenated(word.partition("=")[0]) in options for word in argv)
    setting_key = []
    for file in _config_files(argv):
        if not paths.exists(file):
            return f"{file}: not found"
        try:
            settings = paths.read_yaml(file)
        except UserError as error:
            return str(error)
        if not isinstance(settings, Mapping):
            return f"{file}: must be a mapping of settings"
        values = [value for key in keys for value in _values(settings, key)]
        setting_key += [(file, any(_mentions(text, value) for value in values))] if values else []
    mentioned = [file for file, is_mentioned in setting_key if is_mentioned]
    files = mentioned or [file for file, _ in setting_key if not is_overridden]
    return f"{files[-1]}: {text}" if files else text


def _config_files(argv: Sequence[str]) -> list[str]:
    """Return the values of ``--config``, in order."""
    return [
        word.removeprefix("--config=") if word.startswith("--config=") else value
        for word, value in pairwise([*argv, ""])
        if word == "--config" or word.startswith("--config=")
    ]


def _values(settings: Any, key: str) -> list[Any]:
    """Return the value of a key of nested settings, such as ``train.epochs``; empty if the key is missing."""
    for name in key.split("."):
        if not isinstance(settings, Mapping) or name not in settings:
            return []
        settings = settings[name]
    return [settings]


def _mentions(text: str, value: Any) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(str(value))}(?![\w.])", text) is not None
