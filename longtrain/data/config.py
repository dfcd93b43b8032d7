"""What every data source has in common."""

from dataclasses import dataclass

from pydantic import ConfigDict

from longtrain.core.paths import GivenPath


@dataclass(frozen=True)
class SourceConfig:
    """Base of every `data/sources/<name>.py` `Config`; that class adds its own fields (`path`, `text_field`)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    """The source: a module of `data/sources/`."""
    tokenizer: str
    """`bytes`, or the path of a Hugging Face `tokenizer.json`."""
    end_of_document: str | None
    """The token that ends every document; null finds it among the tokenizer's special tokens."""
    store: GivenPath | None
    """Folder of the prepared token store; null is a folder of the user's cache named after source and fingerprint."""
