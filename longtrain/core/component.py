"""Configuration fields that choose a component by name.

A chosen component's own `Config` dataclass validates the rest of the mapping, so a new component brings its own
typed options and no existing file knows them. The registry reaches the validators through pydantic's context.
"""

import dataclasses
import json
from typing import Any

from pydantic import PlainValidator, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails

from longtrain.core.registry import Registry, did_you_mean


def component(kind: str) -> PlainValidator:
    """Annotate a field holding one component: a mapping with its `name` and the fields of its `Config`."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError("expected a mapping with the component's `name`")
        _refuse_unknown(kind, value["name"], "name", value["name"], _registry(info))
        return _load(kind, value["name"], value, _registry(info))

    return PlainValidator(validate)


def components(kind: str, section: type) -> PlainValidator:
    """Annotate a field holding several components, and settings that they share, in one mapping.

    `section` is a dataclass whose field `options` receives the components, from name to the `Config` of each; the keys
    named by its other fields are the shared settings, and no component can have their names.
    """
    shared = {field.name for field in dataclasses.fields(section)} - {"options"}

    def validate(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected a mapping from component names to their options")
        loaded = {}
        for name, options in value.items():
            if name in shared:
                continue
            _refuse_unknown(kind, name, name, options, _registry(info))
            try:
                loaded[name] = _load(kind, name, options, _registry(info))
            except ValidationError as error:  # pydantic adds the field's own key, not the component's
                raise ValidationError.from_exception_data(error.title, _below(name, error)) from None
        settings = {name: value[name] for name in shared & value.keys()}
        return TypeAdapter(section).validate_python(settings | {"options": loaded})

    return PlainValidator(validate)


def _below(key: str, error: ValidationError) -> list[InitErrorDetails]:
    """The problems that `error` lists, one key further down."""
    return [
        InitErrorDetails(type=d["type"], loc=(key, *d["loc"]), input=d["input"], ctx=d.get("ctx", {}))
        for d in error.errors(include_url=False)
    ]


def _registry(info: ValidationInfo) -> Registry:
    assert isinstance(info.context, Registry), "configurations are loaded with the registry as validation context"
    return info.context


def _refuse_unknown(kind: str, name: str, key: str, value: Any, registry: Registry) -> None:
    """Raise a validation error at `key` below the field if there is no such component."""
    known = registry.names(kind)
    if name not in known:
        error = ValueError(f"there is no such file in {kind.replace('.', '/')}/{did_you_mean(name, known)}")
        detail = InitErrorDetails(type="value_error", loc=(key,), input=value, ctx={"error": error})
        raise ValidationError.from_exception_data(kind, [detail])


def _load(kind: str, name: str, options: Any, registry: Registry) -> Any:
    config_type = registry.load(kind, name, ("Config",)).Config
    return TypeAdapter(config_type).validate_json(json.dumps(options), strict=True, context=registry)
