"""The same parity and the same losses with NCCL, on as many GPUs as there are (two at least): `pytest -m gpu`."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from longtrain.comm.mesh import process_group
from longtrain.training.rank import pick_device
from tests.distributed.test_parity import ATTENDS, HYBRID, LAYOUTS, SCANS, TOLERANCE, Case, model_error
from tests.harness.ranks import RankPool, run_ranks
from tests.harness.training import losses, tiny_config, train_rank, with_ranks

pytestmark = pytest.mark.gpu


def errors_on_gpu() -> dict[str, float]:
    """Largest relative error on this rank, by case."""
    device = pick_device("cuda")
    cases: list[Case] = []
    with process_group(device, timedelta(minutes=2)):
        for layout in LAYOUTS:
            for pattern in (("softmax",), HYBRID):
                for length in (3, 9, 67):
                    cases += [Case(pattern, length, attend=attend, layout=layout) for attend in ATTENDS]
                    cases += [Case(pattern, length, scan=scan, layout=layout) for scan in SCANS]
            cases += [Case(length=37, attend=attend, layout=layout, chunk_tokens=5) for attend in ATTENDS]
        errors = {str(case): model_error(case, str(device)) for case in cases}
    return errors


def test_ranks_equal_one_rank_in_float64() -> None:
    for errors in run_ranks(errors_on_gpu, torch.cuda.device_count(), timeout=240, process_group=False):
        wrong = {case: error for case, error in errors.items() if not error < TOLERANCE}
        assert not wrong


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_losses_do_not_depend_on_the_number_of_gpus(tmp_path: Path, precision: str, tolerance: float) -> None:
    # float32 as on CPUs; bfloat16 activations round to 2^-9, and 12 steps amplify it
    config = tiny_config(tmp_path, context_length=1003, steps=12)
    config = replace(config, engine=replace(config.engine, device="cuda", precision=precision))
    want = losses(train_rank(with_ranks(config, 1)))
    size = torch.cuda.device_count()
    with RankPool(size, process_group=False) as job:
        got = losses(job.run(train_rank, with_ranks(config, size), timeout=240)[0])
    assert got == pytest.approx(want, rel=tolerance)
