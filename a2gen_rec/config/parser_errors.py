"""Texts of the parser's errors in the words of the other messages."""

import re
from collections.abc import Callable

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
}

_LOCATION = re.compile(r"""Parser key "([^"]*)": |Problem with given class_path '[^']*': """)

_REASONS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"Expected a (?:typing\.)?Literal\[(.*?)\]\. Got value: (.*)"),
        lambda m: f"unknown value {m[2]!r}; choose one of {m[1].replace(chr(39), '')}",
    ),
    (
        re.compile(r"Expected a <class '(\w+)'>\. Got value: (.*)"),
        lambda m: f"must be {_KINDS.get(m[1], m[1])}, not {_quoted(m[2])}",
    ),
    (re.compile(r"Expected a dot import path string: (.*)"), lambda m: f"must be a mapping, not {_quoted(m[1])}"),
    (
        re.compile(r"Not of type \w+: (.*) does not conform to restriction v>0"),
        lambda m: f"must be positive, not {m[1]}",
    ),
    (re.compile(r"Group '(.*)' does not accept option '(.*)'"), lambda m: f"unknown setting '{m[1]}.{m[2]}'"),
    (re.compile(r"Subcommand '.*' does not accept option '(.*)'"), lambda m: f"unknown setting '{m[1]}'"),
    (re.compile(r"Option '(.*)' is not accepted"), lambda m: f"unknown key '{m[1]}'"),
    (re.compile(r"the following arguments are required: (.*)"), lambda m: f"required, but missing: {m[1]}"),
)


def parser_error_text(error: BaseException) -> str:
    """Return a parser's error in one line, such as ``train.epochs: must be an integer, not 'many'``.

    Messages of unknown form keep their text.
    """
    text = " ".join(line.strip(" -") for line in str(error).splitlines() if line.strip())
    names = []
    while match := _LOCATION.match(text):
        names += [match[1]] if match[1] else []
        text = text[match.end() :]
    for pattern, reason in _REASONS:
        if match := pattern.fullmatch(text):
            text = reason(match)
            break
    return ": ".join(filter(None, [".".join(names), text]))


def _quoted(value: str) -> str:
    return value if value[:1] in "[{" else repr(value)
