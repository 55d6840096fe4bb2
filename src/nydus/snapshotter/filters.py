"""containerd's filter language, as ``List`` receives it.

selectors := selector ("," selector)*          all must hold
selector  := fieldpath [operator value]        without operator: the field is present
fieldpath := field ("." field)*                a field is an identifier or a quoted string
operator  := "==" | "!=" | "~="                "~=" searches a regular expression
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from nydus.snapshotter.errors import InvalidArgument
from nydus.snapshotter.store import Snapshot

Predicate = Callable[[Snapshot], bool]

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_PATTERN = re.compile(r"/((?:[^/\\]|\\.)*)/|\|((?:[^|\\]|\\.)*)\|")
_VALUE = re.compile(r"[^,\s]*")
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)")
_SIMPLE = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
    '"': '"',
    "'": "'",
}


def compile_filters(filters: Iterable[str]) -> Predicate:
    """One predicate for a list of filter strings: any of them must hold; none, or an empty one, matches all.

    Raises:
        InvalidArgument: a string does not follow the grammar.
    """
    alternatives = [_parse(text) for text in filters]
    if not alternatives or any(not selectors for selectors in alternatives):
        return lambda snapshot: True
    return lambda snapshot: any(all(holds(snapshot) for holds in selectors) for selectors in alternatives)


def _parse(text: str) -> list[Predicate]:
    selectors: list[Predicate] = []
    position = 0
    if not text.strip():
        return selectors
    while True:
        path, position = _field_path(text, position)
        selector, position = _selector(path, text, position)
        selectors.append(selector)
        if position == len(text):
            return selectors
        if text[position] != ",":
            raise _syntax(text, position, '","')
        position += 1


def _field_path(text: str, position: int) -> tuple[list[str], int]:
    path: list[str] = []
    while True:
        if match := _FIELD.match(text, position):
            path.append(match[0])
        elif match := _QUOTED.match(text, position):
            path.append(_unquote(match[0]))
        else:
            raise _syntax(text, position, "a field name")
        position = match.end()
        if position == len(text) or text[position] != ".":
            return path, position
        position += 1


def _selector(path: list[str], text: str, position: int) -> tuple[Predicate, int]:
    operator = text[position : position + 2]
    if operator not in ("==", "!=", "~="):
        return lambda snapshot: _present(snapshot, path), position
    position += 2
    if match := _QUOTED.match(text, position):
        value = _unquote(match[0])
    elif operator == "~=" and (match := _PATTERN.match(text, position)):
        value = match[1] if match[1] is not None else match[2]
    elif match := _VALUE.match(text, position):
        value = match[0]
    assert match is not None
    if operator == "==":
        return lambda snapshot: _field(snapshot, path) == value, match.end()
    if operator == "!=":
        return lambda snapshot: _field(snapshot, path) != value, match.end()
    try:
        expression = re.compile(value)
    except re.error as error:
        raise InvalidArgument(f"filter {text!r}: bad regular expression: {error}: invalid argument") from None
    return lambda snapshot: expression.search(_field(snapshot, path) or "") is not None, match.end()


def _field(snapshot: Snapshot, path: list[str]) -> str | None:
    match path:
        case ["name"]:
            return snapshot.name
        case ["parent"]:
            return snapshot.parent
        case ["kind"]:
            return snapshot.kind.name.lower()
        case ["labels", *rest] if rest:
            return snapshot.labels.get(".".join(rest))
    return None


def _present(snapshot: Snapshot, path: list[str]) -> bool:
    value = _field(snapshot, path)
    return value is not None and (value != "" or path[0] == "labels")


def _unquote(literal: str) -> str:
    def replace(match: re.Match[str]) -> str:
        code = match[0][1:]
        if code in _SIMPLE:
            return _SIMPLE[code]
        try:
            return chr(int(code[1:], 16)) if code[0] in "xuU" else chr(int(code, 8))
        except (ValueError, OverflowError):
            raise InvalidArgument(f"bad escape {match[0]} in {literal}: invalid argument") from None

    return _ESCAPE.sub(replace, literal[1:-1])


def _syntax(text: str, position: int, expected: str) -> InvalidArgument:
    found = repr(text[position]) if position < len(text) else "the end"
    return InvalidArgument(
        f"filter {text!r}: expected {expected}, found {found} at {position}: invalid argument"
    )
