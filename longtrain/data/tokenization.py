"""Tokenizers: raw bytes, or any Hugging Face fast-format `tokenizer.json`. Nothing here uses the network."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from longtrain.core.errors import Refused
from longtrain.core.registry import did_you_mean
from longtrain.data.config import SourceConfig

_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek spells it with these characters)
)
"""How published tokenizers spell the token that ends a document."""


class Tokenizer(Protocol):
    """Turns text into token ids in [0, vocab_size)."""

    name: str
    """As the configuration spells it."""
    vocab_size: int
    """One more than the largest id."""
    end_of_document: int
    """The id that is put behind every document."""
    fingerprint: str
    """Hexadecimal digest of everything that the ids depend on."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids for each text, uint16 where `vocab_size` allows it, else uint32; nothing is added to it.

        Raises Refused where the tokenizer has no id for a text.
        """
        ...


def load_tokenizer(config: SourceConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` and `data.end_of_document` choose.

    Raises Refused for a file that is missing or no `tokenizer.json`, and where the end-of-document token is not
    clear.
    """
    if config.tokenizer == "bytes":
        if config.end_of_document is not None:
            raise Refused(
                f"data.end_of_document={config.end_of_document} with data.tokenizer=bytes, which ends documents "
                "with an id of its own; set data.end_of_document=null"
            )
        return ByteTokenizer()
    return JsonTokenizer(config.tokenizer, config.end_of_document)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds all ids: little-endian uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b"longtrain bytes 257").hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype("<u2") for text in texts]


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`.

    Control tokens that a document spells out (`<|endoftext|>` in a page about tokenizers) are encoded as the plain
    text that they are, wherever the tokenizer's own vocabulary has another way to spell them.
    """

    def __init__(self, name: str, end_of_document: str | None) -> None:
        """Raises Refused as `load_tokenizer` does."""
        path = Path(name).expanduser()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Refused(
                f"data.tokenizer={name}: {error.strerror}; give `bytes` or the path of a tokenizer.json"
            ) from None
        try:
            self._fast = FastTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the package raises bare Exception
            reason = str(error).splitlines()[0]
            raise Refused(
                f"{path}: not a Hugging Face tokenizer.json ({reason}); convert it with its library"
            ) from None
        token = end_of_document if end_of_document is not None else self._detect(path)
        found = self._fast.token_to_id(token)
        if found is None:
            near = did_you_mean(token, self._special())
            raise Refused(f"data.end_of_document={token} is not a token of {path}{near}")
        # A tokenizer.json may carry the truncation and padding of some fine-tuning run.
        self._fast.no_truncation()
        self._fast.no_padding()
        # Marks the token as special where the file does not: text that spells it must not end a document.
        if any(added.content == token for added in self._fast.get_added_tokens_decoder().values()):
            self._fast.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        self._fast.encode_special_tokens = True
        self.name = name
        self.end_of_document = found
        # Ids may have holes, so that the number of tokens is not the bound.
        self.vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values())
        self.fingerprint = hashlib.sha256(data + b"\0" + token.encode("utf-8")).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the package raises bare Exception
            reason = str(error).splitlines()[0]
            raise Refused(f"data.tokenizer={self.name} cannot encode the text ({reason}); choose another") from None
        return [np.array(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]

    def _special(self) -> list[str]:
        return [added.content for added in self._fast.get_added_tokens_decoder().values() if added.special]

    def _detect(self, path: Path) -> str:
        added = {token.content for token in self._fast.get_added_tokens_decoder().values()}
        found = [token for token in _END_OF_DOCUMENT if token in added]
        if len(found) == 1:
            return found[0]
        if found:
            raise Refused(f"{path} has several tokens that end a document; set data.end_of_document to one of {found}")
        special = ", ".join(self._special()[:8]) or "none"
        raise Refused(
            f"{path} has no known end-of-document token; set data.end_of_document (special tokens: {special})"
        )
