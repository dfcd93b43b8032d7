"""The registry is the folder."""

from pathlib import Path

import pytest

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "mixers").mkdir()
    (tmp_path / "mixers" / "toy.py").write_text("Config = Mixer = int\n")
    (tmp_path / "mixers" / "_shared.py").write_text("")
    return tmp_path


def test_components_are_the_modules_of_the_folder(plugin: Path) -> None:
    names = Registry((plugin,)).names("mixers")
    assert set(names) - set(Registry().names("mixers")) == {"toy"}
    assert "softmax" in names
    assert not [n for n in names if n.startswith("_")]


def test_a_plugin_is_loaded_once_and_from_its_own_folder(
    plugin: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = Registry((plugin,)).load("mixers", "toy")
    assert Registry((plugin,)).load("mixers", "toy") is first
    other = tmp_path_factory.mktemp("other")
    (other / "mixers").mkdir()
    (other / "mixers" / "toy.py").write_text("Config = Mixer = str\n")
    assert Registry((other,)).load("mixers", "toy").Config is str


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Refused, match=r"no 'softmaxx'; did you mean 'softmax'\?"):
        Registry().load("mixers", "softmaxx")


@pytest.mark.parametrize("name", ["_rotary", "..core.errors", "../core/errors", "soft/max"])
def test_only_component_modules_can_be_loaded(name: str) -> None:
    with pytest.raises(Refused, match="there is no"):
        Registry().load("mixers", name)


def test_a_plugin_may_not_hide_a_component(plugin: Path) -> None:
    (plugin / "mixers" / "softmax.py").write_text("Config = Mixer = int\n")
    with pytest.raises(Refused, match="rename the file"):
        Registry((plugin,)).load("mixers", "softmax")


def test_a_module_that_breaks_its_contract_is_named(plugin: Path) -> None:
    with pytest.raises(Refused, match="defines no `Objective`"):
        Registry((plugin,)).load("mixers", "toy", ("Config", "Objective"))


def test_a_plugin_that_does_not_import_is_refused_with_its_cause(plugin: Path) -> None:
    (plugin / "mixers" / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(Refused, match=r"broken\.py.*nothing_of_that_name"):
        Registry((plugin,)).load("mixers", "broken")
