"""Dataclasses read from a stranger's JSON: every field is there, of its type, finite and printable."""

from __future__ import annotations

import json
import math
import types
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
}
_SHOWN = 80


def parse_json(content: str | bytes, file: str) -> Any:
    """Parse JSON as its standard has it, without NaN and infinity.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not know")


def read_dataclass(cls: type[T], values: Any, file: str) -> T:
    """Build a dataclass, and those inside it, from parsed JSON.

    Args:
        cls: Its annotations say what is read: dataclasses, `list[...]`, `dict[str, ...]`, `... | None`, `Any` (any
            JSON) and plain types. Its own `__post_init__` may refuse values with a ValueError.
        values: What the JSON holds.
        file: For messages.

    Raises:
        ValueError: A field is missing, unknown, or wrong; its place is named.
    """
    try:
        return _read(cls, values, "")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{file}: it is nested too deeply, or a number is too large.") from error


def _read(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _read(get_args(kind)[0], value, where)
    if is_dataclass(kind):
        return _read_object(kind, value, where)
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        return [_read(item, v, f"{where}[{i}]") for i, v in enumerate(_of_type(list, value, where))]
    if get_origin(kind) is dict:
        item = get_args(kind)[1]
        values = _of_type(dict, value, where).items()
        return {_read(str, key, where): _read(item, v, f"{where}.{key}") for key, v in values}
    if kind is Any:
        kind = {list: list[Any], dict: dict[str, Any]}.get(type(value), type(value))
        return value if value is None else _read(kind, value, where)
    if kind is float and type(value) is int:
        value = float(value)
    value = _of_type(kind, value, where)
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is not finite.")
    # Escape sequences and marks that turn the direction of writing have no business in a terminal or a card.
    if kind is str and not value.isprintable():
        raise ValueError(f"{where} holds characters that cannot be shown: {value[:_SHOWN]!r}.")
    return value


def _of_type(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise ValueError(f"{where or 'the whole'} is {shown}, but must be {_WORDS[kind]}.")
    return value


def _read_object(kind: type[T], value: Any, where: str) -> T:
    values, hints = _of_type(dict, value, where), get_type_hints(kind)
    dot = f"{where}." if where else ""
    for name in hints:
        if name not in values:
            raise ValueError(f"{dot}{name} is missing.")
    for name in values:
        if name not in hints:
            raise ValueError(f"{dot}{name[:_SHOWN]!r} is no field.")
    read = {name: _read(hint, values[name], f"{dot}{name}") for name, hint in hints.items()}
    try:
        return kind(**read)
    except (ValueError, TypeError) as error:
        raise ValueError(f"in {where or 'the whole'}, {error}") from error
