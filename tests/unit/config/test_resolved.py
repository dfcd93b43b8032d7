"""The shipped configuration, loaded with the shipped components."""

import pytest

from longtrain.cluster.resolve import resolve
from longtrain.core.errors import Refused


def test_the_default_configuration_resolves() -> None:
    job = resolve([])
    assert str(job.config.run.name).startswith("hybrid_tiny-2k-")
    assert job.config.context_length == 2048
    assert list(job.config.mixer) == ["simple_gla", "softmax"]
    assert job.config.data.name == "python_stdlib"
    assert resolve([]).config == job.config


def test_every_shipped_mixer_resolves() -> None:
    pattern = "model.pattern=[softmax, sliding_window, simple_gla, gated_delta]"
    job = resolve([pattern, "model.num_layers=8", "context_length=1M", "sequence_parallel.size=8"])
    assert list(job.config.mixer) == ["softmax", "sliding_window", "simple_gla", "gated_delta"]


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
        ("cluster.workers=3", "cluster.workers=3 is not a multiple of sequence_parallel.size=2; use 2 or 4 workers"),
    ],
)
def test_mistakes_get_one_line(override: str, expected: str) -> None:
    with pytest.raises(Refused) as refused:
        resolve([override])
    assert str(refused.value).startswith(expected)
