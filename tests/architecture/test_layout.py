"""What lies where, and how large it may grow."""

import ast
import fnmatch
import re

import pytest

from tests.architecture.sources import PACKAGES, ROOT, Function, is_kernel, parse, place, python_files

TOP_LEVEL = {
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "conf",
    "docker",
    "kernels",
    "launchers",
    "longtrain",
    "pyproject.toml",
    "tests",
}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 150
# Spelled in pieces so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
PERSONAL_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt)/\w")


def too_long(tree: ast.Module) -> list[Function]:
    """Functions over their budget."""
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return [
        f for f in functions if (f.end_lineno or 0) - f.lineno + 1 > (KERNEL_LINES if is_kernel(f) else FUNCTION_LINES)
    ]


def test_top_level_has_only_what_the_readme_explains() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    unexpected = {n for n in found - TOP_LEVEL if not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)}
    assert not unexpected
    assert found >= TOP_LEVEL


def test_files_fit_in_a_readers_head() -> None:
    lengths = {place(path): len(path.read_text().splitlines()) for path in python_files(*PACKAGES)}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def test_functions_are_short() -> None:
    assert not [place(path, function) for path in python_files(*PACKAGES) for function in too_long(parse(path))]


@pytest.mark.parametrize(
    ("decorator", "lines", "expected"),
    [("", 60, 0), ("", 61, 1), ("@triton.jit\n", 150, 0), ("@triton.jit\n", 151, 1), ("@cache\n", 61, 1)],
)
def test_the_function_budget_counts_from_def_to_end(decorator: str, lines: int, expected: int) -> None:
    source = decorator + "def function():\n" + "    pass\n" * (lines - 1)
    assert len(too_long(ast.parse(source))) == expected


def test_no_module_is_called_utils() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [place(p) for p in python_files(*PACKAGES) if names & {*p.relative_to(ROOT).parts, p.stem}]


def test_nothing_is_left_unfinished_and_no_path_of_one_machine_is_kept() -> None:
    folders = ("longtrain", "kernels", "conf", "launchers", "docker", "tests")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    found = [
        f"{place(path)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line) or (PERSONAL_PATH.search(line) and "docker" not in path.parts)
    ]
    assert not found
