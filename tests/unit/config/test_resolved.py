"""The shipped configuration, loaded with the shipped components."""

import dataclasses
import re
from pathlib import Path

import pytest

from longtrain.cluster.resolve import resolve
from longtrain.config.compose import MIXER_SETTINGS
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.model.config import MixerConfig


def test_the_default_configuration_resolves() -> None:
    job = resolve([])
    assert str(job.config.run.name).startswith("hybrid_tiny-2k-")
    assert job.config.context_length == 2048
    assert list(job.config.mixer.options) == ["simple_gla", "softmax"]
    assert job.config.data.name == "python_stdlib"
    assert resolve([]).config == job.config


def test_every_shipped_mixer_resolves() -> None:
    names = Registry().names("mixers")
    pattern = f"model.pattern=[{', '.join(names)}]"
    job = resolve([pattern, f"model.num_layers={len(names)}", "context_length=1M", "sequence_parallel.size=8"])
    assert list(job.config.mixer.options) == names


def test_heads_that_do_not_divide_are_refused_by_the_mixer_itself() -> None:
    with pytest.raises(Refused, match=r"^mixer\.softmax"):
        resolve(["mixer.softmax.num_heads=3"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mixer.softmax.head_dim=wide", "mixer.softmax.head_dim=wide: must be a valid integer"),
        ("+mixer.simple_gla.num_head=3", "mixer.simple_gla.num_head: unknown key; did you mean 'num_heads'?"),
        (
            "objective.name=next_tokens",
            "objective.name=next_tokens: there is no such file in objectives/; did you mean",
        ),
        ("sequence_parallel.attend=rings", "sequence_parallel.attend=rings: there is no such algorithm; did you mean"),
        (
            "sequence_parallel.attend=[ring]",
            "sequence_parallel.attend=[ring]: must be a valid string; write one: sequence_parallel.attend=ring",
        ),
        ("cluster.workers=3", "cluster.workers=3 is not a multiple of sequence_parallel.size=2; use 2 or 4 workers"),
        ("mixer.backend=cuda", "mixer.backend=cuda: must be 'auto', 'reference', 'chunked' or 'triton'"),
        ("mixer.bakend=triton", "mixer.bakend=triton: there is no key 'mixer.bakend'; did you mean 'mixer.backend'?"),
        ("~mixer.backend", "mixer.backend is missing; add it with +mixer.backend=VALUE"),
        ("model.pattern=[backend]", "model.pattern=[backend]: there is no mixer 'backend'"),
    ],
)
def test_mistakes_get_one_line(override: str, expected: str) -> None:
    with pytest.raises(Refused) as refused:
        resolve([override])
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("run.dir", []),
        ("initial_weights", []),
        ("data.store", []),
        ("objective.reference", ["objective=dpo", "data=preference"]),
        ("objective.reference", ["objective=grpo", "data=rollouts"]),
        *(("data.path", [f"data={source}"]) for source in ("text", "jsonl", "parquet")),
        ("data.path", ["objective=dpo", "data=preference"]),
        ("data.path", ["objective=grpo", "data=rollouts"]),
    ],
)
def test_an_empty_path_is_not_the_current_folder(key: str, words: list[str]) -> None:
    with pytest.raises(Refused, match=rf"^{re.escape(key)}=: is empty, .* name a path"):
        resolve([*words, f"{key}="])


@pytest.mark.parametrize(
    ("verb", "asked", "text", "problem"),
    [
        ("scan", "mine", "def scam(): ...\n", "defines no `scan`, which every one of sequence_parallel.scan needs"),
        ("attend", "mine", "def attend()\n", "cannot be imported: SyntaxError: expected ':' (mine.py, line 1)"),
        ("scan", "auto", "import missing\n", "cannot be imported: ModuleNotFoundError: No module named 'missing'"),
        ("attend", "auto", "", "defines no `attend`, which every one of sequence_parallel.attend needs"),
    ],
)
def test_a_broken_algorithm_is_refused_before_anything_starts(
    tmp_path: Path, verb: str, asked: str, text: str, problem: str
) -> None:
    file = tmp_path / "sequence_parallel" / verb / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(Refused) as refused:
        resolve([f"plugins=[{tmp_path}]", f"sequence_parallel.{verb}={asked}"])
    assert str(refused.value) == f"{file} {problem}"


@pytest.mark.parametrize("where", ["engine.device=cpu", "cluster.resources.GPU=0"])
def test_triton_without_gpus_is_refused_before_anything_starts(where: str) -> None:
    with pytest.raises(Refused, match=f"mixer.backend=triton runs on GPUs, but {where}; use mixer.backend=auto"):
        resolve(["mixer.backend=triton", where])
    assert resolve(["mixer.backend=chunked", where]).config.mixer.backend == "chunked"


def test_the_backend_of_mixers_is_one_choice_beside_their_options() -> None:
    """It stays beside the options in the tree, and is no part of what a run is: kernels can be changed midway."""
    job = resolve(["mixer.backend=reference"])
    assert job.config.mixer.backend == "reference"
    assert list(job.tree["mixer"]) == ["backend", "simple_gla", "softmax"]
    assert job.config.run.name == resolve([]).config.run.name
    assert {field.name for field in dataclasses.fields(MixerConfig)} == MIXER_SETTINGS | {"options"}
    assert not MIXER_SETTINGS & set(Registry().names("mixers"))


def test_a_plug_in_mixer_cannot_take_the_name_of_a_shared_setting(tmp_path: Path) -> None:
    (tmp_path / "conf" / "mixer").mkdir(parents=True)
    (tmp_path / "conf" / "mixer" / "backend.yaml").write_text("width: 3\n")
    with pytest.raises(Refused, match=r"backend\.yaml: mixer\.backend is a setting of all mixers.*rename the file"):
        resolve([f"plugins=[{tmp_path}]"])
