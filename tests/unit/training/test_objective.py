"""An objective of a plug-in is refused in one line where it does not keep the contract."""

from pathlib import Path

import pytest

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.training.objective import make_objective
from tests.harness.training import tiny_config

HEAD = """
from dataclasses import dataclass
from longtrain.core import contracts

@dataclass(frozen=True)
class Config:
    name: str

"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("class Objective:\n    ...", "has to inherit from longtrain.core.contracts.Objective"),
        ("class Objective(contracts.Objective):\n    def count(self, targets): ...", "has to define sums$"),
    ],
)
def test_what_is_no_objective_is_refused(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "odd.py").write_text(HEAD + body)
    registry = Registry((tmp_path,))
    odd = registry.load("objectives", "odd").Config("odd")
    with pytest.raises(Refused, match=f"^objective=odd: .*{said}"):
        make_objective(tiny_config(tmp_path, objective=odd), registry)
