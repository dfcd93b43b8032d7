"""The public surface explains itself: docstrings and complete annotations."""

import ast

import pytest

from tests.architecture.sources import (
    PACKAGES,
    Function,
    is_kernel,
    parse,
    place,
    public_definitions,
    public_functions,
    python_files,
)


def unannotated(function: Function) -> list[str]:
    """Names of a function's parameters without annotation; `return` if its result has none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return missing + ([] if function.returns is not None else ["return"])


def test_every_file_and_public_name_has_a_docstring() -> None:
    found = []
    for path in python_files(*PACKAGES):
        tree = parse(path)
        found += [place(path, node) for node in (tree, *public_definitions(tree)) if not ast.get_docstring(node)]
    assert not found


def test_public_functions_are_fully_annotated() -> None:
    found = [
        f"{place(path, function)} {function.name}({', '.join(unannotated(function))})"
        for path in python_files(*PACKAGES)
        for function in public_functions(parse(path))
        if unannotated(function) and not is_kernel(function)  # Triton reads annotations as compile-time types
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(a: int, *b: int, c: int, **d: int) -> int: ...", []),
        ("def f(a, *b, c, **d): ...", ["a", "c", "b", "d", "return"]),
        ("def f(self) -> None: ...", []),
    ],
)
def test_each_missing_annotation_is_named(source: str, missing: list[str]) -> None:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert unannotated(function) == missing
