"""What is wrong with a value, in the words of who sent it: JSON's for a body, and none of pydantic's or Python's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = "missing"
_DETAILS = {
    "missing": MISSING,
    "extra_forbidden": "unknown field",
    "model_type": "not an object",
    "dict_type": "not an object",
    "list_type": "not an array",
    "tuple_type": "not an array",
    "bool_type": "not true or false",
    "string_type": "not a string",
    "int_type": "not a whole number",
    "int_parsing": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "float_parsing": "not a number",
    "finite_number": "not a finite number",
    "timezone_aware": "a time without an offset",
}
_PREFIXES = ("Value error, ", "Assertion failed, ", "Input ")


def detail_of(item: Mapping[str, Any]) -> str:
    """One entry of ``ValidationError.errors()`` as a phrase, without a full stop."""
    known = _DETAILS.get(item["type"])
    if known is not None:
        return known
    text = str(item["msg"])
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    return text.rstrip(".")


def json_type(value: Any) -> str:
    """What JSON calls a value, with its article: "null", "a number", "an object"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, Mapping) else "an array"
