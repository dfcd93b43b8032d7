"""Every source on real files: what it reads, in which order, and how it refuses what it cannot read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrain.core.errors import Refused
from longtrain.data.sources import jsonl, parquet, python_stdlib, text


def _refusal(function, config) -> str:
    with pytest.raises(Refused) as caught:
        list(function(config))
    message = str(caught.value)
    assert "\n" not in message
    return message


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


# --- python_stdlib


def test_python_stdlib_reads_the_library_without_tests_and_packages(load_source):
    documents = list(python_stdlib.documents(load_source("python_stdlib")))
    origins = [document.origin for document in documents]
    assert origins == sorted(origins)
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(origins)
    parts = {part for origin in origins for part in origin.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__"}
    assert sum(len(document.text) for document in documents) > 5_000_000
    decoder = next(document for document in documents if document.origin == "json/decoder.py")
    assert decoder.text == Path(json.decoder.__file__).read_text()


# --- text


def test_text_reads_a_document_per_file_in_order(tmp_path, load_source):
    _tree(tmp_path, {"b.txt": "B", "a/z.md": "Z", "a/y.txt": "Y", "c.bin": "C", ".hidden/x.txt": "X", ".h.txt": "H"})
    found = [(d.origin, d.text) for d in text.documents(load_source("text", path=tmp_path))]
    assert found == [("b.txt", "B"), ("a/y.txt", "Y"), ("a/z.md", "Z")]


def test_text_reads_one_file_of_any_suffix(tmp_path, load_source):
    _tree(tmp_path, {"novel.utf8": "Chapter 1"})
    assert [d.text for d in text.documents(load_source("text", path=tmp_path / "novel.utf8"))] == ["Chapter 1"]


def test_text_joins_a_document_per_directory(tmp_path, load_source):
    _tree(tmp_path, {"a/1.txt": "one\n", "a/2.txt": "two", "a/b/3.txt": "three", "0.txt": "top", "a/4.txt": ""})
    config = load_source("text", path=tmp_path, documents="directory")
    found = [(d.origin, d.text) for d in text.documents(config)]
    assert found == [("./", "top\n"), ("a/", "one\ntwo\n"), ("a/b/", "three\n")]


def test_text_suffixes_are_chosen(tmp_path, load_source):
    _tree(tmp_path, {"a.c": "int", "b.h": "extern", "c.txt": "prose"})
    chosen = [d.origin for d in text.documents(load_source("text", path=tmp_path, suffixes=[".c", ".h"]))]
    every = [d.origin for d in text.documents(load_source("text", path=tmp_path, suffixes=None))]
    assert (chosen, every) == (["a.c", "b.h"], ["a.c", "b.h", "c.txt"])


def test_text_passes_over_a_byte_order_mark_and_keeps_odd_names(tmp_path, load_source):
    (tmp_path / "a.txt").write_bytes("\ufeffgrüß".encode())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("odd")
    found = [(d.origin, d.text) for d in text.documents(load_source("text", path=tmp_path))]
    assert found == [("a.txt", "grüß"), ("\ufffd.txt", "odd")]


def test_text_does_not_follow_links_to_folders(tmp_path, load_source):
    _tree(tmp_path, {"a/1.txt": "one"})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert [d.origin for d in text.documents(load_source("text", path=tmp_path))] == ["a/1.txt"]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_path_that_is_not_set_missing_empty_or_special(source, tmp_path, load_source, registry):
    module = registry.load("data.sources", source)
    assert _refusal(module.documents, load_source(source)).startswith("data.path is not set; ")
    missing = _refusal(module.documents, load_source(source, path=tmp_path / "missing"))
    assert str(tmp_path / "missing") in missing and "does not exist" in missing
    assert str(tmp_path) in _refusal(module.inputs, load_source(source, path=tmp_path))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert "no file ending in" in _refusal(module.inputs, load_source(source, path=tmp_path))
    assert "neither a file nor a folder" in _refusal(module.inputs, load_source(source, path="/dev/null"))


def test_text_names_a_binary_file_and_the_offset(tmp_path, load_source):
    file = tmp_path / "a.txt"
    file.write_bytes(b"text then \0 nul")
    message = _refusal(text.documents, load_source("text", path=tmp_path))
    assert str(file) in message and "offset 10" in message
    file.write_bytes("grüß".encode("latin-1"))
    message = _refusal(text.documents, load_source("text", path=tmp_path))
    assert str(file) in message and "UTF-8 at byte offset 2" in message


def test_text_names_an_unreadable_file(tmp_path):
    """In a process without root's right to read everything."""
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    tmp_path.chmod(0o755)
    program = (
        "import os, pathlib\n"
        "from longtrain.core.errors import Refused\n"
        "from longtrain.data.source import read_text\n"
        "if os.getuid() == 0: os.chdir('/'); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: read_text(pathlib.Path(os.environ['FILE']))\n"
        "except Refused as error: print(error)\n"
    )
    environment = {**os.environ, "FILE": str(tmp_path / "a.txt"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert f"{tmp_path / 'a.txt'}: cannot be read (Permission denied)" in result.stdout, result.stderr


# --- jsonl


def test_jsonl_reads_an_object_a_line(tmp_path, load_source):
    (tmp_path / "b.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two\\nlines"}\r\n{"text": ""}')
    (tmp_path / "a.jsonl").write_text('{"text": "zero"}\n')
    found = [(d.origin, d.text) for d in jsonl.documents(load_source("jsonl", path=tmp_path))]
    assert found == [("a.jsonl:1", "zero"), ("b.jsonl:1", "one"), ("b.jsonl:3", "two\nlines"), ("b.jsonl:4", "")]


def test_jsonl_field_is_chosen(tmp_path, load_source):
    (tmp_path / "a.jsonl").write_text('{"content": "c"}\n')
    config = load_source("jsonl", path=tmp_path / "a.jsonl", text_field="content")
    assert [d.text for d in jsonl.documents(config)] == ["c"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"plain prose", "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"content": "x", "id": 3}', "no field 'text', only content, id; set data.text_field"),
        (b'{"text": 3}', "field 'text' is 3, not text"),
        (b'{"text": null}', "field 'text' is null, not text"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_jsonl_names_the_line(line, problem, tmp_path, load_source):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = _refusal(jsonl.documents, load_source("jsonl", path=file))
    assert f"{file}:2" in message and problem in message


def test_jsonl_names_the_offset_of_binary_data(tmp_path, load_source):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    message = _refusal(jsonl.documents, load_source("jsonl", path=file))
    assert str(file) in message and "byte offset 27" in message


# --- parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_reads_a_row_a_document(kind, tmp_path, load_source):
    texts = [f"row {i}" for i in range(200)]
    table = pa.table({"id": range(200), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    found = [(d.origin, d.text) for d in parquet.documents(load_source("parquet", path=tmp_path))]
    assert found == [(f"a.parquet:{i}", t) for i, t in enumerate(texts)]


def test_parquet_refuses_a_wrong_schema(tmp_path, load_source):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), file)
    message = _refusal(parquet.documents, load_source("parquet", path=file))
    assert str(file) in message and "no column 'text', only content, id; set data.text_field" in message
    message = _refusal(parquet.documents, load_source("parquet", path=file, text_field="id"))
    assert "column 'id' is int64, not text" in message
    pq.write_table(pa.table({"text": ["x", None]}), file)
    assert "row 1 has no 'text' (null)" in _refusal(parquet.documents, load_source("parquet", path=file))


def test_parquet_refuses_what_is_not_parquet(tmp_path, load_source):
    file = tmp_path / "a.parquet"
    file.write_text("prose, not Parquet")
    message = _refusal(parquet.documents, load_source("parquet", path=file))
    assert str(file) in message and "not a readable Parquet file" in message


def test_parquet_damage_is_never_read_silently_where_pages_have_checksums(tmp_path, load_source):
    file = tmp_path / "a.parquet"
    texts = [json.dumps({"i": i}) * 20 for i in range(300)]
    pq.write_table(pa.table({"text": texts}), file, write_page_checksum=True, compression="none", use_dictionary=False)
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert str(file) in _refusal(parquet.documents, load_source("parquet", path=file))
    for at in range(5, len(good), len(good) // 40):
        damaged = bytearray(good)
        damaged[at] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        try:
            assert [d.text for d in parquet.documents(load_source("parquet", path=file))] == texts
        except Refused as error:
            assert str(file) in str(error)
