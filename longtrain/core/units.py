"""Units of lengths in configurations: `128k` and `1M` are 2^17 and 2^20 tokens; `1e6` is a plain number."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SUFFIXES = {"k": 2**10, "M": 2**20, "G": 2**30}
_EXPECTED = "expected a number of tokens such as 4096, 128k, 1M or 1e6"
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKMG]?)")


def parse_token_count(value: Any) -> Any:
    """Turn `"128k"`, `"1M"`, `"1e6"` or a whole float into an int; leave everything else for the type check.

    Raises ValueError where the quantity is not a whole number of tokens (`1.3k` is 1331.2).
    """
    if value is None or isinstance(value, list):
        raise ValueError(_EXPECTED)
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value.strip())
        if match is None:
            raise ValueError(_EXPECTED)
        number, suffix = match.groups()
        value = float(number) * _SUFFIXES.get("k" if suffix == "K" else suffix, 1)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value} is not a whole number of tokens")
        return int(value)
    return value


def format_token_count(count: int) -> str:
    """The shortest exact spelling: 131072 -> `128k`, 1048576 -> `1M`, 1000 -> `1000`."""
    for suffix, factor in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if count and count % factor == 0:
            return f"{count // factor}{suffix}"
    return str(count)


TokenCount = Annotated[
    int, BeforeValidator(parse_token_count), Field(gt=0, description="a number of tokens such as 4096, 128k or 1M")
]
"""A positive number of tokens; accepts the units above."""
