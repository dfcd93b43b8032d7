"""Pairs of completions of a prompt, of which one was preferred: JSON Lines or Parquet files, a pair a row.

Fields: `prompt`, `chosen`, `rejected`, each text or a list of token ids; and, in all rows or in none,
`reference_chosen` and `reference_rejected`: log-probabilities of the whole completions, in nats, under the reference
model, with that of the end of document where a completion is text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ConfigDict

from longtrain.core.paths import GivenPath
from longtrain.data.config import SourceConfig
from longtrain.data.records import Record, find_records, read_records
from longtrain.data.source import Completion, Example, InputFile

COLUMNS = ("side",)
FIELDS = {"reference_log_probs": "reference_chosen and reference_rejected"}
OPTIONAL_COLUMNS = ("reference_log_probs",)
_SIDES = {"chosen": 1.0, "rejected": -1.0}
_REFERENCES = {side: f"reference_{side}" for side in _SIDES}


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/preference.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: GivenPath | None
    """A file, or a folder whose `*.jsonl` and `*.parquet` files are read."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the pairs come from, for the fingerprint of the store."""
    return find_records(config.path)


def examples(config: Config) -> Iterator[Example]:
    """The pairs, in a fixed order. Raises Refused naming the row that cannot be used."""
    for record in read_records(inputs(config), ("prompt", *_SIDES, *_REFERENCES.values())):
        yield Example(tuple(_completion(record, side) for side in _SIDES), record.place, record.origin)


def _completion(record: Record, side: str) -> Completion:
    given = any(map(record.has, _REFERENCES.values()))
    totals = {"reference_log_probs": record.log_prob(_REFERENCES[side])} if given else {}
    return Completion(record.tokens("prompt"), record.tokens(side), {"side": _SIDES[side]}, totals)
