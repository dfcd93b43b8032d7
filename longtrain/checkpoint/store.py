"""Checkpoints of one run: `<run>/checkpoints/step-00000020/`, committed by one atomic rename.

A save writes a hidden folder: every rank its shard; then rank 0, when all shards are synced, the manifest; then the
folder is synced and gets its name. So a folder named `step-*` is complete, whatever was killed when. Tensors are whole
and carry canonical names, so that any number of ranks can load what any other number saved.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longtrain.checkpoint import ranks
from longtrain.checkpoint.commit import begin, checkpoints_in, commit, committed, retain, undo
from longtrain.checkpoint.failures import Failure, failure_of, refusal
from longtrain.checkpoint.manifest import FileEntry, Manifest, shard_name, tensor_entry
from longtrain.checkpoint.shard import partition, write_shard
from longtrain.checkpoint.verify import folder_name, inspect, read
from longtrain.comm.journal import Journal
from longtrain.core.errors import CorruptCheckpoint


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked."""

    path: Path
    step: int
    metadata: dict[str, Any]
    skipped: tuple[str, ...] = ()
    """One line for each newer checkpoint that is corrupt and was passed over."""


class CheckpointStore:
    """The checkpoints below one folder. Every method is a collective: all ranks call it, all get the same outcome.

    Ranks are those of the default process group, or this process alone. The folder is on a file system that all ranks
    share, and belongs to one writing job at a time. Rank 0 verifies and decides; the others receive its decision.
    """

    def __init__(self, directory: Path, keep: int, journal: Journal | None = None) -> None:
        """`directory` is `<run>/checkpoints`, made by the first save; the newest `keep` >= 1 checkpoints are kept.

        `journal` is that of the process, if it keeps one.
        """
        self.journal = journal or Journal()
        self.journal.add_group(ranks.GROUP)
        self._directory = directory
        self._keep = keep
        self._corrupt: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Path:
        """Commit a checkpoint and return its folder, once it is durable.

        `tensors` are the same on every rank; each rank writes a share of about equal bytes. `metadata` is a JSON
        object; rank 0's is stored. A step names a state: where a good checkpoint of this step exists, it is kept and
        nothing is written; a corrupt one is replaced.

        Raises Refused on all ranks where any rank cannot write (disk full, read-only, I/O error): nothing of this
        checkpoint stays, earlier ones are untouched, and a later save may succeed. Raises TypeError, ValueError or
        RuntimeError for what a checkpoint cannot hold and for tensors that differ between ranks.
        """
        target = self._directory / folder_name(step)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        name = ranks.decide(lambda: self._begin(target, sum(sizes.values())), self.journal)
        if name is None:
            return target
        temporary = self._directory / name
        shares = partition(sizes, ranks.world_size())
        own = {name: tensors[name] for name in shares[ranks.rank()]}
        error: Exception | None = None
        outcome: dict[str, Any] = {"layout": _layout_digest(step, tensors)}
        try:
            shard = temporary / shard_name(ranks.rank(), ranks.world_size())
            outcome["file"] = asdict(write_shard(shard, own, self.journal.tick))
        except Exception as caught:  # the other ranks wait for this one's outcome, whatever it is
            error = caught
            outcome["failure"] = asdict(failure_of(caught))
        outcomes = ranks.gather(outcome, self.journal)

        def manifest() -> Manifest:
            shards = [shard_name(rank, len(shares)) for rank in range(len(shares))]
            places = {name: shard for shard, share in zip(shards, shares, strict=True) for name in share}
            return Manifest(
                format="longtrain-checkpoint",
                version=1,
                step=step,
                world_size=len(shares),
                tensors={name: tensor_entry(tensor, places[name]) for name, tensor in tensors.items()},
                files={shard: FileEntry(**outcome["file"]) for shard, outcome in zip(shards, outcomes, strict=True)},
                metadata=dict(metadata),
            )

        try:
            ranks.decide(lambda: self._finish(target, temporary, outcomes, sum(sizes.values()), manifest), self.journal)
        except Exception as failed:
            if error is not None:
                raise failed from error
            raise
        return target

    def newest(self) -> Found | None:
        """The newest good checkpoint, None where there is no checkpoint at all.

        Raises CorruptCheckpoint where there are some and none is good, so that no run starts again from step 0.
        """
        answer = ranks.decide(self._find, self.journal)
        if answer is None:
            return None
        return Found(
            self._directory / folder_name(answer["step"]), answer["step"], answer["metadata"], tuple(answer["skipped"])
        )

    def at(self, path: Path) -> Found:
        """The checkpoint in any folder, of this run or another. Raises CorruptCheckpoint where it is not good."""

        def check() -> dict[str, Any]:
            manifest, problems = inspect(path, self.journal.tick)
            if manifest is None or problems:
                raise CorruptCheckpoint(f"checkpoint {path}: {_summary(problems)}; name another one")
            return {"step": manifest.step, "metadata": manifest.metadata}

        answer = ranks.decide(check, self.journal)
        return Found(path, answer["step"], answer["metadata"])

    def load(self, path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint whose names begin so, on the CPU, in the order in which `save` was given them.

        Every rank reads all shards and checks the bytes that it hands out. Raises CorruptCheckpoint on all ranks where
        one of them finds something wrong.
        """
        tensors: dict[str, torch.Tensor] = {}
        problem = None
        try:
            tensors = read(path, self.journal.tick, prefix)
        except CorruptCheckpoint as error:
            problem = str(error)
        found = [line for line in ranks.gather(problem, self.journal) if line is not None]
        if found:
            raise CorruptCheckpoint(found[0])
        return tensors

    def _begin(self, target: Path, needed: int) -> str | None:
        try:
            return begin(target)
        except OSError as error:
            raise self._refusal(0, failure_of(error), target, needed) from error

    def _finish(
        self,
        target: Path,
        temporary: Path,
        outcomes: list[dict[str, Any]],
        needed: int,
        manifest: Callable[[], Manifest],
    ) -> None:
        failures = [
            (rank, Failure(**outcome["failure"])) for rank, outcome in enumerate(outcomes) if "failure" in outcome
        ]
        try:
            odd = [rank for rank, outcome in enumerate(outcomes) if outcome["layout"] != outcomes[0]["layout"]]
            if odd and not failures:
                raise RuntimeError(f"checkpoint {target}: rank {odd[0]} has another step or tensors than rank 0")
            if not failures:
                commit(temporary, target, manifest())
        except OSError as error:
            failures = [(0, failure_of(error))]
        finally:
            undo(temporary)
        if failures:
            raise self._refusal(*failures[0], target, needed)
        retain(target, self._keep, self._corrupt - {target})
        self._corrupt.clear()

    def _refusal(self, rank: int, failure: Failure, target: Path, needed: int) -> Exception:
        try:
            good = [path for path in committed(self._directory) if path not in {target, *self._corrupt}]
        except OSError:
            good = []
        return refusal(rank, failure, target, needed, good[0] if good else None)

    def _find(self) -> dict[str, Any] | None:
        paths = checkpoints_in(self._directory)
        skipped: list[str] = []
        for path in paths:
            manifest, problems = inspect(path, self.journal.tick)
            if manifest is not None and not problems:
                return {"step": manifest.step, "metadata": manifest.metadata, "skipped": skipped}
            self._corrupt.add(path)
            skipped.append(f"checkpoint {path} is corrupt and was passed over: {_summary(problems)}")
        if paths:
            lines = ", ".join(line.replace(" is corrupt and was passed over", "") for line in skipped)
            raise CorruptCheckpoint(f"no usable checkpoint is left: {lines}; restore one, or choose another run.name")
        return None


def _layout_digest(step: int, tensors: Mapping[str, torch.Tensor]) -> str:
    layout = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps([step, layout]).encode()).hexdigest()


def _summary(problems: list[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
