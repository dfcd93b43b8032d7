"""Whatever is typed, the answer is a configuration or one line."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtrain.cluster.resolve import resolve
from longtrain.core.errors import Refused

VALID = [
    "steps=10",
    "context_length=128k",
    "model.pattern=[toy x3, other]",
    "model=hybrid_tiny",
    "mixer.toy.num_heads=4",
    "+mixer.toy.window=8k",
    "++cluster.resources={CPU: 2, GPU: 1}",
    "~checkpoint.keep",
    "cluster.workers=4",
    "optimizer.betas=[0.9,0.95]",
    "optimizer.betas.0=0.5",
    "run.name='a name'",
    "run.dir=${resume}",
    "experiment=toys",
    "+mixer@spare=other",
    "objective.name=toy_objective",
    "data.path=text",
    "telemetry.wandb=offline",
    "checkpoint={keep: 1}",
]
PIECES = st.sampled_from(
    [
        *"=+~[]{}(),.:@/$'\"\\ x0-_?*\n\t\0é\udcff",
        "null",
        "true",
        "nan",
        "-inf",
        "1e400",
        "???",
        "${",
        "_target_",
        "a.b",
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid override with a few characters deleted, doubled, swapped or put in."""
    text = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            text = text[:at] + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + draw(PIECES) + text[at:]
        elif kind == 2:
            text = text[:at] + draw(PIECES) + text[at + 1 :]
        else:
            text = text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
    return text


@pytest.mark.usefixtures("compose_groups_once")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(mutated() | st.text(max_size=12), min_size=1, max_size=2))
def test_any_override_resolves_or_is_refused_in_one_line(toys: list[str], overrides: list[str]) -> None:
    try:
        job = resolve([*toys, *overrides])
    except Refused as refused:
        assert str(refused).isprintable()
    else:
        assert job.config.steps >= 1
