"""What dev/emulator checks besides results: bank conflicts, stale reads, and too much shared memory."""

from pathlib import Path

import torch
from cases import Case, assert_close, call, truth
from gradients import compare

import se_fused
from dev import emulator

# For reads of the staged tile in float16, by layout, side and channels: the measured wavefronts per wavefront of the
# minimum. Rows of 49 or 196 elements are not a multiple of 16 bytes, so the rows that a warp reduces side by side use
# the same banks.
WAVEFRONTS = {
    ("contiguous", 7, 512): 1.628,
    ("contiguous", 14, 256): 1.458,
    ("contiguous", 28, 128): 1,
    ("contiguous", 56, 64): 1,
    ("channels_last", 7, 512): 1,
    ("channels_last", 14, 256): 1,
    ("channels_last", 28, 128): 1,
    ("channels_last", 56, 64): 1,
}


def hold_wavefronts(path: Path, fault: int | None = None) -> None:
    library = emulator.Library(path)
    library.choose_fault(fault)
    library.setup("H200", "cluster")
    with library.forced(), torch.no_grad():
        for (layout, side, c), most in WAVEFRONTS.items():
            case = Case(n=1, c=c, r=c // 16, spatial=(side, side), dtype=torch.float16, layout=layout)
            call(se_fused.squeeze_excite, case.tensors(), case.options)
            assert "cluster forward" in library.last_plan()
            taken, least = library.wavefronts(2)
            assert taken >= least > 0
            assert taken <= most * least, f"{layout} {side}: {taken / least:.3f} wavefronts for each of {least}"
            taken, least = library.wavefronts(4)  # the vectors of the layers
            assert taken == least > 0, f"{layout} {side}: {taken} wavefronts of the layers, which need {least}"


def run_kernels(path: Path, fault: int | None = None) -> None:
    """Run in place, in two passes and in clusters, and backward."""
    library = emulator.Library(path)
    library.choose_fault(fault)
    case = Case(n=2, c=48, r=8, spatial=(6, 6))
    with library.forced():
        for plan in ("two_pass fused_hidden=0", "cluster size=2"):
            library.setup("H200", plan)
            tensors = case.tensors()
            expected = truth(tensors, case.options)
            with torch.no_grad():
                y = call(se_fused.squeeze_excite, tensors, case.options, inplace=True)
            assert_close(y, expected, case.dtype)
            compare(case)


def test_the_kernels_read_shared_memory_without_more_conflicts():
    well, said = emulator.run_apart(hold_wavefronts, emulator.library())
    assert well, said


def test_without_a_fault_there_is_no_message():
    well, said = emulator.run_apart(run_kernels, emulator.library())
    assert well, said
