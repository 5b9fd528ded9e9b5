"""Forced plans and the text of a plan, on any machine: which words are known, what they do, and what is refused."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planner import CALLS, DEVICES, H200, C, cluster, plan

from se_fused.backends import Cuda
from se_fused.options import Options


def test_staged_rows_take_the_forced_threads_per_row():
    assert [plan(l=49, forced=f"rows=16 threads_per_row={threads}").threads_per_row for threads in (1, 4, 32)] == [
        1,
        4,
        32,
    ]


@pytest.mark.parametrize(
    ("call", "forced", "message"),
    [
        ({"l": 49}, "vec_bytes=16", "vec_bytes=16 with elements of 2 bytes, spans of 98 bytes"),
        ({}, "two_pass threads_per_row=7", "threads_per_row=7; wanted one of 8, 32, 256"),
        ({}, "threads_per_row=64", "threads_per_row=64; wanted one of 8, 32, 256"),
        ({}, "cluster threads_per_row=64", "threads_per_row=64; wanted one of 1, 2, 4, 8, 16, 32"),
        ({"channels_last": True}, "threads_per_row=64", "threads_per_row=64; wanted one of 1, 2, 4, 8, 16, 32"),
        ({}, "splits=65", "splits=65; wanted 1 to 64"),
        ({"r": 300}, "fused_hidden=1", "fused_hidden=1 with R = 300; wanted 1 to 256"),
        ({"l": 1, "c": 4096}, "per_block=4096", "4096 channels per block; wanted 1 to 1024"),
        ({}, "per_block=0", "per_block=0"),
        ({}, "two-pass", "'two-pass' is none of two_pass, cluster, vec_bytes="),
        ({}, "by_channels=1", "'by_channels=1' is none of .*, rows=, fused_hidden=, size= and threads="),
        ({}, "samples=4", "'samples=4' is none of"),
        ({}, "two_pass size=4", "asks for both two_pass and cluster"),
        ({}, "two_pass threads=256", "asks for both two_pass and cluster"),
        ({}, "cluster rows=2", "asks for both two_pass and cluster"),
        ({}, "threads=768", "threads=768; wanted one of 256, 512"),
        ({}, "size=4 threads=0", "threads=0; wanted one of 256, 512"),
        ({}, "size=3", "cluster: size=3; wanted 1, 2, 4, 8 or 16"),
        ({}, "size=4", "each of 4 blocks would need 4[0-9]{5} bytes of shared memory; H200 has 232448"),
        ({"c": 9}, "size=8", "the channels of a sample do not divide among 8 blocks"),
        ({"c": 7}, "size=8", "the channels of a sample do not divide among 8 blocks"),
        ({"c": 56, "l": 4, "channels_last": True}, "size=8", "do not divide among 8 blocks in whole 16 bytes"),
        ({"c": 28, "l": 49, "channels_last": True}, "size=2", "do not divide among 2 blocks in whole 16 bytes"),
        ({"c": 27, "l": 49, "channels_last": True}, "cluster", "do not divide among 1 block in whole 16 bytes"),
        ({"c": 32, "channels_last": True, "alignment": 8}, "cluster", "among 1 block in whole 16 bytes"),
        ({"l": 49}, "rows=-1", "rows=-1 of 98 bytes"),
        ({"l": 49}, "rows=-1 splits=1", "rows=-1 of 98 bytes"),
        ({"l": 49}, "rows=418", "rows=418 of 98 bytes; wanted at most 40960 bytes of them"),
        ({"c": 3, "l": 49}, "size=4", "a sample do not divide among 4 blocks$"),
        ({"l": 49}, "rows=418 threads_per_row=8", "rows=418 of 98 bytes; wanted at most 40960 bytes of them"),
        ({"l": 49, "backward": True}, "rows=209", "rows=209 of 196 bytes; wanted at most 40960"),
        ({"l": 56 * 56}, "rows=7", "rows=7 of 6272 bytes; wanted at most 40960"),  # a multiple of 16 bytes
        ({"l": 49}, "rows=3 splits=2", "rows=3 are not split"),
        ({"l": 49, "alignment": 8}, "rows=3", "rows=3 of so long or unaligned rows"),
        ({"l": 49, "dtype": "float64"}, "rows=3", "rows=3 of so long or unaligned rows"),
        ({"l": 145 * 145}, "rows=1", "rows=1 of so long or unaligned rows"),
        ({"dtype": "float64"}, "cluster", "cluster: its kernels are not compiled for float64"),
        ({}, "splits=many", "'splits=many' has no number"),
        ({"l": 2**30 + 1}, "", "1073741825 positions; wanted at most 2\\^30"),
        ({"c": 2**30 + 1}, "", "1073741825 channels; wanted at most 2\\^30"),
        ({"r": 2**30 + 1}, "", "1073741825 hidden units; wanted at most 2\\^30"),
    ],
)
def test_a_refusal_names_the_limit(call, forced, message):
    with pytest.raises(ValueError, match=message):
        plan(**call, forced=forced)


def test_a_word_of_both_algorithms_forces_neither():
    for call, threads in (({}, 256), ({}, 32), ({"c": 32, "l": 49, "channels_last": True}, 2)):
        assert plan(**call, forced=f"threads_per_row={threads}").threads_per_row == threads
    assert plan(forced="threads_per_row=256").launches[0][0] == "squeeze", "no cluster has so many threads per row"


def test_an_old_gpu_is_refused():
    with pytest.raises(ValueError, match="V100 is sm_70; wanted sm_75 on"):
        plan(C.Device("V100", 70, 80, 96 << 10, 96 << 10, [0] * 5, 0.8e6, 6 << 20))


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"device is 'H1000'; wanted one of T4, A100, .*RTX 5090"):
        C.preset("H1000")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("threads", [256, 512])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cluster_splits_channels_of_every_size(size, threads, backward, channels_last):
    call = {"c": 1000, "l": 7 * 7, "channels_last": channels_last, "backward": backward}
    chosen = cluster(**call, forced=f"size={size} threads={threads}")
    assert chosen.launches[0][3:] == (size, threads)
    assert f"{32 * size} blocks of {threads} threads in clusters of {size}, " in str(chosen)
    channels = -(-125 // size) * 8  # in whole 16 bytes of float16
    assert chosen.per_block == (49 if channels_last else channels * 49)
    assert f" of {'' if channels_last else 'at most '}{channels} channels per block" in str(chosen)
    assert (chosen.vec_bytes, chosen.splits, chosen.rows) == (16 if channels_last else 2, 1, 0)
    # Backward has at least two threads per row, because it reads x from global memory.
    fewest = 2 if backward else 1
    assert channels_last or chosen.threads_per_row == min(
        32, max(fewest, 2 ** int(math.log2(max(1, threads // channels))))
    )


@pytest.mark.parametrize(
    ("positions", "vec_bytes", "threads_per_row"), [(28 * 28, 16, 8), (14 * 14, 8, 4), (7 * 7, 2, 2)]
)
def test_backward_reads_global_memory_by_threads_side_by_side(positions, vec_bytes, threads_per_row):
    def chosen(more="", **options):
        return cluster(c=512, l=positions, forced=f"size=4 threads=256{more}", **options)

    assert (chosen().threads_per_row, chosen().vec_bytes) == (2, vec_bytes)
    assert chosen(backward=True).threads_per_row == threads_per_row
    assert chosen(" threads_per_row=1", backward=True).threads_per_row == 1
    if positions < 28 * 28:
        assert chosen(backward=True, pre_act=True).threads_per_row == 2  # x is in shared memory too


def test_channels_that_do_not_divide_in_16_bytes_divide_by_one_in_nchw():
    assert cluster(c=9, l=49, forced="size=2").per_block == 8 * 49  # 8 and 1
    assert cluster(c=10, l=49, forced="size=4").per_block == 3 * 49  # and 1 for the last


PREDICTED = r"(\S+) us: (\S+) starting launches, (\S+) moving bytes or (\S+) of instructions, (\S+) waiting"


@given(st.sampled_from(DEVICES), CALLS)
def test_the_text_names_the_parts_of_the_prediction(device, call):
    chosen = C.plan(device, **call)
    *_, predicted, other = str(chosen).splitlines()
    parts = re.fullmatch(f"  predicted: {PREDICTED}", predicted)
    total, launches, memory, work, waiting = (float(part) for part in parts.groups())
    assert min(launches, memory) > 0
    assert min(work, waiting) >= 0
    assert total == pytest.approx(launches + max(memory, work) + waiting, rel=0.02)
    assert total == pytest.approx(chosen.predicted_us, rel=0.01)
    refused = re.fullmatch(f"  not (?:cluster|two_pass): predicted {PREDICTED}", other)
    if refused:
        assert float(refused[1]) >= total
    else:
        assert other.startswith("  not cluster: ")


def test_explain_prints_the_plan_of_the_device_with_its_prediction(monkeypatch):
    class Library:
        def se_fused_device_limits(self, index, limits):
            limits[:] = [
                H200.capability, H200.sm_count, H200.shared_per_block, H200.shared_per_sm, *H200.clusters,
                int(H200.bytes_per_us), H200.l2_bytes,
            ]  # fmt: skip

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    for x in (torch.empty(32, 256, 7, 7, dtype=torch.float16), torch.empty(1, 24, 300, 300)):
        text = Cuda(Library()).plan(x, 16, Options.of(), own_residual=False, has_scale=False)
        n, c, *spatial = x.shape
        assert text == str(C.plan(H200, n=n, c=c, r=16, l=math.prod(spatial), dtype=str(x.dtype)[6:]))
        assert re.search(f"predicted: {PREDICTED}", text)
