"""What is printed reads back, and the same settings are the same run."""

import dataclasses
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from longtrain.cluster.resolve import resolve
from longtrain.config.compose import compose
from longtrain.config.overrides import flatten
from longtrain.config.show import to_yaml

GOLDEN = Path(__file__).parents[2] / "golden" / "default_config.txt"

TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    [
        "null",
        "Yes",
        "1e6",
        "128k",
        "1_0",
        "0x1",
        "~",
        "a x3",
        "a: b",
        "# c",
        "1:30",
        "-",
        ".5",
        "=",
        "<<",
        ".inf",
        "2001-01-01",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
KEYS = st.text("abcxyz_", min_size=1, max_size=6) | st.sampled_from(["yes", "null", "on"])
TREES = st.recursive(SCALARS | st.lists(SCALARS, max_size=3), lambda child: st.dictionaries(KEYS, child, max_size=3))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_yaml_reads_back(tree: dict) -> None:
    text = to_yaml(tree)
    assert (yaml.safe_load(text) or {}) == tree
    annotated = to_yaml(tree, dict.fromkeys(flatten(tree), "somewhere"))
    assert (yaml.safe_load(annotated) or {}) == tree


def test_printed_default_reads_back_through_omegaconf() -> None:
    composed = compose([])
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(composed.tree, composed.origins))) == composed.tree


def test_origins_are_aligned_comments_and_lengths_keep_their_spelling() -> None:
    composed = compose(["context_length=128k"])
    lines = to_yaml(composed.tree, composed.origins).splitlines()
    comments = {line.index("  # ") for line in lines if "  # " in line}
    assert len(comments) == 1
    assert [line.split() for line in lines if line.startswith("context_length")] == [
        ["context_length:", "128k", "#", "command", "line"]
    ]


def test_the_default_configuration_is_the_golden_one() -> None:
    """A changed default shows in review: one leaf a line, as `compose([])` gives it."""
    lines = [f"{key}: {to_yaml({'v': value})[3:-1]}" for key, value in flatten(compose([]).tree).items()]
    assert lines == GOLDEN.read_text().splitlines()


def test_same_settings_are_the_same_run(toys: list[str]) -> None:
    job = resolve([*toys, "context_length=128k"])
    assert job.config.run.name is not None
    assert job.config.run.name.startswith("toy_model-128k-")
    assert job.tree["run"]["name"] == job.config.run.name
    assert job.origins["run.name"] == "derived from the settings"
    same = ["context_length=131072", "run.dir=elsewhere", "resume=never", "telemetry.wandb=offline"]
    same += ["cluster.max_failures=9", "checkpoint.keep=9"]
    assert resolve([*toys, *same]).config.run.name == job.config.run.name
    for other in ("steps=8", "mixer.toy.gate=sigmoid", "optimizer.learning_rate=1e-2"):
        assert resolve([*toys, "context_length=128k", other]).config.run.name != job.config.run.name


def test_a_given_name_is_kept(toys: list[str]) -> None:
    job = resolve([*toys, "run.name=mine"])
    assert job.config.run.name == "mine"
    assert job.origins["run.name"] == "command line"
    assert dataclasses.asdict(job.config)["run"]["name"] == "mine"
