"""Nothing that the project reads can run code: no call that executes data exists in it."""

import ast

import pytest

from tests.architecture.sources import CONF, PACKAGES, dotted_name, parse, place, python_files

MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}
KEYWORDS = {"shell": True, "trust_remote_code": True, "weights_only": False}


def dangers(tree: ast.Module) -> list[ast.AST]:
    """The imports and calls of a file that could execute what it reads."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in MODULES for alias in node.names):
            found.append(node)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in MODULES or names & CALLS:
                found.append(node)
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if dotted_name(node.func) in CALLS or any(keywords.get(k) is v for k, v in KEYWORDS.items()):
                found.append(node)
    return found


def test_no_call_executes_data() -> None:
    assert not [place(path, node) for path in python_files(*PACKAGES) for node in dangers(parse(path))]


def test_no_configuration_names_code() -> None:
    assert not [place(path) for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert dangers(ast.parse(source))


@pytest.mark.parametrize("source", ["model.eval()", "yaml.safe_load(text)", "re.compile(text)", "shell=True"])
def test_harmless_code_passes(source: str) -> None:
    assert not dangers(ast.parse(source))
