"""The project's files, as the architecture tests see them."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PACKAGES = ("longtrain", "kernels")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """All Python files below top-level folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """`longtrain/core/units.py:12`, for messages."""
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Module-level functions and classes whose name starts with no underscore."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Public module-level functions, and the public methods and `__init__` of public classes."""
    for node in public_definitions(tree):
        if isinstance(node, Function):
            yield node
            continue
        for member in node.body:
            if isinstance(member, Function) and (not member.name.startswith("_") or member.name == "__init__"):
                yield member
