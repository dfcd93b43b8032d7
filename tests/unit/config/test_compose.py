"""Composition: Hydra's grammar, the pattern's mixers, plug-ins, where each value came from."""

from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import OmegaConf

from longtrain.config.compose import COMMAND_LINE, compose
from longtrain.config.overrides import flatten
from longtrain.core.errors import Refused


def refusal(*overrides: str) -> str:
    with pytest.raises(Refused) as refused:
        compose(overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_default_tree_holds_the_patterns_mixers_behind_the_model() -> None:
    composed = compose([])
    assert list(composed.tree["mixer"]) == ["backend", "simple_gla", "softmax"]
    sections = list(composed.tree)
    assert sections.index("mixer") == sections.index("model") + 1
    assert composed.plugins == ()
    assert composed.choices["model"] == "hybrid_tiny"


def test_the_pattern_decides_which_mixers_exist() -> None:
    composed = compose(["mixer.gated_delta.num_heads=8", "model.pattern=[gated_delta x3, softmax]"])
    assert list(composed.tree["mixer"]) == ["backend", "gated_delta", "softmax"]
    assert composed.tree["mixer"]["gated_delta"]["num_heads"] == 8
    assert composed.origins["mixer.gated_delta.num_heads"] == COMMAND_LINE
    assert composed.origins["mixer.gated_delta.key_dim"] == "conf/mixer/gated_delta.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        ["steps=3", "optimizer.betas=[0.5,0.6]", "run.name='a b'", "cluster.workers=null", "seed=1_0"],
        ["+new.deep.key={a: 1, b: [x, y]}", "++steps=4", "++other=5", "~checkpoint.keep", "~resume=auto"],
        ["checkpoint={keep: 9}", "+model={extra: 1, width: 2}", "+cluster.resources.NPU=1"],
        ["optimizer.learning_rate=1e-2", "run.dir=${run.name}/x", "run.name=${resume}", "optimizer.betas.0=0.1"],
        ["checkpoint=null", "telemetry=5", "context_length=128k", "~optimizer"],
        ["~checkpoint", "+checkpoint.keep=1", "+engine.list=[1,{a: b}]"],
    ],
)
def test_overrides_mean_what_hydra_says(overrides: list[str]) -> None:
    with initialize_config_module("longtrain_conf", version_base="1.3"):
        expected = OmegaConf.to_container(hydra_compose("train", overrides), resolve=True)
    tree = compose(overrides).tree
    del tree["mixer"], expected["mixer"]  # the options of the pattern's mixers join it here
    assert tree == expected


def test_groups_by_package_delete_and_add(toys: list[str]) -> None:
    assert "optimizer" not in compose(["~optimizer"]).tree
    composed = compose([toys[0], "+mixer@spare=other", "mixer@mixer.softmax=sliding_window"])
    assert composed.tree["spare"] == {"scale": 1.0}
    assert composed.tree["mixer"]["softmax"]["window"] == 256
    assert composed.origins["mixer.softmax.window"] == "conf/mixer/sliding_window.yaml"


def test_a_path_may_begin_at_home() -> None:
    tree = compose(["run.dir=~/my runs", "run.name='~/x'"]).tree
    assert tree["run"] == {"dir": "~/my runs", "name": "~/x"}


def test_last_writer_is_the_origin(toys: list[str]) -> None:
    composed = compose([*toys, "mixer.toy.gate=sigmoid", "cluster.resources={CPU: 2}", "optimizer.betas.1=0.9"])
    folder = str(composed.plugins[0])
    experiment, model = f"{folder}/conf/experiment/toys.yaml", f"{folder}/conf/model/toy_model.yaml"
    expected = {
        "steps": experiment,
        "seed": "conf/train.yaml",
        "context_length": model,
        "model.width": model,
        "mixer.toy.num_heads": experiment,
        "mixer.toy.num_key_value_heads": f"{folder}/conf/mixer/toy.yaml",
        "mixer.toy.window": model,
        "mixer.toy.gate": COMMAND_LINE,
        "mixer.other.scale": f"{folder}/conf/mixer/other.yaml",
        "objective.name": f"{folder}/conf/objective/toy_objective.yaml",
        "data.tokenizer": f"{folder}/conf/data/toy_text.yaml",
        "data.path": experiment,
        "sequence_parallel.scan": experiment,
        "sequence_parallel.size": "conf/sequence_parallel/default.yaml",
        "cluster.resources.CPU": COMMAND_LINE,
        "optimizer.betas": COMMAND_LINE,
        "plugins": COMMAND_LINE,
    }
    assert {key: composed.origins[key] for key in expected} == expected
    assert composed.origins.keys() == flatten(composed.tree).keys()
    assert composed.tree["optimizer"]["betas"] == [0.9, 0.9]
    assert composed.choices["model"] == "toy_model"


def test_a_models_mixer_values_apply_when_the_pattern_gains_that_mixer(toys: list[str]) -> None:
    assert "softmax" not in compose(toys).tree["mixer"]
    composed = compose([*toys, "model.pattern=[toy, softmax]"])
    assert composed.tree["mixer"]["softmax"]["rope_theta"] == 5e5
    assert composed.tree["mixer"]["softmax"]["num_heads"] == 4
    assert "other" not in composed.tree["mixer"]


def test_group_choice_on_the_command_line_beats_the_experiments(toys: list[str]) -> None:
    composed = compose([*toys, "model=hybrid_tiny"])
    assert composed.tree["model"]["width"] == 128
    assert composed.origins["model.width"] == "conf/model/hybrid_tiny.yaml"


def test_interpolation_is_resolved_and_belongs_to_its_writer() -> None:
    composed = compose(["run.name=${model.width}x", "+copy=${checkpoint}"])
    assert composed.tree["run"]["name"] == "128x"
    assert composed.tree["copy"] == composed.tree["checkpoint"]
    assert composed.origins["copy.keep"] == COMMAND_LINE


@pytest.mark.usefixtures("compose_groups_once")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steeps=10", "there is no key 'steeps'; did you mean 'steps'?"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("checkpoint.kep=1", "did you mean 'checkpoint.keep'?"),
        ("chekpoint.keep=1", "did you mean 'checkpoint.keep'?"),
        ("checkpoint={kep: 1}", "there is no key 'checkpoint.kep'; did you mean 'checkpoint.keep'?"),
        ("steps.more=1", "there is no key 'steps.more'"),
        ("cluster.resources.NPU=1", "+key=value adds one"),
        ("optimizer.betas.2=1", "there is no key 'optimizer.betas.2'"),
        ("~stesp", "did you mean 'steps'?"),
        ("~steps=3", "the value is 160; delete it with ~steps"),
        ("~optimizer.betas.0", "set the whole list, optimizer.betas=[...]"),
        ("+steps=3", "steps exists; change it without the +"),
        ("model=hybrid_tny", "did you mean 'hybrid_tiny'?"),
        ("model=7", "model has no option '7'; known: hybrid_"),
        ("model=null", "leave it out of the configuration with ~model"),
        ("optimizer=[adamw,sdg]", "optimizer has no option 'sdg'"),
        ("experiment=mine", "experiment has no option 'mine'; known: none"),
        ("modle@x=hybrid_tiny", "there is no group 'modle'"),
        ("+model=hybrid_tiny", "more than once"),
        ("mixer=softmax", "write model.pattern=[NAME x3, NAME]"),
        ("mixer.sliding_window.window=3", "model.pattern=[simple_gla x2, softmax] has no sliding_window"),
        ("mixer={sliding_window: {window: 3}}", "has no sliding_window"),
        ("+mixer.mine.width=3", "has no mine"),
        ("mixer.softmx.head_dim=3", "did you mean 'mixer.softmax.head_dim'?"),
        ("~mixer.softmax", "do not delete mixer.softmax"),
        ("model.pattern=[sofmax]", "there is no mixer 'sofmax'; did you mean 'softmax'?"),
        ("model.pattern=softmax", "model.pattern=softmax: expected a list of mixers"),
        ("model.pattern=[1]", "model.pattern=[1]: expected a list of mixers"),
        ("steps", "an override is written key=value"),
        ("=3", "there is no key before ="),
        ("steps=[1", "not an override"),
        ("steps[0]=1", "not an override"),
        ("run.name='x", "not an override"),
        ("seed=" + "1" * 5000, "not an override"),
        ("run.name=\udcff", "not an override"),
        ("steps=" + "[" * 500, "not an override"),
        ("steps=1,2", "write a list as key=[a,b]"),
        ("steps=range(1,5)", "one run has one value"),
        ("hydra.run.dir=x", "Hydra's own settings cannot be changed"),
        ("hydra/launcher=basic", "Hydra's own settings cannot be changed"),
        ("run.dir=${oc.env:HOME}", "${oc.env:HOME} calls a resolver"),
        ("run.dir=a/${hydra:runtime.cwd}", "calls a resolver"),
        ("run.dir='${${seed}:x}'", "calls a resolver"),
        ("run.dir='${x'", "calls a resolver"),
        ("run.dir=${nothing}", "Interpolation key 'nothing' not found"),
        ("run.dir=${run.dir}", "Recursive interpolation"),
        ("+data._target_=os.system", "_target_ would run code"),
        ("+data={a: [{_partial_: true}]}", "_partial_ would run code"),
        ("run.name='???'", "run.name has no value yet; give one with run.name=VALUE"),
        ("plugins=/tmp", "write plugins=[FOLDER]"),
        ("plugins=[/no/such]", "/no/such is not a folder"),
    ],
)
def test_mistakes_get_one_line(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_a_setting_given_twice_is_refused() -> None:
    assert refusal("steps=1", "+steps=2") == "+steps=2: steps was already set by steps=1; keep one of the two"


def test_a_value_that_must_be_given_is_named(toys: list[str]) -> None:
    assert refusal(toys[0], "data=toy_text") == "data.path has no value yet; give one with data.path=VALUE"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps: [", "cannot be composed"),
        ("a: ${oc.env:HOME}", "conf/experiment/mine.yaml: ${oc.env:HOME} calls a resolver"),
        ("model: {width: {_target_: os.system}}", "_target_ would run code"),
        ("defaults: [override /model: none]", "Could not find 'model/none'"),
        ("mixer: {softmx: {window: 3}}", "there is no such mixer; did you mean 'softmax'?"),
        ("plugins: [/tmp]", "plugins are given on the command line"),
        ("steps: !!binary aGVsbG8=", "steps: bytes is not a number or text"),
        ("steps: !!python/object/apply:os.system ['true']", "cannot be composed"),
    ],
)
def test_mistakes_in_a_yaml_file_get_one_line(tmp_path: Path, content: str, expected: str) -> None:
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(f"# @package _global_\n{content}\n")
    assert expected in refusal(f"plugins=['{tmp_path}']", "experiment=mine")


def test_a_plugin_may_not_hide_a_file_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "hybrid_tiny.yaml").write_text("width: 1\n")
    assert "has the name of conf/model/hybrid_tiny.yaml; rename the file" in refusal(f"plugins=['{tmp_path}']")


def test_plugins_are_absolute_wherever_the_command_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    composed = compose(["plugins=[mine]"])
    assert composed.plugins == (tmp_path / "mine",)
    assert composed.tree["plugins"] == [str(tmp_path / "mine")]
