"""Imports go down one list, and each vendor's library is visible in one place."""

import ast

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.architecture.sources import PACKAGES, ROOT, dotted_name, parse, python_files

# Vendor module -> where it may be imported. `bench` measures vendors and may import any of them.
FENCES = {
    "deepspeed": ("longtrain/engine",),
    "hydra": ("longtrain/config",),
    "omegaconf": ("longtrain/config",),
    "pyarrow": ("longtrain/data",),
    "ray": ("longtrain/cluster",),
    "torch.distributed": ("longtrain/comm", "longtrain/engine", "longtrain/checkpoint"),
    "triton": ("kernels",),
    "wandb": ("longtrain/telemetry",),
}


def fenced(tree: ast.Module) -> set[str]:
    """The vendors of FENCES that a file uses."""
    imported: set[str] = set()
    attributes: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            attributes.add(dotted_name(node))
    # `import torch` reaches torch.distributed as an attribute; a top-level vendor has to be imported by name.
    reached = {vendor: imported | attributes if "." in vendor else imported for vendor in FENCES}
    return {vendor for vendor, names in reached.items() if any(f"{n}.".startswith(f"{vendor}.") for n in names)}


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_vendors_stay_behind_their_fences() -> None:
    found = []
    for path in python_files(*PACKAGES):
        name = path.relative_to(ROOT).as_posix()
        for vendor in fenced(parse(path)):
            if not name.startswith((*(f"{folder}/" for folder in FENCES[vendor]), "longtrain/bench/")):
                found.append(f"{name} uses {vendor}")
    assert not found


@pytest.mark.parametrize(
    ("source", "vendor"),
    [
        ("import ray", "ray"),
        ("import ray.util as u", "ray"),
        ("from ray import remote", "ray"),
        ("def f():\n    import wandb", "wandb"),
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("from torch.distributed.tensor import DTensor", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("import raylib", None),
        ("from longtrain.cluster import ray", None),
        ("import torch\ntorch.distributions.Normal", None),
    ],
)
def test_the_fence_sees_every_way_to_import(source: str, vendor: str | None) -> None:
    assert fenced(ast.parse(source)) == ({vendor} if vendor else set())
