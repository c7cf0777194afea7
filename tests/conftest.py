import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from ternary_ssm import _C

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]

ISAS = ["portable", "avx2", "avx512"]
ISAS = ISAS[: ISAS.index(_C.cpu_isa()) + 1]  # those that this CPU has

RUN_CALLS = """
import os, sys, torch
from ternary_ssm import _C
assert _C.cpu_isa() == os.environ["TERNARY_CPU_ISA"]
calls = torch.load(sys.argv[1])
torch.save([getattr(torch.ops.ternary, name)(*args) for name, args in calls], sys.argv[2])
"""


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=ISAS)
def on_isa(request, tmp_path) -> Callable[[list], list]:
    """Runs [(operator, arguments), ...] in a process whose CPU kernels are those of one instruction set."""

    def run(calls: list) -> list:
        torch.save(calls, tmp_path / "calls")
        command = [sys.executable, "-c", RUN_CALLS, tmp_path / "calls", tmp_path / "results"]
        subprocess.run(command, check=True, env=os.environ | {"TERNARY_CPU_ISA": request.param})
        return torch.load(tmp_path / "results")

    return run
