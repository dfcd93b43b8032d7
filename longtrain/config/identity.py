"""The name of a run that was given none: the same settings are the same run directory."""

import dataclasses
import hashlib
import json
import re
from typing import Any

from longtrain.core.units import format_token_count

# Where a run executes, how it computes gradients, what it records and how it resumes do not change what is trained.
_NOT_IDENTITY = frozenset(
    {"run", "resume", "telemetry", "cluster", "checkpoint", "mixer.backend", "micro_batch_size", "stream"}
)


def run_name(config: Any, model: str) -> str:
    """`<model>-<context>-<6 hex>`, such as `hybrid_tiny-2k-0a1b2c`.

    `config` is a loaded root dataclass with a `context_length` in tokens, `model` the option of the model group. The
    digest covers the loaded values, so that `128k` and `131072` are one run.
    """
    settings = _without(dataclasses.asdict(config), _NOT_IDENTITY)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._")[:40] or "model"
    return f"{readable}-{format_token_count(config.context_length)}-{digest[:6]}"


def _without(tree: dict[str, Any], keys: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """A copy without the dotted `keys`."""
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in keys
    }
