"""The recipes in launchers/ and docker/ are well-formed, keep the token secret, and name settings that exist."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from longtrain.bench import parse_options
from longtrain.cluster.resolve import resolve

ROOT = Path(__file__).parents[3]
LAUNCHERS = ROOT / "launchers"
GUIDES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *sorted(ROOT.glob("longtrain/*/README.md")),
]
SHELL_SCRIPTS = sorted([*LAUNCHERS.glob("*.sh"), *LAUNCHERS.glob("*.sbatch"), ROOT / ".ci" / "run"])


def recipe(name: str) -> Any:
    """A YAML recipe."""
    return yaml.safe_load((LAUNCHERS / name).read_text())


def exists_in_conf(override: str) -> bool:
    """Whether `group=option` or `dotted.key=value` names something in conf/."""
    key, value = override.split("=", 1)
    if (ROOT / "conf" / key).is_dir():
        return (ROOT / "conf" / key / f"{value}.yaml").is_file()
    first, *rest = key.split(".")
    trees = [yaml.safe_load((ROOT / "conf" / "train.yaml").read_text())]
    if (ROOT / "conf" / first).is_dir():
        options = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / first).glob("*.yaml")}
        trees += [{first: options}] if first == "mixer" else [{first: option} for option in options.values()]
    for tree in trees:
        for part in (first, *rest):
            tree = tree.get(part, ...) if isinstance(tree, dict) else ...
        if tree is not ...:
            return True
    return False


def overrides(text: str) -> list[list[str]]:
    """The overrides of every command of a text that takes them."""
    command = r"longtrain (?:train|submit|config)(?: --address \S+)?|quickstart\.sh|slurm\.sbatch"
    override = r"'[^'\n]*'|\"[^\"\n]*\"|[\w.]+=[^\s'`]+"
    joined = re.sub(r"\\?\n#?\s+", " ", text)
    found = re.findall(rf"(?:{command})((?:\s+(?:{override}))+)", joined)
    return [[word for word in shlex.split(arguments) if "=" in word] for arguments in found]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_what_is_run_directly_is_executable() -> None:
    for script in (ROOT / ".ci" / "run", LAUNCHERS / "quickstart.sh", LAUNCHERS / "test.sh"):
        assert os.access(script, os.X_OK), script


def test_ray_accepts_the_cluster_description() -> None:
    cluster = prepare_config(recipe("ray_up.yaml"))
    validate_config(cluster)  # raises where it does not
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(cluster | {"max_wokers": 2})


def test_every_ray_command_of_the_cluster_has_token_authentication() -> None:
    cluster = recipe("ray_up.yaml")
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)


def test_rayjob_retries_resume_on_a_volume_behind_a_token() -> None:
    spec = recipe("rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (LAUNCHERS / "constraints.txt").read_text().splitlines()
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        mounts = {m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"] if m["name"] in claims}
        assert f"run.dir={mounts.pop()}" in spec["entrypoint"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not any("env" in container for container in pod["containers"])
    gpus_of_pod = int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    gpus = cluster["workerGroupSpecs"][0]["replicas"] * gpus_of_pod
    assert f"cluster.workers={gpus}" in spec["entrypoint"]


def test_image_is_pinned_and_ends_as_an_ordinary_user() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"ARG BASE=python:\d+\.\d+\.\d+-\S+", line) for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    ignore = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists() and f"!{source}" in ignore


@pytest.mark.parametrize("path", [*sorted(LAUNCHERS.iterdir()), ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=str)
def test_overrides_that_are_shown_exist_and_go_together(path: Path) -> None:
    for shown in overrides(path.read_text()):
        assert [override for override in shown if not exists_in_conf(override)] == []
        if not any("$" in override for override in shown):  # a shell's value
            assert resolve(shown).config.run.name


@pytest.mark.parametrize("path", GUIDES, ids=str)
def test_options_of_benchmarks_that_are_shown_are_not_refused(path: Path) -> None:
    shown = re.findall(r"longtrain bench ([\w-]+)((?: \w+=[^\s`]+)*)", path.read_text())
    assert shown
    for name, words in shown:
        options = [word for word in words.split() if "<" not in word]  # <name> stands for one
        config = importlib.import_module(f"longtrain.bench.{name.replace('-', '_')}").Config
        found = parse_options(name, config, options)
        assert {option.partition("=")[0] for option in options} <= vars(found).keys()


def test_the_check_of_overrides_bites() -> None:
    [shown] = overrides("longtrain train 'cluster.resources={CPU: 1}' steps=5 model=nothing \\\n    data.nothing=1")
    assert shown == ["cluster.resources={CPU: 1}", "steps=5", "model=nothing", "data.nothing=1"]
    assert [exists_in_conf(override) for override in shown] == [True, True, False, False]
