"""Preferences and rollouts from real files: what is read and refused, packing, and windows by their definition."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.core.errors import CorruptData, Refused
from longtrain.core.labels import IGNORED_LABEL
from longtrain.data.examples import ExamplesWriter
from longtrain.data.packing import PackedCorpus, pack
from longtrain.data.prepare import open_corpus, prepare
from longtrain.data.source import Completion, Example
from longtrain.data.store import TokenStore
from longtrain.data.tokenization import ByteTokenizer
from longtrain.data.writer import StoreWriter

PAIR = {"prompt": "ask", "chosen": "good", "rejected": "bad!!"}
REFERENCES = {"reference_chosen": -2.5, "reference_rejected": -6.0}
ROLLOUT = {"prompt": "ask", "completion": [7, 8], "advantage": 0.5}
SAMPLED = {"prompt": "ask", "completion": [7, 8], "group": 0, "reward": 0.5}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    """Of many lengths, each with letters of its own."""
    letters = [chr(ord("a") + n % 26) for n in range(count)]
    return [
        {"prompt": c * (1 + n % 3), "chosen": c.upper() * (n * 7 % 11), "rejected": c.upper() * (n * 5 % 13)}
        for n, c in enumerate(letters)
    ]


def read_all(window) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    return *window.read(0, window.length), window.columns(0, window.length)


@pytest.fixture
def corpus_of(tmp_path, load_source, registry):
    def make(source: str, rows: list[dict[str, Any]], context: int, suffix: str = ".jsonl", seed: int = 0):
        path = write(tmp_path / f"rows{suffix}", rows)
        config = load_source(source, path=path, store=tmp_path / f"store-{suffix}")
        prepare(config, registry)
        return open_corpus(config, registry, seed, context)

    return make


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_pair_in_a_sequence(corpus_of, suffix):
    corpus = corpus_of("preference", [PAIR | REFERENCES], 20, suffix)
    assert set(corpus.columns) == {"example", "weight", "side", "reference_log_probs"}
    window = corpus.window(0, 20)
    tokens, labels, columns = read_all(window)
    end = 256
    chosen, rejected = [*b"askgood", end], [*b"askbad!!", end]
    assert tokens.tolist() == [*chosen, *rejected, *[end] * 3]
    assert window.starts.tolist() == [0, 8, 17]
    masked = [IGNORED_LABEL] * 2
    want = [*masked, *b"good", end, IGNORED_LABEL, *masked, *b"bad!!", end, *[IGNORED_LABEL] * 4]
    assert labels.tolist() == want
    labelled = labels != IGNORED_LABEL
    assert columns["weight"][labelled].tolist() == [1 / 11] * 11
    assert columns["side"][labelled].tolist() == [1.0] * 5 + [-1.0] * 6
    np.testing.assert_allclose(columns["reference_log_probs"][labelled], [-0.5] * 5 + [-1.0] * 6)
    assert not any(columns[name][~labelled].any() for name in ("weight", "side", "reference_log_probs"))
    assert window.num_examples == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_advantages_are_normalised_in_groups_and_ids_are_taken_as_they_are(corpus_of, suffix):
    log_probs = [[-0.25, -0.5], [-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]
    rows = [
        {"prompt": [1], "completion": [number, 9], "group": group, "reward": reward, "old_log_probs": old}
        for number, (group, reward, old) in enumerate(zip("xyxy", (1.0, 5.0, 0.0, 5.0), log_probs, strict=True))
    ]
    corpus = corpus_of("rollouts", rows, 16, suffix)
    _, labels, columns = read_all(corpus.window(0, 16))
    labelled = labels != IGNORED_LABEL
    assert labelled.sum() == 8, "nothing is added to token ids"
    found = {}
    for number in range(4):
        own = labelled & (columns["example"] == number)
        assert columns["weight"][own].sum() == 1
        first = int(labels[own][0])
        found[first] = (set(columns["advantage"][own]), columns["old_log_probs"][own].tolist())
    want = {n: ({advantage}, log_probs[n]) for n, advantage in enumerate((1.0, 0.0, -1.0, 0.0))}
    assert found == want


def test_every_example_once_an_epoch_whole_and_in_an_order_of_the_seed(corpus_of):
    rows = pairs(60)
    corpus = corpus_of("preference", rows, 64)
    sizes = {(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2) for r in rows}
    assert max(sizes) <= 64
    orders = []
    count = corpus.num_tokens // 64
    total = sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2 for r in rows)
    assert count <= 1.2 * total / 64, "packed closely"
    for epoch in range(2):
        seen = []
        for number in range(count):
            window = corpus.window((epoch * count + number) * 64, 64)
            tokens, _, _ = read_all(window)
            documents = np.split(tokens, window.starts[1:])
            texts = [bytes(t for t in document if t < 256).decode() for document in documents]
            texts = texts[: 2 * window.num_examples]
            seen += list(zip(texts[::2], texts[1::2], strict=True))
        assert sorted(seen) == sorted((r["prompt"] + r["chosen"], r["prompt"] + r["rejected"]) for r in rows)
        orders.append(seen)
    assert orders[0] != orders[1]
    again = corpus_of("preference", rows, 64, ".parquet")
    assert again.digest == corpus.digest
    late = (count + 3) * 64  # without what was before
    assert again.window(late, 64).read(0, 64)[0].tolist() == corpus.window(late, 64).read(0, 64)[0].tolist()


def test_slices_of_ranks_are_those_of_the_whole(corpus_of):
    rows = [row | REFERENCES for row in pairs(9)]
    window = corpus_of("preference", rows, 64).window(64, 64)
    tokens, labels, columns = read_all(window)
    for begin, end in ((0, 0), (0, 7), (7, 40), (40, 63), (63, 64), (64, 64)):
        part = window.read(begin, end)
        assert (part[0].tolist(), part[1].tolist()) == (tokens[begin:end].tolist(), labels[begin:end].tolist())
        for name, column in window.columns(begin, end).items():
            assert column.tolist() == columns[name][begin:end].tolist()


def test_equal_examples_have_equal_digests_however_they_are_batched(tmp_path):
    def content(name: str, prompts: list[str | list[int]], batch: int) -> str:
        (tmp_path / name).mkdir()
        documents = StoreWriter(tmp_path / name, ByteTokenizer())
        writer = ExamplesWriter(tmp_path / name, ByteTokenizer(), documents)
        examples = [
            Example((Completion(prompt, [7, 8], {"advantage": 0.5}, {}, {"old_log_probs": [-1.0, -2.0]}),), name, name)
            for prompt in prompts
        ]
        for first in range(0, len(examples), batch):
            writer.add(examples[first : first + batch])
        index = writer.finish()
        documents.close()
        assert index is not None
        return index.content

    texts = content("texts", ["a", "bc", "d"], 3)
    assert content("ids", [[97], [98, 99], [100]], 2) == texts
    assert content("others", ["a", "b", "cd"], 3) != texts


def test_packing_fits():
    lengths = np.array([5, 5, 5, 3, 3, 2, 10, 1])
    packed, offsets = pack(lengths, np.arange(8), 10)
    assert (packed.tolist(), offsets.tolist()) == ([0, 1, 2, 3, 5, 4, 7, 6], [0, 2, 5, 7, 8])


@given(lengths=st.lists(st.integers(3, 40), min_size=1, max_size=200), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_packing_is_into_the_first_of_the_last_sequences_with_room(lengths, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    want: list[list[int]] = []
    for example in order.tolist():
        room = (s for s in want[-16:] if sum(lengths[n] for n in s) + lengths[example] <= 40)
        sequence = next(room, None)
        if sequence is None:
            want.append(sequence := [])
        sequence.append(example)
    packed, offsets = pack(np.array(lengths), order, 40)
    assert [part.tolist() for part in np.split(packed, offsets[1:-1])] == want


@pytest.mark.parametrize(
    ("source", "row", "words"),
    [
        ("preference", {"prompt": "a", "chosen": "b"}, ["no field 'rejected'", "prompt, chosen"]),
        ("preference", PAIR | {"chosen": None}, ["field 'chosen' is null; give it a value or remove the row"]),
        ("preference", PAIR | {"chosen": 3}, ["'chosen' is 3, neither text nor a list of token ids"]),
        ("preference", PAIR | {"chosen": {"text": "x" * 99}}, ["""'chosen' is {"text": "xxx""", "x..., neither text"]),
        ("preference", PAIR | {"chosen": [1, 2.5]}, ["'chosen' holds 2.5, neither text"]),
        ("preference", PAIR | {"chosen": [1, 300]}, ["300 is no token id", "257"]),
        ("preference", PAIR | {"rejected": []}, ["the completion has no token"]),
        ("preference", PAIR | {"prompt": ""}, ["the prompt has no token"]),
        ("preference", PAIR | {"reference_chosen": -1.0}, ["no field 'reference_rejected'"]),
        ("preference", PAIR | REFERENCES | {"reference_chosen": 0.5}, ["'reference_chosen' is 0.5, ", "at most 0"]),
        ("preference", PAIR | REFERENCES | {"reference_chosen": float("nan")}, ["'reference_chosen'", "at most 0"]),
        (
            "preference",
            PAIR | REFERENCES,
            ["has the values side, reference_chosen and reference_rejected, but earlier rows have side;"],
        ),
        ("preference", PAIR | REFERENCES | {"reference_chosen": -1e300}, ["'reference_chosen'", "float32"]),
        ("rollouts", SAMPLED, ["no field 'advantage', only prompt, completion, group, reward;"]),
        ("rollouts", ROLLOUT | {"advantage": 1e39}, ["'advantage'", "no finite number of float32"]),
        ("rollouts", ROLLOUT | {"old_log_probs": [-1e300, -1.0]}, ["'old_log_probs'", "at most 0 and above -1000"]),
        (
            "rollouts",
            ROLLOUT | {"old_log_probs": [-1.0, -9999.0]},
            ["'old_log_probs' holds -9999.0, ", "as those of all sampled tokens"],
        ),
        ("rollouts", ROLLOUT | {"old_log_probs": -1.0}, ["'old_log_probs' is -1.0, no list of log-probabilities"]),
        ("rollouts", ROLLOUT | {"advantage": "high"}, ["""'advantage' is "high", no finite number"""]),
        ("rollouts", ROLLOUT | {"reward": 1}, ["has an 'advantage' and a 'reward'", "drop one of them"]),
        ("rollouts", ROLLOUT | {"advantage": 10**400}, ["'advantage'", "no finite number"]),
        ("rollouts", ROLLOUT | {"old_log_probs": [-1.0]}, ["the values advantage, old_log_probs"]),
    ],
)
def test_refused_rows_are_named(corpus_of, tmp_path, source, row, words):
    good = PAIR if source == "preference" else ROLLOUT
    with pytest.raises(Refused) as caught:
        corpus_of(source, [good, good, row], 64)
    message = str(caught.value)
    assert f"{tmp_path / 'rows.jsonl'}:3: " in message and "\n" not in message
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "group": 1}, ["no field 'reward', only prompt, completion, group;"]),
        (SAMPLED | {"reward": 1e308}, ["'reward'", "no finite number of float32"]),
        (SAMPLED | {"group": "g" * 100_000}, [f"group {'g' * 37}... is this completion alone in its file"]),
        (SAMPLED | {"prompt": [1]}, ["group 0 has another prompt here than at ", "rows.jsonl:1; "]),
        (ROLLOUT, ["has an 'advantage', but earlier rows have none"]),
        ({"prompt": "a", "x" * 100_000: 1}, [f"no field 'group', only prompt, {'x' * 37}...;"]),
    ],
)
def test_refused_rows_of_groups_are_named(corpus_of, tmp_path, row, words):
    with pytest.raises(Refused) as caught:
        corpus_of("rollouts", [SAMPLED, SAMPLED, row], 64)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:3: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_first_rollout_says_what_it_was_worth(corpus_of, suffix):
    with pytest.raises(Refused, match=r"only prompt, note; give 'advantage', or 'reward' and 'group'$"):
        corpus_of("rollouts", [{"prompt": "a", "note": "b"}], 64, suffix)


def test_rewards_that_differ_by_rounding_are_equal(corpus_of):
    rewards = {"a": [0.1, 0.1, 0.1], "b": [0.3, 0.3, 0.3, 0.1 + 0.2], "c": [0.0, 0.0], "d": [-1e6, -1e6 - 0.5]}
    rows = [
        {"prompt": [1], "completion": [2], "group": group, "reward": reward}
        for group, all_of_it in rewards.items()
        for reward in all_of_it
    ]
    _, _, columns = read_all(corpus_of("rollouts", rows, 64).window(0, 64))
    assert not columns["advantage"].any()


def test_groups_are_those_of_a_file(tmp_path, load_source, registry):
    """Rounds of sampling number their groups from 0."""
    folder = tmp_path / "rounds"
    folder.mkdir()
    for number, rewards in enumerate(((0, 1), (10, 20))):
        rows = [{"prompt": [number], "completion": [7], "group": 0, "reward": reward} for reward in rewards]
        write(folder / f"round{number}.jsonl", rows)
    config = load_source("rollouts", path=folder, store=tmp_path / "store")
    prepare(config, registry)
    _, labels, columns = read_all(open_corpus(config, registry, 0, 16).window(0, 16))
    assert sorted(columns["advantage"][labels != IGNORED_LABEL]) == [-1, -1, 1, 1]


@pytest.mark.parametrize("source", ["preference", "rollouts"])
def test_files_without_rows_are_refused(corpus_of, source):
    with pytest.raises(Refused, match=r"data\.path=/.*/rows\.jsonl: there are no rows; give one"):
        corpus_of(source, [], 64)


def test_an_unknown_total_is_refused(corpus_of):
    with pytest.raises(
        Refused,
        match=r"rows\.jsonl:1: -9999 in reference_chosen and reference_rejected is no log-probability of 5 tokens",
    ):
        corpus_of("preference", [PAIR | REFERENCES | {"reference_chosen": -9999.0}], 64)


@pytest.mark.parametrize("source", ["preference", "parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, load_source, registry, source):
    name = "text" if source == "parquet" else "prompt"
    table = pa.table([pa.array(["a"])] * 5, names=[name, "chosen", "rejected", name, "x"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(Refused, match=rf"rows\.parquet: 2 columns '{name}'; leave one of them"):
        prepare(load_source(source, path=tmp_path / "rows.parquet", store=tmp_path / "store"), registry)


@pytest.mark.parametrize(
    ("completion", "needed"),
    [("bc", "3 are needed; give one for each token of the completion and its end"), ([7], "1 are")],
)
def test_a_number_for_each_token(corpus_of, completion, needed):
    row = ROLLOUT | {"completion": completion, "old_log_probs": [-1.0, -1.0]}
    with pytest.raises(Refused, match=r"rows\.jsonl:1: 2 numbers in 'old_log_probs'") as caught:
        corpus_of("rollouts", [row], 64)
    assert needed in str(caught.value)


def test_rows_of_parquet_are_named(corpus_of, tmp_path):
    with pytest.raises(Refused, match=r"rows\.parquet: row 1: field 'chosen' is null;"):
        corpus_of("preference", [PAIR, PAIR | {"chosen": None}], 64, ".parquet")


def test_an_example_that_is_longer_than_the_context_is_refused(corpus_of):
    with pytest.raises(Refused, match=r"example rows\.jsonl:2 has 117 tokens, and none is cut; set context_length=117"):
        corpus_of("preference", [PAIR, PAIR | {"chosen": 100 * "x", "rejected": "x" * 9}], 64)


def test_files_of_other_formats_are_refused(tmp_path, load_source, registry):
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    with pytest.raises(Refused, match=r"rows\.csv is no \.jsonl or \.parquet file"):
        prepare(load_source("preference", path=tmp_path / "rows.csv"), registry)


def test_damage_is_found(corpus_of, tmp_path, load_source, registry):
    corpus = corpus_of("preference", pairs(20), 64)
    path = corpus.store.folder / "examples.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData, match=r"examples\.arrow: does not match its digest"):
        open_corpus(load_source("preference", store=corpus.store.folder), registry, 0, 64)
    os.truncate(path, len(data) - 8)
    with pytest.raises(CorruptData, match=r"examples\.arrow: has \d+ bytes"):
        open_corpus(load_source("preference", store=corpus.store.folder), registry, 0, 64)


def test_damaged_token_values_are_found_when_they_are_touched(corpus_of, monkeypatch):
    monkeypatch.setattr("longtrain.data.prepare._BATCH_ITEMS", 5)
    rows = [ROLLOUT | {"old_log_probs": [-number - 0.25, -number - 0.5]} for number in range(12)]
    folder = corpus_of("rollouts", rows, 12).store.folder
    path = folder / "token_values.arrow"
    good = path.read_bytes()

    def read() -> list[dict[str, list[float]]]:
        corpus = PackedCorpus(TokenStore(folder), 0, 12)
        windows = [corpus.window(position, 12) for position in range(0, corpus.num_tokens, 12)]
        return [{name: x.tolist() for name, x in window.columns(0, 12).items()} for window in windows]

    want = read()
    refused = 0
    for at in range(0, len(good), 9):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            assert read() == want
        except CorruptData as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(good) / 9 / 4, "Arrow pads, and flips of padding are harmless"

    path.write_bytes(good.replace(np.array([-8.25], "<f4").tobytes(), np.array([-8.5], "<f4").tobytes()))
    examples = TokenStore(folder).examples
    assert examples is not None and examples.token_values(7)["old_log_probs"].tolist() == [-7.25, -7.5]
    with pytest.raises(
        CorruptData, match=r"token_values\.arrow: row 3 of batch 1 does not match its checksum; delete "
    ):
        examples.token_values(8)
    os.truncate(path, len(good) - 8)
    with pytest.raises(CorruptData, match=r"token_values\.arrow: has \d+ bytes"):
        TokenStore(folder)
