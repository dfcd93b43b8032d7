"""A manifest made by an enemy, with a valid digest, is refused in one line, fast, and touches nothing outside."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtrain.checkpoint.manifest import MAX_MANIFEST_BYTES
from longtrain.checkpoint.verify import verify
from tests.unit.checkpoint.samples import store_with

SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    store_with(tmp_path, (20,))
    return tmp_path / "step-00000020"


def forge(checkpoint: Path, text: bytes) -> list[str]:
    (checkpoint / "manifest.json").write_bytes(text)
    (checkpoint / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    begin = time.process_time()  # what others do on the machine does not count
    problems = verify(checkpoint)
    assert time.process_time() - begin < 2, "a second or two on the slowest machine; usually milliseconds"
    assert all("\n" not in line and len(line) < 500 for line in problems)
    return problems


def changed(checkpoint: Path, *path: str, value: Any) -> bytes:
    """The manifest with one field set, or removed where `value` is None."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place.pop(path[-1], None)
    if value is not None:
        place[path[-1]] = value
    return json.dumps(content).encode()


BAD_NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "",
    "sub/" + SHARD,
    SHARD + "\n",
    "shard-00001-of-00001.safetensors",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_outside(checkpoint: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    assert "manifest.json" in forge(checkpoint, changed(checkpoint, "files", name, value=entry))[0]
    assert "manifest.json" in forge(checkpoint, changed(checkpoint, "files", value={name: entry}))[0]
    assert "manifest.json" in forge(checkpoint, changed(checkpoint, "tensors", "mask", "shard", value=name))[0]


FIELDS = [
    (("step",), -1),
    (("step",), "20"),
    (("step",), 2**70),
    (("step",), None),
    (("version",), 2),
    (("world_size",), 0),
    (("world_size",), 10**9),
    (("world_size",), 2),
    (("surprise",), 1),
    (("metadata",), []),
    (("files",), {}),
    (("files", SHARD, "bytes"), 10**15),
    (("files", SHARD, "sha256"), "0" * 64),
    (("files", SHARD, "sha256"), "zz"),
    (("tensors", "mask", "shape"), [10**15]),
    (("tensors", "mask", "shape"), [2**62, 2**62, 4]),
    (("tensors", "mask", "shape"), [-2]),
    (("tensors", "mask", "shape"), [True]),
    (("tensors", "mask", "shape"), [1] * 17),
    (("tensors", "mask", "dtype"), "object"),
    (("tensors", "mask", "dtype"), "U8"),
    (("tensors", "mask"), None),
    (("tensors", "x" * 10000), 3),
    (("tensors", "line\nbreak"), 3),
    (("tensors", "__metadata__"), {"shard": SHARD, "shape": [0], "dtype": "U8"}),
]


@pytest.mark.parametrize(("path", "value"), FIELDS, ids=[f"{'.'.join(p)[:40]!r}={str(v)[:20]}" for p, v in FIELDS])
def test_fields(checkpoint: Path, path: tuple[str, ...], value: Any) -> None:
    assert forge(checkpoint, changed(checkpoint, *path, value=value))


TEXTS = {
    "empty": b"",
    "null": b"null",
    "not-utf8": b"\xff\xfe",
    "deep-list": b'{"metadata":' + b"[" * 10**6,
    "deep-object": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "long-number": b'{"step":' + b"9" * 10**6 + b"}",
    "huge": b'{"step":"' + b"x" * MAX_MANIFEST_BYTES + b'"}',
    "many-keys": b"{" + b",".join(b'"k%d":0' % i for i in range(10**5)) + b"}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts(checkpoint: Path, text: bytes) -> None:
    assert forge(checkpoint, text)


def test_deep_metadata_in_an_otherwise_good_manifest(checkpoint: Path) -> None:
    text = changed(checkpoint, "metadata", value={"deep": "PLACE"}).replace(b'"PLACE"', b"[" * 5000 + b"]" * 5000)
    assert "recursion" in forge(checkpoint, text)[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = [("step",), ("world_size",), ("files",), ("tensors",), ("files", SHARD), ("files", SHARD, "bytes")]
PATHS += [("tensors", "mask"), ("tensors", "mask", "shape"), ("tensors", "mask", "dtype"), ("tensors", "mask", "shard")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=JSON)
def test_anything_anywhere(checkpoint: Path, path: tuple[str, ...], value: Any) -> None:
    original = (checkpoint / "manifest.json").read_bytes()
    same = value is not None and json.loads(original) == json.loads(changed(checkpoint, *path, value=value))
    assert same or forge(checkpoint, changed(checkpoint, *path, value=value))
    forge(checkpoint, original)
