"""Configuration fields that choose a component by name.

A chosen component's own `Config` dataclass validates the rest of the mapping, so a new component brings its own
typed options and no existing file knows them. The registry reaches the validators through pydantic's context.
"""

import json
from typing import Any

from pydantic import PlainValidator, TypeAdapter, ValidationInfo

from longtrain.core.registry import Registry


def component(kind: str) -> PlainValidator:
    """Annotate a field holding one component: a mapping with its `name` and the fields of its `Config`."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError("expected a mapping with the component's `name`")
        return _load(kind, value["name"], value, info)

    return PlainValidator(validate)


def components(kind: str) -> PlainValidator:
    """Annotate a field holding several components: a mapping from name to the fields of that one's `Config`."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected a mapping from component names to their options")
        return {name: _load(kind, name, options, info) for name, options in value.items()}

    return PlainValidator(validate)


def _load(kind: str, name: str, options: dict[str, Any], info: ValidationInfo) -> Any:
    registry = info.context
    assert isinstance(registry, Registry), "configurations are loaded with the registry as validation context"
    config_type = registry.load(kind, name, ("Config",)).Config
    return TypeAdapter(config_type).validate_json(json.dumps(options), strict=True, context=registry)
