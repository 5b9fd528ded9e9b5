"""The decisions of csrc/plan/, on any machine: which algorithm, which launches, which accesses."""

import contextlib
import csv
import itertools
import math
import re
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner import CALLS, CLUSTERS, DEVICES, H200, ROOT, C, cluster, forced_plans, plan


@pytest.mark.parametrize(
    ("call", "vec_bytes"),
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
def test_the_widest_access_that_every_row_allows(call, vec_bytes):
    assert plan(**call).vec_bytes == vec_bytes


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
    # No plan launches `occupant`: a device is asked how many clusters of it can run. The plans of batch norms are not
    # for Python.
    others = ["occupant", "batch_norm_kernel", "scale_shift_kernel"]
    assert sorted(kernels) == sorted([*others, *(f"{name}_kernel" for name in launches)])


def test_one_row_is_split_until_the_gpu_is_full():
    small, large = (plan(n=n, c=32, r=8, l=112 * 112, dtype="float32") for n in (4, 256))
    assert small.splits == 3
    assert large.splits == 1
    assert plan(C.preset("T4"), n=4, c=32, r=8, l=112 * 112, dtype="float32").splits < small.splits


@pytest.mark.parametrize(
    ("call", "rows", "threads_per_row"),
    [
        ({"l": 7 * 7}, 21, 8),  # halved until 132 SMs have 4 blocks each, or at most 32 rows are left
        ({"l": 7 * 7, "n": 512}, 167, 1),  # 16 KiB of rows
        ({"l": 7 * 7, "n": 512, "dtype": "float32"}, 83, 2),
        ({"l": 7 * 7, "n": 512, "backward": True}, 83, 2),  # 16 KiB of two maps
        ({"l": 7 * 7, "n": 512, "backward": True, "post_act": True, "residual": True}, 55, 4),  # 16 KiB of three maps
        ({"l": 7 * 7, "n": 528, "c": 40}, 40, 4),  # all rows of a sample
        ({"l": 14 * 14, "n": 1}, 21, 8),  # 8-byte accesses
        ({"l": 143 * 143}, 1, 32),  # 40,898 of 40,960 bytes
        ({"l": 145 * 145}, 0, 256),
        ({"l": 56 * 56}, 0, 32),  # 16-byte accesses
        ({"l": 7 * 7, "alignment": 8}, 0, 8),
        ({"l": 7 * 7, "dtype": "float64"}, 0, 8),
        ({"l": 7 * 7, "channels_last": True}, 0, 8),
        ({"l": 7 * 7, "forced": "two_pass splits=1"}, 0, 8),
        ({"l": 7 * 7, "forced": "rows=0"}, 0, 8),
        ({"l": 7 * 7, "forced": "rows=5"}, 5, 32),
        ({"l": 56 * 56, "forced": "rows=2"}, 2, 32),
    ],
)
def test_rows_that_are_not_a_multiple_of_16_bytes_are_staged(call, rows, threads_per_row):
    chosen = plan(**call)
    assert (chosen.rows, chosen.threads_per_row) == (rows, threads_per_row)
    assert (f"{rows} rows at a time through shared memory" in str(chosen)) == (rows > 0)
    if rows:
        whole = {"n": 32, "c": 256} | call
        assert chosen.splits == 1
        assert chosen.launches[0][1] == whole["n"] * -(-whole["c"] // rows)
        direct = plan(**call | {"forced": "rows=0"})
        assert (chosen.map_bytes_read, chosen.map_bytes_written) == (direct.map_bytes_read, direct.map_bytes_written)
        assert chosen.scratch_bytes == direct.scratch_bytes / direct.splits


def test_the_bytes_of_the_maps():
    whole = 32 * 256 * 56 * 56 * 2
    assert (plan().map_bytes_read, plan().map_bytes_written) == (2 * whole, whole)
    assert plan(residual=True).map_bytes_read == 3 * whole
    back = plan(backward=True)
    assert (back.map_bytes_read, back.map_bytes_written) == (3 * whole, whole)  # dx does not depend on x
    assert plan(backward=True, squeeze=1).map_bytes_read == 4 * whole


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
            assert 0 < shared <= 48 << 10, name  # every GPU gives a block this much by default
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
        # Rows that are not a multiple of 16 bytes are staged if they can be.
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
        ({"n": 1, "l": 7 * 7, "c": 960, "channels_last": True}, 8, 512),  # each doubling costs an exchange
        ({"n": 1, "l": 7 * 7, "c": 960}, 16, 512),  # and halves the tile of a block, which needs 2-byte accesses
        ({"n": 396, "l": 7 * 7, "c": 256}, 1, 256),  # three samples per SM: one wave
        ({"n": 32, "l": 56 * 56}, 16, 256),  # 1.6 MB need 8 blocks; 16 leave room for two per SM
    ],
)
def test_the_size_of_the_cluster(call, size, threads):
    ((_, blocks, _, chosen, of_block),) = cluster(**call).launches
    assert (chosen, of_block) == (size, threads)
    assert blocks == size * call["n"]


@given(st.sampled_from(DEVICES), CALLS)
def test_the_first_clusters_begin_within_the_time_in_which_their_bytes_move(device, call):
    with contextlib.suppress(ValueError):
        chosen = C.plan(device, **call, forced="cluster")
        at_once = min(call["n"], chosen.first_wave)
        moved = (chosen.map_bytes_read + chosen.map_bytes_written) * at_once / call["n"]
        assert chosen.first_wave >= 1
        assert 0 <= (at_once - 1) * chosen.stagger_ns <= 1e3 * moved / device.bytes_per_us + 1
        assert (at_once - 1) * chosen.stagger_ns < 1e6  # the longest sleep of a thread


def test_clusters_are_spread_further_where_more_follow():
    spread = [chosen.first_wave * chosen.stagger_ns for chosen in (cluster(n=n, l=14 * 14) for n in (64, 256, 4096))]
    assert spread == sorted(spread)
    assert spread[0] < 0.7 * spread[-1]


def test_no_cluster_if_the_device_can_run_none():
    clusters = [16, 8, 4, 0, 0]
    sliced = C.Device("a slice of an H200", 90, 16, H200.shared_per_block, H200.shared_per_sm, clusters, 0.5e6, 6 << 20)
    assert plan(sliced, forced="").launches[0][0] == "squeeze"
    with pytest.raises(ValueError, match=r"each of 4 blocks would need .* a slice of an H200 has 232448"):
        cluster(sliced)
    with pytest.raises(ValueError, match="a slice of an H200 has no clusters of 8 blocks"):
        cluster(sliced, forced="size=8")
    with pytest.raises(ValueError, match="T4 has no clusters: they need sm_90, or sm_80 for one block"):
        cluster(C.preset("T4"))
    assert "not cluster: each of 16 blocks would need" in str(plan(forced="", c=64, l=300 * 300))


def test_before_sm_90_one_block_holds_a_sample_that_fits():
    a100, rtx, t4 = map(C.preset, ("A100", "RTX 4090", "T4"))
    fits = {"n": 256, "c": 512, "r": 32, "l": 7 * 7}  # 49 KiB
    for device in (a100, rtx):
        ((name, blocks, _, size, _),) = plan(device, forced="", **fits).launches
        assert (name, blocks, size) == ("forward_cluster", 256, 1)
        assert plan(device, forced="cluster", **fits, backward=True).launches[0][3] == 1
    assert plan(t4, forced="", **fits).launches[0][0] == "squeeze"
    larger = fits | {"c": 72, "r": 24, "l": 28 * 28}  # 110 KiB
    assert plan(a100, forced="", **larger).launches[0][0] == "forward_cluster"
    chosen = plan(rtx, forced="", **larger)
    assert chosen.launches[0][0] == "squeeze"
    assert re.search(r"not cluster: 1 block would need \d+ bytes of shared memory; RTX 4090 has 101376", str(chosen))
    with pytest.raises(ValueError, match="A100 has no clusters of 2 blocks"):
        cluster(a100, forced="size=2", **fits)


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


def name_of(chosen):
    """The name of the forced plan that equals a choice."""
    _, _, _, size, threads = chosen.launches[0]
    return f"cluster size={size} threads={threads}" if size else "two_pass"


@given(st.sampled_from(DEVICES), CALLS)
def test_the_planner_takes_the_plan_that_is_predicted_to_be_the_fastest(device, call):
    chosen, plans = C.plan(device, **call), forced_plans(device, call)
    assert all(0 < other.predicted_us < math.inf for other in plans.values())
    assert chosen.predicted_us == min(other.predicted_us for other in plans.values())
    same = plans[name_of(chosen)]
    assert str(same).splitlines()[:-1] == str(chosen).splitlines()[:-1]  # the last line says why it is no other


@given(st.sampled_from(DEVICES), st.lists(CALLS, min_size=2, max_size=5))
def test_the_choice_depends_on_the_call_and_the_device_alone(device, calls):
    first = [str(C.plan(device, **call)) for call in calls]
    assert [str(C.plan(device, **call)) for call in reversed(calls)] == first[::-1]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda call: str(C.plan(device, **call)), calls)) == first
    same = C.Device(
        "another name", device.capability, device.sm_count, device.shared_per_block,
        device.shared_per_sm, device.clusters, device.bytes_per_us, device.l2_bytes,
    )  # fmt: skip
    assert [str(C.plan(same, **call)).replace("another name", device.name) for call in calls] == first


@given(CALLS, st.floats(1.1, 10))
def test_a_faster_memory_is_never_predicted_to_take_longer(call, factor):
    for name, chosen in forced_plans(H200, call).items():
        faster = C.Device(
            "faster", 90, 132, H200.shared_per_block, H200.shared_per_sm, H200.clusters,
            H200.bytes_per_us * factor, H200.l2_bytes,
        )  # fmt: skip
        assert C.plan(faster, **call, forced=name).predicted_us <= chosen.predicted_us * (1 + 1e-12)


def test_the_presets_say_how_fast_and_large_their_memories_are():
    for device in DEVICES:
        assert 0.2e6 < device.bytes_per_us < 8e6, device.name  # T4's 320 GB/s to B200's 8 TB/s
        assert 4 << 20 <= device.l2_bytes <= 126 << 20, device.name


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
