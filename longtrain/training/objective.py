"""The objective of a run, and whether the data say what it needs to know."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.training.config import TrainingConfig

if TYPE_CHECKING:  # a mistyped key is answered without torch
    from longtrain.core.contracts import Objective

_OF_ALL_EXAMPLES = ("example", "weight")


def make_objective(config: TrainingConfig, registry: Registry) -> "Objective":
    """The one that the configuration names. Raises Refused for a plug-in that is none."""
    from longtrain.core.contracts import Objective

    name = config.objective.name
    kind = registry.load("objectives", name, ("Config", "Objective")).Objective
    if not issubclass(kind, Objective):
        raise Refused(f"objective={name}: its class Objective has to inherit from longtrain.core.contracts.Objective")
    if kind.__abstractmethods__:
        raise Refused(
            f"objective={name}: its class Objective has to define {', '.join(sorted(kind.__abstractmethods__))}"
        )
    made: Objective = kind(config.objective)
    return made


def check_objective(config: TrainingConfig, registry: Registry) -> None:
    """Raises Refused for an objective and a source of data that do not go together, naming those that do."""
    objective = make_objective(config, registry)
    needed = objective.columns
    name, source = f"objective={config.objective.name}", f"data={config.data.name}"
    always, sometimes = _columns(config.data.name, registry)
    missing = [column for column in needed if column not in (*always, *sometimes)]
    if missing:
        sources = [other for other in registry.names("data.sources") if _serves(_columns(other, registry), needed)]
        remedy = f"use data={' or '.join(sources)}" if sources else "no source has it"
        raise Refused(f"{name} needs the column '{missing[0]}', which {source} does not have; {remedy}")
    unread = [column for column in always if column not in needed and column not in _OF_ALL_EXAMPLES]
    if unread:
        raise Refused(f"{name} does not read the column '{unread[0]}' of {source}; choose an objective that does")


def check_columns(config: TrainingConfig, objective: "Objective", columns: Sequence[str], registry: Registry) -> None:
    """Raises Refused where the prepared data lack what may be left out but this objective needs."""
    missing = [column for column in objective.columns if column not in columns]
    if missing:
        fields = getattr(registry.load("data.sources", config.data.name), "FIELDS", {})
        remedy = objective.instead.get(missing[0], "choose another objective")
        raise Refused(
            f"objective={config.objective.name} needs {fields.get(missing[0], missing[0])}, which the rows of "
            f"data={config.data.name} do not give; add it to every row, or {remedy}"
        )


def check_data(config: TrainingConfig, registry: Registry) -> None:
    """Raises Refused where the prepared data cannot be trained on: an example is longer than the context, or lacks
    what the objective needs."""
    from longtrain.data.prepare import open_corpus  # it loads PyArrow, for which a mistyped key does not wait

    corpus = open_corpus(config.data, registry, config.seed, config.context_length)
    check_columns(config, make_objective(config, registry), corpus.columns, registry)


def _columns(source: str, registry: Registry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that a source always has, and those that its files may have; none where it gives plain documents."""
    module = registry.load("data.sources", source)
    if not hasattr(module, "examples"):
        return (), ()
    return (*_OF_ALL_EXAMPLES, *module.COLUMNS), module.OPTIONAL_COLUMNS


def _serves(columns: tuple[tuple[str, ...], tuple[str, ...]], needed: Sequence[str]) -> bool:
    always, sometimes = columns
    return set(needed) <= {*always, *sometimes} and {*always} <= {*needed, *_OF_ALL_EXAMPLES}
