"""Type errors, wherever they are nested, are one line that starts with the dotted key."""

import copy
from typing import Any

import pytest

from longtrain.cluster.config import JobConfig, check_job
from longtrain.config.compose import compose
from longtrain.config.load import load_config
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.model.config import parse_pattern

pytestmark = pytest.mark.usefixtures("compose_groups_once")


def load(overrides: list[str]) -> JobConfig:
    composed = compose(overrides)
    registry = Registry(composed.plugins)
    config = load_config(JobConfig, composed.tree, registry)
    check_job(config, registry)
    return config


def refusal(overrides: list[str]) -> str:
    with pytest.raises(Refused) as refused:
        load(overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_components_and_lengths_are_loaded(toys: list[str]) -> None:
    config = load([*toys, "context_length=1M", "stream.logit_tokens=2k", "data.path=books"])
    assert (config.context_length, config.stream.logit_tokens) == (2**20, 2048)
    assert config.mixer.options["toy"].window == 2048
    assert config.mixer.options["toy"].num_heads == 8
    assert config.mixer.options["other"].scale == 1.0
    assert str(config.data.path) == "books"
    assert config.objective.name == "toy_objective"
    assert config.optimizer.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=2.5", "steps=2.5: must be a valid integer; write a whole number such as 8"),
        ("steps=1e3", "steps=1000.0: must be a valid integer; write steps=1000"),
        ("steps=ten", "steps=ten: must be a valid integer; write a whole number such as 8"),
        ("steps=true", "steps=true: must be a valid integer; write a whole number such as 8"),
        ("steps=null", "steps=null: must be a valid integer; write a whole number such as 8"),
        ("steps=0", "steps=0: must be greater than or equal to 1"),
        ("stream.block_layers=most", "stream.block_layers=most: must be a number of layers from 0, recurrent or all"),
        ("stream.block_layers=-1", "must be a number of layers from 0, recurrent or all"),
        ("seed=1" + "0" * 400, "must be less than"),
        ("model.width=-1", "model.width=-1: must be greater than or equal to 1"),
        ("model.tie_embeddings=1", "model.tie_embeddings=1: must be a valid boolean; write true or false"),
        ("run.name=5", "run.name=5: must be a valid string; put it in quotes, twice on a shell: run.name='\"text\"'"),
        ("run.name=[mine]", "run.name=[mine]: must be a valid string; write one: run.name=mine"),
        ("engine.device=[cpu,cuda]", "engine.device=[cpu, cuda]: must be 'auto', 'cpu' or 'cuda'; write one: engine"),
        ("run.name=../up", "run.name=../up: must match pattern"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast: must be a valid number; write a number"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf: must be finite"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: has too few items; give 2 or more"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas=[0.9, nan]: must be finite"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1=1.5: must be less than 1"),
        ("optimizer.betas=3", "optimizer.betas=3: must be a valid array; write a list: optimizer.betas=[a,b]"),
        ("telemetry.wandb=ofline", "telemetry.wandb=ofline: must be 'disabled', 'offline' or 'online'; did you mean"),
        ("engine.device=metal", "engine.device=metal: must be 'auto', 'cpu' or 'cuda'; use one of them"),
        ("checkpoint=5", "checkpoint=5: must be an object; set its keys one by one: checkpoint.name=value"),
        ("context_length=1.3k", "context_length=1.3k: 1331.2 is not a whole number of tokens"),
        ("context_length=null", "context_length=null: expected a number of tokens such as 4096, 128k, 1M or 1e6"),
        ("context_length=long", "context_length=long: expected a number of tokens such as 4096, 128k, 1M or 1e6"),
        ("context_length=0", "context_length=0: must be greater than 0"),
        ("~steps", "steps is missing; add it with +steps=VALUE"),
        ("~checkpoint.keep", "checkpoint.keep is missing; add it with +checkpoint.keep=VALUE"),
        ("+step=3", "step: unknown key; did you mean 'steps'?"),
        ("+model.widht=3", "model.widht: unknown key; did you mean 'width'?"),
        ("+mixer.toy.num_head=3", "mixer.toy.num_head: unknown key; did you mean 'num_heads'?"),
        ("mixer.toy=3", "mixer.toy=3: must be an object"),
        ("mixer.toy.num_heads=many", "mixer.toy.num_heads=many: must be a valid integer"),
        ("mixer.toy.num_heads=3", "mixer.toy: num_heads=3 is not a multiple of num_key_value_heads=2"),
        ("mixer.toy.gate=swich", "mixer.toy.gate=swich: must be 'sigmoid' or 'swish'; did you mean 'swish'?"),
        ("mixer.toy.window=1.1k", "mixer.toy.window=1.1k: 1126.4 is not a whole number of tokens"),
        ("~mixer.other.scale", "mixer.other.scale is missing"),
        ("objective.name=toy_objectiv", "objective.name=toy_objectiv: there is no such file in objectives/; did you"),
        ("objective.name=3", "objective: expected a mapping with the component's `name`"),
        ("cluster.failure_policy.name=no", "cluster.failure_policy.name=no: there is no such file in cluster/policies"),
        ("data.path=3", "data.path=3: must be a"),
        ("model.pattern=[toy x0]", "model.pattern: 'toy x0' is not a mixer; write NAME, or NAME x3"),
        ("model.pattern=[toy*3]", "there is no mixer 'toy*3'"),
        ("model.pattern=[]", "model.pattern=[]: names no mixer; write [NAME x3, NAME]"),
        ("model.num_layers=5", "model.num_layers=5 is not a multiple of the 4 layers of model.pattern=[toy x3, other]"),
        (
            "sequence_parallel.scan=toy_scam",
            "sequence_parallel.scan=toy_scam: there is no such algorithm; did you mean",
        ),
        ("cluster.workers=3", "cluster.workers=3 is not a multiple of sequence_parallel.size=2; use 2 or 4 workers"),
        ("cluster.workers=1", "cluster.workers=1 is not a multiple of sequence_parallel.size=2; use 2 or 4 workers"),
        ("micro_batch_size=3", "micro_batch_size=3 is more than the batch_size=2 sequences of a step; use 2 or fewer"),
        ("cluster.workers=6", "batch_size=2 is not a multiple of 3 data-parallel ranks (cluster.workers=6 / "),
    ],
)
def test_mistakes_get_one_line(toys: list[str], override: str, expected: str) -> None:
    assert expected in refusal([*toys, override])


def test_an_unknown_key_comes_first_and_the_rest_is_counted(toys: list[str]) -> None:
    message = refusal([*toys, "~steps", "+stesp=3", "seed=-1"])
    assert message == "stesp: unknown key; did you mean 'steps'? (and 2 more problems)"


def test_a_mixer_of_the_pattern_without_options_is_refused(toys: list[str]) -> None:
    composed = compose(toys)
    tree: dict[str, Any] = copy.deepcopy(composed.tree)
    del tree["mixer"]["other"]
    registry = Registry(composed.plugins)
    with pytest.raises(Refused, match=r"model.pattern=\[toy x3, other\]: mixer.other is missing; known: toy"):
        check_job(load_config(JobConfig, tree, registry), registry)


def test_parse_pattern() -> None:
    assert parse_pattern(("a x3", "b")) == ("a", "a", "a", "b")
    assert parse_pattern(["gated_delta", " softmax  x2 "]) == ("gated_delta", "softmax", "softmax")


@pytest.mark.parametrize("entry", ["", "a x0", "a x-1", "a 3", "a x3 x4", "3", "a x99999", "a\nb", "a x\uff13"])
def test_parse_pattern_refuses(entry: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_pattern((entry,))
    assert "\n" not in str(refused.value)


def test_checkpointing_is_of_whole_sequences() -> None:
    said = refusal(["stream.block_layers=0", "stream.chunk_tokens=64"])
    assert "chunk_tokens=64 does not go with block_layers=0" in said
    assert "use block_layers=1, a larger number, recurrent or all" in said
