"""The CUDA kernels, run thread by thread on the CPU and compared with the reference in float64.

dev/emulator also checks every call: no access is misaligned or outside a buffer, no barrier is divergent, and the
call reads and writes as many bytes of the maps as the plan says.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, Case, assert_close, call, cases, truth
from gradients import ORDER_KEEPING, compare
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import se_fused
from dev import emulator
from se_fused import HardSigmoid, implementation, native
from se_fused.memory import is_channels_last
from se_fused.options import ACTIVATIONS, GATES, SQUEEZES


@pytest.fixture(scope="module")
def cuda():
    return emulator.Library(emulator.library())


@pytest.fixture(autouse=True)
def served(cuda):
    with cuda.forced():
        cuda.setup()
        yield


GPUS = ("T4", "RTX 4090", "H200")  # two_pass; one block or a cluster of several if a sample fits
SIZES = (1, 2, 4, 8)  # 16 takes long here, so only the named shapes use it
THREADS = (256, 512)
SEEDS = st.integers(0, 2**32)


@st.composite
def plans(draw, case):
    """A forced plan that can run the case: a choice of the planner for other shapes must be right for this one too."""
    channels_last = case.layout.startswith("channels_last") and case.c > 1
    threads_per_row = (1, 2, 4, 8, 16, 32) if channels_last else ()
    positions = math.prod(case.spatial)
    fewest = max(
        1, positions * (1 if channels_last else case.c) // 16
    )  # few blocks, because each takes milliseconds here
    # Staged rows, whether or not they are a multiple of 16 bytes; backward stages x and g.
    row = positions * torch.finfo(case.dtype).bits // 8
    rows = 0 if channels_last or case.dtype is torch.float64 else (40 << 10) // (3 * row)
    if rows and alignment(case) == 16 and draw(st.booleans()):
        return f"rows={draw(st.integers(0, min(rows, case.c + 3)))}"
    options = {
        "splits": draw(st.integers(1, 9)),
        "per_block": draw(st.integers(fewest, fewest + 500)) if positions >= 4 else None,
        "fused_hidden": draw(st.sampled_from([0, 1])) if case.r else None,
        "threads_per_row": draw(st.sampled_from(threads_per_row)) if threads_per_row else None,
    }
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None and draw(st.booleans()))


def map_order(case):
    """Whether a call reads its maps in channels_last order."""
    return is_channels_last(torch.empty_like(case.tensors()["x"]))


def alignment(case):
    """The alignment of the address of x that the kernels get."""
    address = implementation.dense(case.tensors()["x"], map_order(case)).data_ptr()
    return min(16, address & -address)


def cluster_plans(case, backward):
    """The cluster plans that can run the case, of every size and block length."""
    positions, options, aligned_to = math.prod(case.spatial), case.options, alignment(case)
    channels_last = positions == 1 or (map_order(case) and case.c > 1)

    def can_run(plan):
        try:
            native.load_extension().plan(
                native.load_extension().preset("H200"), n=case.n, c=case.c, r=case.r or 0, l=positions,
                dtype=str(case.dtype).removeprefix("torch."), backward=backward, forced=plan,
                channels_last=channels_last, alignment=aligned_to, residual=case.residual == "map",
                squeeze=SQUEEZES.index(options.get("squeeze", "mean")),
                pre_act=case.affine or options.get("pre_act") is not None,
                post_act=options.get("post_act") is not None,
            )  # fmt: skip
        except ValueError:
            return False
        return True

    plans = [f"cluster size={size} threads={threads}" for size in SIZES for threads in THREADS]
    return [plan for plan in plans if can_run(plan)]


def forward(case):
    tensors = case.tensors()
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options)
    assert_close(y, truth(tensors, case.options), case.dtype)
    return y


BELOW_FLOAT64 = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.long
@given(cases(), st.data(), SEEDS)
@settings(max_examples=120)
def test_forward(cuda, case, data, seed):
    forced = data.draw(plans(case))
    cuda.setup("T4", forced, seed)
    y = forward(case)
    cuda.setup("T4", forced, seed + 1)
    assert torch.equal(y.nan_to_num(), forward(case).nan_to_num()), "another schedule gives other bits"


@given(cases(BELOW_FLOAT64, ORDER_KEEPING, ("contiguous",)), st.data(), SEEDS)
@settings(max_examples=60)
def test_rows_through_shared_memory(cuda, case, data, seed):
    """Rows of every length and number, in both directions."""
    row = 3 * math.prod(case.spatial) * torch.finfo(case.dtype).bits // 8  # rows of g, x and a residual
    assume(math.prod(case.spatial) > 1)
    rows = data.draw(st.integers(1, min((40 << 10) // row, case.c + 3)))
    cuda.setup("T4", f"rows={rows}", seed)
    y = forward(case)
    assert f"{rows} rows at a time through shared memory" in cuda.last_plan()
    cuda.setup("T4", f"rows={rows}", seed + 1)
    assert torch.equal(y.nan_to_num(), forward(case).nan_to_num()), "another schedule gives other bits"
    compare(replace(case, affine=False))
    assert "two_pass backward" in cuda.last_plan()
    assert f"{rows} rows at a time through shared memory" in cuda.last_plan()


@pytest.mark.long
@given(cases(dtypes=BELOW_FLOAT64), st.data(), SEEDS)
@settings(max_examples=80)
def test_forward_in_clusters_of_every_size(cuda, case, data, seed):
    serving = cluster_plans(case, backward=False)
    assume(serving)
    forced = data.draw(st.sampled_from(serving))
    cuda.setup("H200", forced, seed)
    y = forward(case)
    assert "cluster forward, 1 launch" in cuda.last_plan()
    cuda.setup("H200", forced, seed + 1)
    assert torch.equal(y.nan_to_num(), forward(case).nan_to_num()), "another schedule gives other bits"


@pytest.mark.long
@given(cases(dtypes=BELOW_FLOAT64, pre_acts=ORDER_KEEPING, affines=(False,)), st.data(), SEEDS)
@settings(max_examples=80)
def test_gradients_in_clusters_of_every_size(cuda, case, data, seed):
    forwards = cluster_plans(case, backward=False)
    serving = [plan for plan in cluster_plans(case, backward=True) if plan in forwards]
    assume(serving)
    cuda.setup("H200", data.draw(st.sampled_from(serving)), seed)
    compare(case)
    assert "cluster backward" in cuda.last_plan()


@given(cases(BELOW_FLOAT64, ORDER_KEEPING, ("channels_last",)), st.sampled_from(SIZES), SEEDS)
@settings(max_examples=60)
def test_channels_last_in_clusters(cuda, case, size, seed):
    case.c = 8 * (case.c % 9 + size)  # a multiple of 16 bytes in every dtype, for every block
    plan = f"cluster size={size} threads=256"
    assume(plan in cluster_plans(case, backward=True))
    cuda.setup("H200", plan, seed)
    forward(case)
    compare(replace(case, affine=False))
    assert "cluster backward" in cuda.last_plan()


@given(cases(layouts=("contiguous", "channels_last", "offset")), st.sampled_from(GPUS), SEEDS)
@settings(max_examples=60)
def test_in_place(cuda, case, gpu, seed):
    cuda.setup(gpu, seed=seed)
    tensors = case.tensors()
    expected = truth(tensors, case.options)
    with torch.no_grad():
        y = call(se_fused.squeeze_excite, tensors, case.options, inplace=True)
    assert y is tensors["x"]
    assert_close(y, expected, case.dtype)


@given(cases(pre_acts=ORDER_KEEPING, affines=(False,)), SEEDS)
@settings(max_examples=120)
def test_gradients(cuda, case, seed):
    cuda.setup("T4", "", seed)
    compare(case)


@given(cases(dtypes=(torch.float64,)), SEEDS)
@settings(max_examples=60)
def test_gradients_of_every_option_in_float64(cuda, case, seed):
    assume(case.layout != "expanded" or case.options["pre_act"] in ORDER_KEEPING)
    cuda.setup(seed=seed)
    compare(case)


NAMED = {
    "7x7": Case(n=2, c=24, r=6, spatial=(7, 7)),
    "14x14": Case(n=2, c=16, r=4, spatial=(14, 14)),
    "odd C": Case(n=3, c=27, r=5, spatial=(5, 5)),
    "R = 1": Case(n=2, c=16, r=1, spatial=(6, 6)),
    "R = 308, C = 3024": Case(n=1, c=3024, r=308, spatial=(2, 2)),
    "L = 1": Case(n=2, c=40, r=10, spatial=(1, 1)),
    "L = 1, more channels than a block takes": Case(n=1, c=1300, r=13, spatial=(1, 1)),
    "one row for a block": Case(n=1, c=2, r=1, spatial=(64, 80)),
    "one-FC form": Case(n=2, c=40, r=None, spatial=(5, 5)),
    "a misaligned base": Case(n=2, c=16, r=4, spatial=(8, 8), layout="offset"),
    "more samples than share the weights": Case(n=9, c=12, r=3, spatial=(3, 3)),
    "rows of odd length, more than a block stages": Case(n=2, c=75, r=5, spatial=(11, 13)),
    "rows of odd length, one of which a block stages": Case(n=1, c=3, r=2, spatial=(61, 67)),
    "rows shorter than an access": Case(n=3, c=21, r=5, spatial=(3,)),
    "rows of half an access and whole ones": Case(n=2, c=18, r=4, spatial=(2, 6)),
    "rows of two elements": Case(n=2, c=37, r=4, spatial=(2,)),
}


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize("spatial", [(7, 7), (9,), (3, 3, 5), (1,), (5, 4)], ids=str)
@pytest.mark.parametrize("dtype", BELOW_FLOAT64, ids=str)
def test_staged_rows_of_named_lengths(cuda, rows, spatial, dtype):
    cuda.setup("T4", f"rows={rows}")
    for options in ({}, {"squeeze": "mean_max"}, {"squeeze": "max", "post_act": "silu"}):
        case = Case(n=2, c=33, r=6, spatial=spatial, dtype=dtype, residual="map", options=options)
        forward(case)
        staged = f"{rows} rows at a time through shared memory" in cuda.last_plan()
        assert staged or spatial == (1,)  # a map of one position is channels_last
        compare(case)
        assert staged == (f"{rows} rows at a time through shared memory" in cuda.last_plan())


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gpu", GPUS)
def test_named_shapes(cuda, name, dtype, layout, gpu):
    cuda.setup(gpu)
    case = NAMED[name]
    if case.c > 2000 and dtype is not torch.float32:
        pytest.skip("many weights take seconds here")
    if layout == "channels_last" and case.layout != "contiguous":
        pytest.skip("the case tests its own layout")
    layout = case.layout if case.layout != "contiguous" else layout
    case = Case(n=case.n, c=case.c, r=case.r, spatial=case.spatial, dtype=dtype, layout=layout, bias=False)
    for squeeze in ("mean", "mean_max"):
        case.options = {"squeeze": squeeze}
        forward(case)
        compare(case)


OPTIONS = (
    [{"act": name} for name in ACTIVATIONS]
    + [{"pre_act": name} for name in ACTIVATIONS]
    + [{"post_act": name} for name in ACTIVATIONS]
    + [{"gate": gate} for gate in (*GATES, HardSigmoid(0.2, 0.5))]
    + [{"squeeze": squeeze} for squeeze in SQUEEZES]
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("residual", ["none", "map", "x"])
@pytest.mark.parametrize(
    ("plan", "layouts"),
    [
        ("two_pass", ("contiguous", "channels_last")),
        ("cluster size=2", ("contiguous", "channels_last")),
    ],
)
def test_every_option(cuda, options, residual, plan, layouts):
    cuda.setup("H200", plan)
    dtype = torch.float64 if plan == "two_pass" else torch.float32
    for layout in layouts:
        case = Case(c=24, r=5, spatial=(3, 7), dtype=dtype, layout=layout, residual=residual, options=options)
        forward(case)
        compare(case)


@pytest.mark.parametrize("options", [{}, *OPTIONS[-2:], {"pre_act": "silu", "post_act": "relu"}], ids=str)
@pytest.mark.parametrize("residual", ["none", "map", "x"])
@pytest.mark.parametrize("spatial", [(3, 7), (4, 4), (2, 6), (3,), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS)
def test_scale_and_shift(cuda, gpu, dtype, layout, spatial, residual, options):
    cuda.setup(gpu)
    case = Case(n=3, c=24, r=5, spatial=spatial, layout=layout, dtype=dtype, residual=residual, options=options)
    forward(replace(case, affine=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("gpu", GPUS)
def test_special_values_stay_in_their_sample(cuda, value, squeeze, gpu):
    cuda.setup(gpu)
    case = Case(n=3, options={"squeeze": squeeze})
    tensors = case.tensors()
    tensors["x"][1, 2, 3, 4] = value
    y = call(se_fused.squeeze_excite, tensors, case.options)
    assert_close(y, truth(tensors, case.options), case.dtype)
    assert y[::2].isfinite().all()


@pytest.mark.parametrize("backward", [False, True])
def test_the_clusters_that_can_run_at_once_begin_one_after_the_other(cuda, backward):
    n, size = 9, 16
    forced = f"size={size} threads=512"
    cuda.setup("H200", forced)
    case = Case(n=n, c=128, r=2, spatial=(4, 8), dtype=torch.float32, layout="channels_last")
    (compare if backward else forward)(case)
    facts = native.load_extension()
    call = {"n": n, "c": 128, "r": 2, "l": 32, "dtype": "float32", "channels_last": True, "forced": forced}
    plan = facts.plan(facts.preset("H200"), backward=backward, **call)
    assert plan.first_wave == 7  # clusters of 16 blocks, with one block per SM
    apart = plan.stagger_ns
    assert apart > 0
    expected = {cluster * size + block: {cluster * apart} for cluster in range(1, 7) for block in range(size)}
    assert cuda.slept() == expected
    assert f"the first 7 clusters {apart} ns apart" in cuda.last_plan()


def test_integer_atomics_count_in_the_order_of_the_schedule(cuda):
    orders = set()
    for seed in range(3):
        cuda.setup(seed=seed)
        orders.add(tuple(cuda.tickets(12).tolist()))
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(orders) == 3


def test_an_empty_batch():
    case = Case(n=0)
    assert call(se_fused.squeeze_excite, case.tensors(), {}).shape == (0, case.c, *case.spatial)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gpu", GPUS)
def test_large_maps_move_in_16_byte_accesses(cuda, layout, gpu):
    cuda.setup(gpu)
    forward(Case(n=1, c=32, r=4, spatial=(16, 16), dtype=torch.float16, layout=layout))
    assert cuda.wide_fraction() == 1
