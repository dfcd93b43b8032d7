"""The byte tokenizer and real `tokenizer.json` files, trained here."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from longtrain.core.errors import Refused
from longtrain.data.tokenization import ByteTokenizer, load_tokenizer


@given(st.lists(st.text()))
def test_bytes_round_trip(texts):
    tokenizer = ByteTokenizer()
    encoded = tokenizer.encode(texts)
    assert [bytes(ids.astype(np.uint8)).decode() for ids in encoded] == texts
    assert all(ids.dtype == np.uint16 for ids in encoded)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_bytes_has_an_end_of_its_own(load_source):
    assert load_tokenizer(load_source("python_stdlib")).name == "bytes"
    with pytest.raises(Refused, match=r"set data\.end_of_document=null"):
        load_tokenizer(load_source("python_stdlib", end_of_document="</s>"))


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"])  # noqa: RUF001
def test_json_finds_its_end_of_document(end, tmp_path, load_source, train_tokenizer):
    path = train_tokenizer(tmp_path / "tokenizer.json", ["<pad>", end, "<|im_start|>"])
    tokenizer = load_tokenizer(load_source("python_stdlib", tokenizer=str(path)))
    assert tokenizer.end_of_document == 1
    reference = Tokenizer.from_file(str(path))
    assert tokenizer.vocab_size == reference.get_vocab_size()
    texts = ["the quick brown fox", "", "другой dog"]
    encoded = tokenizer.encode(texts)
    assert [ids.tolist() for ids in encoded] == [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert all(ids.dtype == np.uint16 for ids in encoded)


def test_text_that_spells_a_control_token_stays_text(tmp_path, load_source, train_tokenizer):
    path = train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>", "<|im_start|>"])
    tokenizer = load_tokenizer(load_source("python_stdlib", tokenizer=str(path)))
    [ids] = tokenizer.encode(["a <|endoftext|> b <|im_start|>"])
    assert not {0, 1} & set(ids.tolist())


def test_named_end_that_the_file_does_not_mark_as_special(tmp_path, load_source, train_tokenizer):
    path = train_tokenizer(tmp_path / "tokenizer.json", ["<pad>"])
    fast = Tokenizer.from_file(str(path))
    fast.add_tokens([AddedToken("<|done|>", special=False)])
    fast.save(str(path))
    tokenizer = load_tokenizer(load_source("python_stdlib", tokenizer=str(path), end_of_document="<|done|>"))
    assert tokenizer.end_of_document == fast.token_to_id("<|done|>")
    assert tokenizer.end_of_document not in tokenizer.encode(["a <|done|> b"])[0]


def test_end_of_document_that_is_not_clear(tmp_path, load_source, train_tokenizer):
    none = train_tokenizer(tmp_path / "none.json", ["<pad>", "<sep>"])
    with pytest.raises(Refused, match=r"set data\.end_of_document \(special tokens: <pad>, <sep>\)"):
        load_tokenizer(load_source("python_stdlib", tokenizer=str(none)))
    several = train_tokenizer(tmp_path / "several.json", ["</s>", "<|endoftext|>"])
    with pytest.raises(Refused, match=r"several tokens .* set data\.end_of_document to one of"):
        load_tokenizer(load_source("python_stdlib", tokenizer=str(several)))
    chosen = load_source("python_stdlib", tokenizer=str(several), end_of_document="</s>")
    other = load_source("python_stdlib", tokenizer=str(several), end_of_document="<|endoftext|>")
    assert (load_tokenizer(chosen).end_of_document, load_tokenizer(other).end_of_document) == (0, 1)
    assert load_tokenizer(chosen).fingerprint != load_tokenizer(other).fingerprint
    with pytest.raises(Refused, match="<eos> is not a token of"):
        load_tokenizer(load_source("python_stdlib", tokenizer=str(several), end_of_document="<eos>"))


def test_ids_with_holes_and_truncation_left_in_the_file(tmp_path, load_source):
    path = tmp_path / "tokenizer.json"
    fast = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "[UNK]": 5}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["</s>"])
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    fast.save(str(path))
    tokenizer = load_tokenizer(load_source("python_stdlib", tokenizer=str(path)))
    [ids] = tokenizer.encode(["a b zebra a"])
    assert (tokenizer.vocab_size, ids.dtype, ids.tolist()) == (70_001, np.uint32, [0, 70_000, 5, 0])


def test_a_text_that_cannot_be_encoded_is_refused(tmp_path, load_source):
    path = tmp_path / "tokenizer.json"
    fast = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    fast.add_special_tokens(["</s>"])
    fast.save(str(path))
    with pytest.raises(Refused, match="cannot encode"):
        load_tokenizer(load_source("python_stdlib", tokenizer=str(path))).encode(["zebra"])


@pytest.mark.parametrize("content", ["", "prose", "{}", json.dumps({"model": {"type": "Nonsense"}}), "\xff"])
def test_a_file_that_is_no_tokenizer(content, tmp_path, load_source):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(Refused, match=r"tokenizer\.json") as caught:
        load_tokenizer(load_source("python_stdlib", tokenizer=str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there(tmp_path, load_source):
    for name in ("byte", str(tmp_path / "tokenizer.json"), str(tmp_path)):
        with pytest.raises(Refused, match="give `bytes` or the path of a tokenizer"):
            load_tokenizer(load_source("python_stdlib", tokenizer=name))
