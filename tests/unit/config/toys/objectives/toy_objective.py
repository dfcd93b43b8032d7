"""A component without options."""

from dataclasses import dataclass

from pydantic import ConfigDict


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str


class Objective:
    columns = ()

    def __init__(self, config: Config) -> None:
        self.config = config
