"""Completions that a policy sampled, with what they were worth: JSON Lines or Parquet files, a completion a row.

Fields: `prompt` and `completion`, each text or a list of token ids; `advantage`, or `reward` and `group` (text or a
whole number, the same for all completions of a prompt): an advantage is then (reward - mean) / standard deviation of
the group, over all files, and 0 where all its rewards are equal (Shao et al. 2024, section 4.1.2). In all rows or in
none, `old_log_probs` and `reference_log_probs`: a list with a number for each token of the completion, in nats, under
the policy that sampled it and under the reference model; one more for the end of document where the completion is text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.data.config import SourceConfig
from longtrain.data.records import Record, find_records, read_records
from longtrain.data.source import Completion, Example, InputFile

COLUMNS = ("advantage",)
OPTIONAL_COLUMNS = ("old_log_probs", "reference_log_probs")
_WORTH = ("advantage", "reward", "group")


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/rollouts.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Path | None
    """A file, or a folder whose `*.jsonl` and `*.parquet` files are read."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the completions come from, for the fingerprint of the store."""
    return find_records(config.path)


def examples(config: Config) -> Iterator[Example]:
    """The completions, in a fixed order. Raises Refused naming the row that cannot be used."""
    files = inputs(config)
    groups = _groups(read_records(files, _WORTH))
    for record in read_records(files, ("prompt", "completion", *_WORTH, *OPTIONAL_COLUMNS)):
        values = {"advantage": _advantage(record, groups)}
        token_values = {name: record.log_probs(name) for name in OPTIONAL_COLUMNS if name in record.values}
        completion = Completion(record.tokens("prompt"), record.tokens("completion"), values, {}, token_values)
        yield Example((completion,), record.place, record.origin)


def _groups(records: Iterator[Record]) -> dict[str | int, tuple[float, float]]:
    """Mean and standard deviation of the rewards of every group. Refuses groups of one, which compare with nothing."""
    rewards: dict[str | int, list[float]] = {}
    places = {}
    for record in records:
        if "advantage" not in record.values:
            group = record.key("group")
            rewards.setdefault(group, []).append(record.number("reward"))
            places[group] = record.place
    for group, values in rewards.items():
        if len(values) == 1:
            raise Refused(
                f"{places[group]}: group {group} is this completion alone; give it others or an advantage, or remove it"
            )
    return {group: (float(np.mean(values)), float(np.std(values))) for group, values in rewards.items()}


def _advantage(record: Record, groups: dict[str | int, tuple[float, float]]) -> float:
    if "advantage" in record.values:
        return record.number("advantage")
    mean, deviation = groups[record.key("group")]
    return (record.number("reward") - mean) / deviation if deviation else 0.0
