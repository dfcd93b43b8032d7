"""A data source with an option of its own."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    tokenizer: str
    path: Path
