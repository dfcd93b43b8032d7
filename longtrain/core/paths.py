"""Paths in configurations."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def _refuse_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty, which would be the current folder; name a path, or write . for that folder")
    return value


GivenPath = Annotated[Path, BeforeValidator(_refuse_empty)]
"""A path; not the empty one, which a shell's unset variable leaves."""
