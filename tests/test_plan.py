"""The decisions of csrc/plan/, on any machine: which launches, which accesses, and what cannot be forced."""

import contextlib
import csv
import itertools
import math
import re
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from se_fused import backends, launch, native
from se_fused.options import Options

ROOT = Path(__file__).resolve().parents[1]
C = native.load_facts()
H200 = C.preset("H200")
DEVICES = C.device_presets()


def plan(device=H200, forced="two_pass", **call):
    return C.plan(device, forced=forced, **{"n": 32, "c": 256, "r": 16, "l": 56 * 56, "dtype": "float16"} | call)


def cluster(device=H200, **call):
    return plan(device, **{"forced": "cluster"} | call)


@pytest.mark.parametrize(
    ("call", "width"),
    [
        ({"l": 56 * 56}, 16),
        ({"l": 14 * 14}, 8),  # rows of 392 bytes
        ({"l": 7 * 7}, 2),  # rows of 98 bytes
        ({"l": 7 * 7, "channels_last": True}, 16),
        ({"l": 14 * 14, "dtype": "float32"}, 16),
        ({"l": 7 * 7, "dtype": "float32"}, 4),
        ({"l": 56 * 56, "alignment": 8}, 8),
        ({"l": 56 * 56, "alignment": 2}, 2),
        ({"channels_last": True, "c": 27}, 2),
        ({"dtype": "float64"}, 8),
    ],
)
def test_the_widest_access_that_every_row_allows(call, width):
    assert plan(**call).width == width


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({}, ["squeeze", "scale"]),  # W1 of 4096 weights: each block reads it
        ({"c": 960, "r": 240, "l": 49}, ["squeeze", "hidden", "scale"]),
        ({"r": 0}, ["squeeze", "scale"]),
        ({"backward": True}, ["backward_reduce", "backward_hidden", "backward_apply", "weight_gradients"]),
        ({"backward": True, "r": 0}, ["backward_reduce", "backward_apply", "weight_gradients"]),
    ],
)
def test_the_launches(call, names):
    assert [name for name, *_ in plan(**call).launches] == names


def test_every_kernel_has_the_name_of_its_launch():
    """So that a profiler's timeline can be read beside `explain`."""
    launches = {
        name
        for backward, forced, r in itertools.product((False, True), ("two_pass", "cluster"), (64, 512))
        for name, *_ in plan(l=49, r=r, backward=backward, forced=forced).launches
    }
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    kernels = re.findall(r"__global__ void(?: __launch_bounds__\([^()]*\))?\s+(\w+)\(", sources)
    assert len(kernels) == sources.count("__global__")
    # No plan launches `occupant`: a device is asked how many clusters of it can run.
    assert sorted(kernels) == sorted(["occupant", *(f"{name}_kernel" for name in launches)])


def test_one_row_is_split_until_the_gpu_is_full():
    small, large = (plan(n=n, c=32, r=8, l=112 * 112, dtype="float32") for n in (4, 256))
    assert small.splits == 3
    assert large.splits == 1
    assert plan(C.preset("T4"), n=4, c=32, r=8, l=112 * 112, dtype="float32").splits < small.splits


@pytest.mark.parametrize(
    ("call", "rows", "lanes"),
    [
        ({"l": 7 * 7}, 21, 8),  # halved until 132 multiprocessors have 4 blocks each, or 32 rows are left or fewer
        ({"l": 7 * 7, "n": 512}, 167, 1),  # 16 KiB of them
        ({"l": 7 * 7, "n": 512, "dtype": "float32"}, 83, 2),
        ({"l": 7 * 7, "n": 512, "backward": True}, 83, 2),  # 16 KiB of both maps
        ({"l": 7 * 7, "n": 512, "backward": True, "post_act": True, "residual": True}, 55, 4),  # and of three
        ({"l": 7 * 7, "n": 528, "c": 40}, 40, 4),  # no more than there are
        ({"l": 14 * 14, "n": 1}, 21, 8),  # accesses of 8 bytes
        ({"l": 143 * 143}, 1, 32),  # 40,898 of 40,960 bytes
        ({"l": 145 * 145}, 0, 256),
        ({"l": 56 * 56}, 0, 32),  # accesses of 16 bytes
        ({"l": 7 * 7, "alignment": 8}, 0, 8),
        ({"l": 7 * 7, "dtype": "float64"}, 0, 8),
        ({"l": 7 * 7, "channels_last": True}, 0, 8),
        ({"l": 7 * 7, "forced": "two_pass splits=1"}, 0, 8),
        ({"l": 7 * 7, "forced": "rows=0"}, 0, 8),
        ({"l": 7 * 7, "forced": "rows=5"}, 5, 32),
        ({"l": 56 * 56, "forced": "rows=2"}, 2, 32),
    ],
)
def test_rows_that_accesses_of_16_bytes_do_not_fit_go_through_shared_memory(call, rows, lanes):
    chosen = plan(**call)
    assert (chosen.rows, chosen.lanes) == (rows, lanes)
    assert (f"{rows} rows at a time through shared memory" in str(chosen)) == (rows > 0)
    if rows:
        whole = {"n": 32, "c": 256} | call
        assert chosen.splits == 1
        assert chosen.launches[0][1] == whole["n"] * -(-whole["c"] // rows)
        direct = plan(**call | {"forced": "rows=0"})
        assert (chosen.map_bytes_read, chosen.map_bytes_written) == (direct.map_bytes_read, direct.map_bytes_written)
        assert chosen.scratch_bytes == direct.scratch_bytes / direct.splits


def test_staged_rows_take_the_lanes_that_are_asked_for():
    assert [plan(l=49, forced=f"rows=16 lanes={lanes}").lanes for lanes in (1, 4, 32)] == [1, 4, 32]


def test_the_bytes_of_the_maps():
    whole = 32 * 256 * 56 * 56 * 2
    assert (plan().map_bytes_read, plan().map_bytes_written) == (2 * whole, whole)
    assert plan(residual=True).map_bytes_read == 3 * whole
    back = plan(backward=True)
    assert (back.map_bytes_read, back.map_bytes_written) == (3 * whole, whole)  # dx does not depend on x
    assert plan(backward=True, squeeze=1).map_bytes_read == 4 * whole


@pytest.mark.parametrize(
    ("call", "forced", "message"),
    [
        ({"l": 49}, "width=16", "width=16 with elements of 2 bytes, spans of 98 bytes"),
        ({}, "two_pass lanes=7", "lanes=7; wanted one of 8, 32, 256"),
        ({}, "lanes=64", "lanes=64; wanted one of 8, 32, 256"),
        ({}, "cluster lanes=64", "lanes=64; wanted one of 1, 2, 4, 8, 16, 32"),
        ({"channels_last": True}, "lanes=64", "lanes=64; wanted one of 1, 2, 4, 8, 16, 32"),
        ({}, "splits=65", "splits=65; wanted 1 to 64"),
        ({"r": 300}, "fused_hidden=1", "fused_hidden=1 with R = 300; wanted 1 to 256"),
        ({"l": 1, "c": 4096}, "per_block=4096", "4096 channels per block; wanted 1 to 1024"),
        ({}, "per_block=0", "per_block=0"),
        ({}, "two-pass", "'two-pass' is none of two_pass, cluster, width="),
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
        ({"l": 49}, "rows=418 lanes=8", "rows=418 of 98 bytes; wanted at most 40960 bytes of them"),
        ({"l": 49, "backward": True}, "rows=209", "rows=209 of 196 bytes; wanted at most 40960"),
        ({"l": 56 * 56}, "rows=7", "rows=7 of 6272 bytes; wanted at most 40960"),  # 16 bytes fit
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
def test_what_cannot_be_served_names_the_limit(call, forced, message):
    with pytest.raises(ValueError, match=message):
        plan(**call, forced=forced)


def test_an_option_of_both_algorithms_asks_for_none():
    for call, lanes in (({}, 256), ({}, 32), ({"c": 32, "l": 49, "channels_last": True}, 2)):
        assert plan(**call, forced=f"lanes={lanes}").lanes == lanes
    assert plan(forced="lanes=256").launches[0][0] == "squeeze", "no cluster has so many"


def test_an_old_gpu_is_refused():
    with pytest.raises(ValueError, match="V100 is sm_70; wanted sm_75 on"):
        plan(C.Device("V100", 70, 80, 96 << 10, 96 << 10, [0] * 5, 0.8e6, 6 << 20))


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"device is 'H1000'; wanted one of T4, A100, .*RTX 5090"):
        C.preset("H1000")


CALLS = st.fixed_dictionaries(
    {
        "n": st.integers(1, 300), "c": st.integers(1, 5000), "r": st.integers(0, 800),
        "l": st.one_of(st.integers(1, 300), st.integers(1, 100_000)),
        "dtype": st.sampled_from(["float32", "float64", "float16", "bfloat16"]), "channels_last": st.booleans(),
        "backward": st.booleans(), "squeeze": st.integers(0, 2), "alignment": st.sampled_from([1, 2, 4, 8, 16]),
        "pre_act": st.booleans(), "post_act": st.booleans(), "residual": st.booleans(),
    }
)  # fmt: skip


def size_of(dtype):
    return {"float64": 8, "float32": 4}.get(dtype, 2)


@given(st.sampled_from(DEVICES), CALLS)
def test_every_call_has_a_plan_within_the_limits(device, call):
    chosen = C.plan(device, **call)
    n, c, backward, own_residual = call["n"], call["c"], call["backward"], call["residual"]
    for name, blocks, shared, size, threads in chosen.launches:
        assert 1 <= blocks < 2**31, name
        if size == 0:
            assert threads == 256
            assert 0 < shared <= 48 << 10, name  # what every GPU gives a block without asking
        else:
            assert threads in (256, 512)
            assert device.clusters[size.bit_length() - 1] > 0
            assert blocks == n * size
            assert shared <= device.shared_per_block
    assert 1 <= chosen.splits <= 64
    row = call["l"] * size_of(call["dtype"])
    whole = n * c * row
    if "cluster" in str(chosen).splitlines()[0]:
        assert chosen.rows == 0
        maps = 2 + (own_residual and call["post_act"]) if backward else 1 + own_residual
        assert (chosen.map_bytes_read, chosen.map_bytes_written) == (maps * whole, whole)
        assert "not two_pass: predicted" in str(chosen)
        assert not call["channels_last"] or (c * size_of(call["dtype"]) % 16 == 0 and call["alignment"] == 16)
    else:
        assert "not cluster: " in str(chosen)
        # All rows go through shared memory that 16 bytes do not fit, where they can.
        maps = 2 + (own_residual and call["post_act"]) if backward else 1
        staged = not call["channels_last"] and call["alignment"] == 16 and size_of(call["dtype"]) < 8
        assert (chosen.rows > 0) == (staged and row % 16 > 0 and maps * row <= 40 << 10)
        if chosen.rows:
            assert chosen.splits == 1
            assert chosen.rows <= c
            assert chosen.rows * row * maps <= 40 << 10
            assert chosen.launches[0][1] == n * -(-c // chosen.rows)


@pytest.mark.parametrize(
    ("call", "size", "threads"),
    [
        ({"n": 1, "l": 7 * 7, "c": 960, "channels_last": True}, 8, 512),  # each doubling costs an exchange,
        ({"n": 1, "l": 7 * 7, "c": 960}, 16, 512),  # and halves what a block has, in accesses of 2 bytes
        ({"n": 396, "l": 7 * 7, "c": 256}, 1, 256),  # three samples a multiprocessor: one wave
        ({"n": 32, "l": 56 * 56}, 16, 256),  # 1.6 MB need 8 blocks, 16 leave room for two a multiprocessor
    ],
)
def test_the_size_of_the_cluster(call, size, threads):
    ((_, blocks, _, chosen, of_block),) = cluster(**call).launches
    assert (chosen, of_block) == (size, threads)
    assert blocks == size * call["n"]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("threads", [256, 512])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cluster_splits_channels_whatever_its_size(size, threads, backward, channels_last):
    call = {"c": 1000, "l": 7 * 7, "channels_last": channels_last, "backward": backward}
    chosen = cluster(**call, forced=f"size={size} threads={threads}")
    assert chosen.launches[0][3:] == (size, threads)
    assert f"{32 * size} blocks of {threads} threads in clusters of {size}, " in str(chosen)
    channels = -(-125 // size) * 8  # in whole 16 bytes of float16
    assert chosen.per_block == (49 if channels_last else channels * 49)
    assert f" of {'' if channels_last else 'at most '}{channels} channels per block" in str(chosen)
    assert (chosen.width, chosen.splits, chosen.rows) == (16 if channels_last else 2, 1, 0)
    # Backward has two at least along a row, because it reads x from global memory.
    fewest = 2 if backward else 1
    assert channels_last or chosen.lanes == min(32, max(fewest, 2 ** int(math.log2(max(1, threads // channels)))))


@pytest.mark.parametrize(("positions", "width", "lanes"), [(28 * 28, 16, 8), (14 * 14, 8, 4), (7 * 7, 2, 2)])
def test_backward_reads_global_memory_by_threads_side_by_side(positions, width, lanes):
    def chosen(more="", **options):
        return cluster(c=512, l=positions, forced=f"size=4 threads=256{more}", **options)

    assert (chosen().lanes, chosen().width) == (2, width)
    assert chosen(backward=True).lanes == lanes
    assert chosen(" lanes=1", backward=True).lanes == 1
    if positions < 28 * 28:
        assert chosen(backward=True, pre_act=True).lanes == 2  # x is in shared memory too


@given(st.sampled_from(DEVICES), CALLS)
def test_the_first_clusters_begin_within_the_time_in_which_their_bytes_move(device, call):
    with contextlib.suppress(ValueError):
        chosen = C.plan(device, **call, forced="cluster")
        at_once = min(call["n"], chosen.first_wave)
        moved = (chosen.map_bytes_read + chosen.map_bytes_written) * at_once / call["n"]
        assert chosen.first_wave >= 1
        assert 0 <= (at_once - 1) * chosen.stagger_ns <= 1e3 * moved / device.bytes_per_us + 1
        assert (at_once - 1) * chosen.stagger_ns < 1e6  # the most that a thread can sleep


def test_clusters_are_spread_further_where_more_follow():
    spread = [chosen.first_wave * chosen.stagger_ns for chosen in (cluster(n=n, l=14 * 14) for n in (64, 256, 4096))]
    assert spread == sorted(spread)
    assert spread[0] < 0.7 * spread[-1]


def test_channels_that_do_not_divide_in_16_bytes_divide_by_one_where_rows_are_apart():
    assert cluster(c=9, l=49, forced="size=2").per_block == 8 * 49  # 8 and 1
    assert cluster(c=10, l=49, forced="size=4").per_block == 3 * 49  # and 1 for the last


def test_no_cluster_where_none_is_resident():
    clusters = [16, 8, 4, 0, 0]
    sliced = C.Device(
        "a slice of an H200", 90, 16, H200.shared_per_block, H200.shared_per_multiprocessor, clusters, 0.5e6, 6 << 20
    )
    assert plan(sliced, forced="").launches[0][0] == "squeeze"
    with pytest.raises(ValueError, match=r"each of 4 blocks would need .* a slice of an H200 has 232448"):
        cluster(sliced)
    with pytest.raises(ValueError, match="a slice of an H200 has no clusters of 8 blocks"):
        cluster(sliced, forced="size=8")
    with pytest.raises(ValueError, match="A100 has no clusters: they need sm_90"):
        cluster(C.preset("A100"))
    assert "not cluster: each of 16 blocks would need" in str(plan(forced="", c=64, l=300 * 300))


def test_the_bytes_of_the_maps_in_a_cluster():
    whole = 32 * 256 * 56 * 56 * 2
    assert (cluster().map_bytes_read, cluster().map_bytes_written) == (whole, whole)
    assert cluster(residual=True).map_bytes_read == 2 * whole
    small = {"l": 14 * 14}
    for options in ({}, {"squeeze": 1}, {"pre_act": True}, {"post_act": True}):
        back = cluster(backward=True, **small, **options)
        assert (back.map_bytes_read, back.map_bytes_written) == (whole // 8, whole // 16)
    back = cluster(backward=True, post_act=True, residual=True, **small)
    assert back.map_bytes_read == 3 * whole // 16


CLUSTERS = [f"cluster size={size} threads={threads}" for size in (1, 2, 4, 8, 16) for threads in (256, 512)]


def forced_plans(device, call):
    """By name, the plans of each algorithm and kind of cluster that serve a call."""
    plans = {"two_pass": C.plan(device, **call, forced="two_pass")}
    for forced in CLUSTERS:
        with contextlib.suppress(ValueError):
            plans[forced] = C.plan(device, **call, forced=forced)
    return plans


def name_of(chosen):
    """That of the forced plan which a choice is."""
    _, _, _, size, threads = chosen.launches[0]
    return f"cluster size={size} threads={threads}" if size else "two_pass"


@given(st.sampled_from(DEVICES), CALLS)
def test_the_planner_takes_the_plan_that_is_predicted_to_be_the_fastest(device, call):
    chosen, plans = C.plan(device, **call), forced_plans(device, call)
    assert all(0 < other.predicted_us < math.inf for other in plans.values())
    assert chosen.predicted_us == min(other.predicted_us for other in plans.values())
    same = plans[name_of(chosen)]
    assert str(same).splitlines()[:-1] == str(chosen).splitlines()[:-1]  # but for why it is no other


@given(st.sampled_from(DEVICES), st.lists(CALLS, min_size=2, max_size=5))
def test_the_choice_depends_on_the_call_and_the_device_alone(device, calls):
    first = [str(C.plan(device, **call)) for call in calls]
    assert [str(C.plan(device, **call)) for call in reversed(calls)] == first[::-1]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda call: str(C.plan(device, **call)), calls)) == first
    same = C.Device(
        "another name", device.capability, device.multiprocessors, device.shared_per_block,
        device.shared_per_multiprocessor, device.clusters, device.bytes_per_us, device.l2_bytes,
    )  # fmt: skip
    assert [str(C.plan(same, **call)).replace("another name", device.name) for call in calls] == first


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


@given(CALLS, st.floats(1.1, 10))
def test_a_faster_memory_is_never_predicted_to_take_longer(call, factor):
    for name, chosen in forced_plans(H200, call).items():
        faster = C.Device(
            "faster", 90, 132, H200.shared_per_block, H200.shared_per_multiprocessor, H200.clusters,
            H200.bytes_per_us * factor, H200.l2_bytes,
        )  # fmt: skip
        assert C.plan(faster, **call, forced=name).predicted_us <= chosen.predicted_us * (1 + 1e-12)


def test_the_presets_say_how_fast_and_large_their_memories_are():
    for device in DEVICES:
        assert 0.2e6 < device.bytes_per_us < 8e6, device.name  # T4's 320 GB/s to B200's 8 TB/s
        assert 4 << 20 <= device.l2_bytes <= 126 << 20, device.name


def test_explain_prints_the_plan_of_the_device_with_its_prediction(monkeypatch):
    limits = [
        H200.capability, H200.multiprocessors, H200.shared_per_block, H200.shared_per_multiprocessor, *H200.clusters,
        int(H200.bytes_per_us), H200.l2_bytes,
    ]  # fmt: skip
    monkeypatch.setattr(backends, "cuda_limits", lambda index: limits)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    for x in (torch.empty(32, 256, 7, 7, dtype=torch.float16), torch.empty(1, 24, 300, 300)):
        text = launch.plan(x, 16, Options.of(), own_residual=False)
        n, c, *spatial = x.shape
        assert text == str(C.plan(H200, n=n, c=c, r=16, l=math.prod(spatial), dtype=str(x.dtype)[6:]))
        assert re.search(f"predicted: {PREDICTED}", text)


MEASURED = ROOT / "benchmarks/results/h200/plans_gpu.csv"


def measured_forward(file=MEASURED):
    """By call, the median microseconds of each plan that an H200 has timed and that can still be forced."""
    times = defaultdict(dict)
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["direction"] == "forward" and row["plan"] in ("two_pass", *CLUSTERS):
                times[row["shape"], int(row["r"]), row["dtype"], row["layout"]][row["plan"]] = float(row["p50_us"])
    return times if any(name in CLUSTERS for plans in times.values() for name in plans) else {}


def test_the_choice_is_near_the_fastest_plan_that_was_measured():
    losses = {}
    for call, times in measured_forward().items():
        shape, r, dtype, layout = call
        n, c, h, w = map(int, shape.split("x"))
        chosen = plan(n=n, c=c, r=r, l=h * w, dtype=dtype, channels_last=layout == "channels_last", forced="")
        losses[call] = times[name_of(chosen)] / min(times.values()) - 1
    if not losses:
        pytest.skip("the plans of today have not been timed")
    assert len(losses) == 36
    assert statistics.mean(losses.values()) < 0.08, losses
    assert max(losses.values()) < 0.25, losses
