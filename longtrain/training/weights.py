"""Weights of a checkpoint alone: not its optimizer state, nor its data and where it was in them."""

from pathlib import Path

import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.core.errors import Refused
from longtrain.model.model import Model
from longtrain.training.config import TrainingConfig
from longtrain.training.resume import differences, model_identity


def load_weights(path: Path, key: str, model: Model, config: TrainingConfig, store: CheckpointStore) -> None:
    """Fill the parameters of `model` from a checkpoint of any run, which `config` names as `key`.

    A collective of all ranks. Raises CorruptCheckpoint where it is damaged, Refused where it is of another model.
    """
    folder = path.expanduser()
    trained = store.at(folder).metadata["identity"]
    asked = model_identity(config)
    for setting, theirs, ours in differences({name: trained[name] for name in asked}, asked):
        raise Refused(f"{key}={path} was trained with {setting}={theirs}, not {ours}; give one of this model")
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
