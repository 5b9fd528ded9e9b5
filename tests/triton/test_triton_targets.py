"""Every Triton kernel, compiled ahead of time for each GPU: it spills nothing and has wide accesses if maps allow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MAPS = {"squeeze_kernel": "loads", "scale_kernel": "stores", "forward_sample_kernel": "stores",
        "backward_reduce_kernel": "loads", "backward_apply_kernel": "stores", "backward_sample_kernel": "stores",
        "batch_norm_kernel": "stores"}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
def test_no_spills_and_wide_accesses(target, tmp_path):
    here = Path(__file__).parents[1]
    # In another process, because the other tests have switched on the interpreter in this one.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(here.parent), "TRITON_CACHE_DIR": str(tmp_path), "SE_FUSED_BACKEND": "reference"}
    run = subprocess.run(
        [sys.executable, here / "triton_targets.py", target], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    ordered = target.startswith("sm_")
    assert {kernel["kernel"] for kernel in kernels} >= {name for name in MAPS if ordered or "sample" not in name}
    assert [kernel for kernel in kernels if kernel["spills"]] == []
    for kernel in kernels:
        if kernel["kernel"] in MAPS and kernel["extent"] % 16 == 0:
            assert kernel["loads"] > 0, kernel
            assert kernel["stores"] > 0 or MAPS[kernel["kernel"]] == "loads", kernel
