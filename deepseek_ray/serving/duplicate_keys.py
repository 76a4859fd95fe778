"""A name that stands twice in a JSON object: readers disagree on which value counts, so neither is taken.

The decoder keeps the last value and says nothing, and decoding with a look at each name costs as much as all other
checks of a body. But names and strings are what quotes stand around: a body of valid records has so many of them, and
a name too many shows in the count, which takes a quarter of a microsecond. Only then is the body read again.
"""

from __future__ import annotations

import json
from typing import Any

from deepseek_ray.errors import RequestError


def check_quotes(body: bytes, quotes: int) -> None:
    """Look for a name that stands twice if a body has more quotes than its names and strings need.

    Args:
        body: JSON.
        quotes: two for each name and each string that it was read as.

    Raises:
        RequestError: 400.
    """
    if body.count(b'"') > quotes:
        check_names(body)


def check_names(body: bytes) -> None:
    """Look for a name that stands twice.

    Raises:
        RequestError: 400.
    """
    json.loads(body, object_pairs_hook=_distinct, parse_int=str)  # an integer may be too long for int()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(
            f"The name {twice[:80]!r} stands twice in one object of the body.",
            status=400,
            kind="duplicate-key",
            field=twice[:80],
            fix="send each field once",
        )
    return known
