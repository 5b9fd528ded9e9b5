"""The decisions of csrc/plan/, on any machine: which launches, which accesses, and what cannot be forced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from se_fused import native

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
        ({"backward": True}, ["reduce", "hidden_gradient", "distribute", "weight_gradients"]),
        ({"backward": True, "r": 0}, ["reduce", "distribute", "weight_gradients"]),
    ],
)
def test_the_launches(call, names):
    assert [name for name, *_ in plan(**call).launches] == names


def test_one_row_is_split_until_the_gpu_is_full():
    small, large = (plan(n=n, c=32, r=8, l=112 * 112, dtype="float32") for n in (4, 256))
    assert small.splits == 3
    assert large.splits == 1
    assert plan(C.preset("T4"), n=4, c=32, r=8, l=112 * 112, dtype="float32").splits < small.splits


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
        ({}, "lanes=7", "lanes=7 along a row"),
        ({"channels_last": True}, "lanes=64", "lanes=64 along the channels"),
        ({}, "splits=65", "splits=65; wanted 1 to 64"),
        ({"r": 300}, "fused_hidden=1", "fused_hidden=1 with R = 300; wanted 1 to 256"),
        ({"l": 1, "c": 4096}, "per_block=4096", "4096 channels a block; wanted 1 to 1024"),
        ({}, "per_block=0", "per_block=0"),
        ({}, "two-pass", "'two-pass' is none of two_pass, cluster, width="),
        ({}, "two_pass size=4", "asks for both two_pass and cluster"),
        ({}, "size=3", "cluster: size=3; wanted 1, 2, 4, 8 or 16"),
        ({}, "size=4", "each of 4 blocks would need 4[0-9]{5} bytes of shared memory; H200 has 232448"),
        ({"c": 9}, "size=8", "a sample does not divide among 8 blocks"),
        ({"c": 128, "l": 4, "channels_last": True}, "size=8", "a sample does not divide among 8 blocks"),
        ({"c": 28, "l": 49, "channels_last": True}, "size=2 by_channels=1", "among 2 blocks by channels"),
        ({"c": 32, "l": 49}, "size=2 by_channels=0", "among 2 blocks by positions"),
        ({"c": 32, "l": 49, "channels_last": True}, "size=2 by_channels=2", "by_channels=2; wanted 0 or 1"),
        ({"l": 49}, "size=2 samples=3", "samples=3; wanted 1 or 4"),
        ({"c": 27, "l": 49, "channels_last": True}, "by_channels=1", "among 1 block by channels"),
        ({"c": 27, "l": 49, "channels_last": True}, "samples=4", "by channels, which several samples need"),
        ({}, "size=16 samples=4", "each of 16 blocks would need 4[0-9]{5} bytes"),
        ({"dtype": "float64"}, "cluster", "cluster: its kernels are not compiled for float64"),
        ({}, "splits=many", "'splits=many' has no number"),
        ({"l": 2**30 + 1}, "", "1073741825 positions a channel; wanted at most 2\\^30"),
    ],
)
def test_what_cannot_be_served_names_the_limit(call, forced, message):
    with pytest.raises(ValueError, match=message):
        plan(**call, forced=forced)


def test_an_old_gpu_is_refused():
    with pytest.raises(ValueError, match="V100 is sm_70; wanted sm_75 on"):
        plan(C.Device("V100", 70, 80, 96 << 10, 96 << 10, [0] * 5))


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"device is 'H1000'; wanted one of T4, A100, .*RTX 5090"):
        C.preset("H1000")


@given(
    st.sampled_from(DEVICES), st.integers(1, 300), st.integers(1, 5000), st.integers(0, 800), st.integers(1, 100_000),
    st.sampled_from(["float32", "float64", "float16", "bfloat16"]), st.booleans(), st.booleans(),
    st.integers(0, 2), st.sampled_from([1, 2, 4, 8, 16]),
)  # fmt: skip
def test_every_call_has_a_plan_within_the_limits(
    device, n, c, r, positions, dtype, channels_last, backward, squeeze, alignment
):
    chosen = C.plan(
        device, n=n, c=c, r=r, l=positions, dtype=dtype, channels_last=channels_last,
        backward=backward, squeeze=squeeze, alignment=alignment,
    )  # fmt: skip
    for name, blocks, shared, size in chosen.launches:
        assert 1 <= blocks < 2**31, name
        if size == 0:
            assert 0 < shared <= 48 << 10, name  # what every GPU gives a block without asking
        else:
            assert device.clusters[size.bit_length() - 1] > 0
            assert blocks == n * size
            assert shared <= device.shared_per_block
    assert 1 <= chosen.splits <= 64
    whole = n * c * positions * {"float64": 8, "float32": 4}.get(dtype, 2)
    if "cluster" in str(chosen).splitlines()[0]:
        assert (chosen.map_bytes_read, chosen.map_bytes_written) == ((1 + backward) * whole, whole)
    else:
        assert "not cluster: " in str(chosen)


@pytest.mark.parametrize(
    ("call", "size"),
    [
        ({"n": 1, "l": 7 * 7, "c": 960, "channels_last": True}, 16),
        ({"n": 1, "l": 7 * 7, "c": 960}, 16),  # as many multiprocessors as there are, for one sample
        ({"n": 396, "l": 7 * 7, "c": 256}, 1),  # three samples a multiprocessor: one wave
        ({"n": 32, "l": 56 * 56}, 16),  # 1.6 MB need 8 blocks, 16 leave room for two a multiprocessor
    ],
)
def test_the_size_of_the_cluster(call, size):
    ((_, blocks, _, chosen),) = cluster(**call).launches
    assert chosen == size
    assert blocks == size * call["n"]


def test_samples_share_a_cluster_only_where_asked():
    late = {"n": 30, "c": 960, "r": 240, "l": 7 * 7}
    assert cluster(**late).samples == 1
    ((_, blocks, shared, size),) = cluster(**late, forced="size=8 samples=4").launches
    assert (blocks, size) == (8 * 8, 8)  # 4, and 2 in the last
    assert 4 * 960 // 8 * 49 * 2 < shared < H200.shared_per_block
    assert "64 blocks in clusters of 8 for 4 samples" in str(cluster(**late, forced="size=8 samples=4"))
    assert cluster(**late, backward=True, forced="samples=4").samples == 1


def test_channels_last_is_split_by_channels_where_their_piece_of_a_position_is_long():
    for size, by_channels in ((4, True), (8, True), (16, False)):  # pieces of 512, 256 and 128 bytes
        call = {"c": 1024, "l": 14 * 14, "channels_last": True}
        chosen = cluster(**call, forced=f"size={size}")
        assert chosen.by_channels == by_channels
        assert chosen.per_block == (14 * 14 if by_channels else -(-14 * 14 // size))
    assert not cluster(c=1024, l=14 * 14).by_channels  # NCHW


def test_no_cluster_where_none_is_resident():
    clusters = [16, 8, 4, 0, 0]
    sliced = C.Device("a slice of an H200", 90, 16, H200.shared_per_block, H200.shared_per_multiprocessor, clusters)
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
