"""Completions that a policy sampled, with what they were worth: JSON Lines or Parquet files, a completion a row.

Fields: `prompt` and `completion`, each text or a list of token ids; `advantage`, or instead `reward` and `group` (text
or a whole number, the same for all completions of a prompt in a file): an advantage is then (reward - mean) / standard
deviation of the group, and 0 where its rewards differ by rounding alone (Shao et al. 2024, section 4.1.2). In all rows
or in none, `old_log_probs` and `reference_log_probs`: a list with a number for each token of the completion, in nats,
under the policy that sampled it and under the reference model; one more for the end of document where the completion is
text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.core.paths import GivenPath
from longtrain.data.config import SourceConfig
from longtrain.data.records import Record, find_records, read_records, shown
from longtrain.data.source import Completion, Example, InputFile

COLUMNS = ("advantage",)
OPTIONAL_COLUMNS = ("old_log_probs", "reference_log_probs")
_WORTH = ("advantage", "reward", "group")
_ROUNDING = 1e-6
"""Of the largest reward: those of a group that differ by no more are equal."""


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/rollouts.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: GivenPath | None
    """A file, or a folder whose `*.jsonl` and `*.parquet` files are read."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the completions come from, for the fingerprint of the store."""
    return find_records(config.path)


def examples(config: Config) -> Iterator[Example]:
    """The completions, in a fixed order. Raises Refused naming the row that cannot be used."""
    files = inputs(config)
    first = next(read_records(files, _WORTH), None)
    if first is None:
        return
    given = first.has("advantage")
    if not given and not (first.has("reward") and first.has("group")):
        missing = "group" if first.has("reward") else "reward" if first.has("group") else "advantage"
        first.refuse_missing(missing, "give 'advantage', or 'reward' and 'group'")
    for file in files:
        groups = {} if given else _groups(file)
        for record in read_records([file], ("prompt", "completion", *_WORTH, *OPTIONAL_COLUMNS)):
            if record.has("advantage") and record.has("reward"):
                raise Refused(
                    f"{record.place}: has an 'advantage' and a 'reward', of which only one can count; drop one of them"
                )
            advantage = record.number("advantage") if given else _advantage(record, groups)
            token_values = {name: record.log_probs(name) for name in OPTIONAL_COLUMNS if record.has(name)}
            values = {"advantage": advantage}
            completion = Completion(record.tokens("prompt"), record.tokens("completion"), values, {}, token_values)
            yield Example((completion,), record.place, record.origin)


def _groups(file: InputFile) -> dict[str | int, tuple[float, float]]:
    """Mean and standard deviation of the rewards of every group; the latter is 0 where they differ by rounding alone.

    Refuses groups of one, which compare with nothing, and of several prompts.
    """
    rewards: dict[str | int, list[float]] = {}
    firsts: dict[str | int, tuple[str, bytes]] = {}
    for record in read_records([file], ("prompt", *_WORTH)):
        if record.has("advantage"):
            raise Refused(
                f"{record.place}: has an 'advantage', but earlier rows have none; give it in all rows or none"
            )
        group = record.key("group")
        prompt = hashlib.blake2b(repr(record.tokens("prompt")).encode(), digest_size=16).digest()
        place, expected = firsts.setdefault(group, (record.place, prompt))
        if prompt != expected:
            raise Refused(
                f"{record.place}: group {shown(group)} has another prompt here than at {place}; give every prompt of a "
                "file a group of its own"
            )
        rewards.setdefault(group, []).append(record.number("reward"))
    for group, values in rewards.items():
        if len(values) == 1:
            raise Refused(
                f"{firsts[group][0]}: group {shown(group)} is this completion alone in its file; give it others or an "
                "advantage, or remove it"
            )
    return {group: _statistics(np.array(values)) for group, values in rewards.items()}


def _statistics(rewards: np.ndarray) -> tuple[float, float]:
    equal = np.ptp(rewards) <= _ROUNDING * np.abs(rewards).max()
    return float(rewards.mean()), 0.0 if equal else float(rewards.std())


def _advantage(record: Record, groups: dict[str | int, tuple[float, float]]) -> float:
    mean, deviation = groups[record.key("group")]
    return (record.number("reward") - mean) / deviation if deviation else 0.0
