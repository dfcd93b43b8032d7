"""Weights of a checkpoint alone: not its optimizer state, nor its data and where it was in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longtrain.checkpoint.commit import checkpoints_in
from longtrain.checkpoint.store import CheckpointStore
from longtrain.checkpoint.verify import read_metadata
from longtrain.core.errors import CorruptCheckpoint, Refused
from longtrain.data.corpus import Corpus
from longtrain.model.model import Model
from longtrain.training.config import TrainingConfig
from longtrain.training.resume import differences, model_identity


def check_weights(path: Path, key: str, config: TrainingConfig) -> None:
    """Refuse what `load_weights` would, so far as a glance tells, before workers start."""
    folder = path.expanduser()
    if not folder.is_dir():
        raise Refused(f"{key}={path} does not exist; give a checkpoint's folder")
    try:
        _check_model(read_metadata(folder), path, key, config)
    except CorruptCheckpoint as problem:
        places = [place for place in (folder / "checkpoints", folder) if place.is_dir()]
        near = next((path for place in places for path in checkpoints_in(place)), None)
        remedy = "name another one" if near is None else f"did you mean {near}?"
        raise Refused(f"{key}={path} is no good checkpoint ({problem}); {remedy}") from None


def load_weights(
    path: Path, key: str, model: Model, config: TrainingConfig, corpus: Corpus, store: CheckpointStore
) -> None:
    """Fill the parameters of `model` from a checkpoint of any run, which `config` names as `key`.

    A collective of all ranks. Raises CorruptCheckpoint where it is damaged, Refused where it is of another model.
    """
    folder = path.expanduser()
    metadata = store.at(folder).metadata
    _check_model(metadata, path, key, config)
    if metadata.get("tokenizer", corpus.tokenizer) != corpus.tokenizer:
        raise Refused(f"{key}={path} was trained with another tokenizer; set data.tokenizer to it, or give another one")
    saved = store.load(folder, prefix="model.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights = saved[f"model.{name}"]
            if weights.shape != parameter.shape:
                raise Refused(
                    f"{key}={path} has {name} {list(weights.shape)}, not {list(parameter.shape)}; "
                    "give one that was trained with this tokenizer"
                )
            parameter.copy_(weights)


def _check_model(metadata: Mapping[str, Any], path: Path, key: str, config: TrainingConfig) -> None:
    asked, trained = model_identity(config), metadata.get("identity", {})
    for part in ("model", "mixer"):  # what the layers are before what they are made of
        for setting, theirs, ours in differences(trained.get(part), asked[part], part):
            raise Refused(f"{key}={path} was trained with {setting}={theirs}, not {ours}; give one of this model")
