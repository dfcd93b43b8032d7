"""Real configurations, from the YAML defaults that users get, and small stores with blocks of a few tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import longtrain_conf
from longtrain.core.registry import Registry
from longtrain.data.config import SourceConfig
from longtrain.data.manifest import Recipe
from longtrain.data.tokenization import ByteTokenizer
from longtrain.data.writer import StoreWriter

_CONF = Path(longtrain_conf.__file__).parent / "data"


def load_source(name: str, **overrides: Any) -> SourceConfig:
    """`data=<name> data.<key>=<value> ...`, validated as the command line does."""
    tree = OmegaConf.to_container(OmegaConf.load(_CONF / f"{name}.yaml"))
    tree |= {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    config = Registry().load("data.sources", name, ("Config",)).Config
    return TypeAdapter(config).validate_json(json.dumps(tree), strict=True)


def write_store(
    folder: Path, documents: Sequence[Sequence[int]], block_tokens: int = 8, blocks_per_shard: int = 3
) -> Path:
    """A store of documents given as token ids below 256."""
    folder.mkdir()
    writer = StoreWriter(folder, ByteTokenizer(), block_tokens=block_tokens, blocks_per_shard=blocks_per_shard)
    for number, document in enumerate(documents):
        writer.add(np.array(document, np.uint16), f"document {number}")
    writer.finish(Recipe("toy", {}, "bytes", "0" * 64, "1" * 64))
    return folder


def train_tokenizer(path: Path, special: Sequence[str]) -> Path:
    """A real byte-level BPE `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the other dog"] * 20, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(name="load_source", scope="session")
def _load_source() -> Callable[..., SourceConfig]:
    return load_source


@pytest.fixture(name="write_store", scope="session")
def _write_store() -> Callable[..., Path]:
    return write_store


@pytest.fixture(name="train_tokenizer", scope="session")
def _train_tokenizer() -> Callable[..., Path]:
    return train_tokenizer


@pytest.fixture
def registry() -> Registry:
    return Registry()
