"""A second mixer, so that patterns can choose."""

from dataclasses import dataclass

from pydantic import ConfigDict


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = ConfigDict(extra="forbid")

    scale: float
