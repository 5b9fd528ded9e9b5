"""`out=`: the result is written where it was asked for, and nothing else; or the call is refused before it writes."""

import pytest
import torch
from cases import LAYOUTS, Case, assert_close, call, cases, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from strided import places, views
from torch.utils._python_dispatch import TorchDispatchMode

import se_fused
from se_fused import backends, memory

pytestmark = pytest.mark.usefixtures("native")
NAMES = ("x", "w1", "b1", "w2", "b2", "residual", "scale", "shift")


def run(tensors, options=None, **more):
    with torch.no_grad():
        return call(se_fused.squeeze_excite, tensors, options or {}, **more)


def like(x, layout="contiguous"):
    """A map of the shape and dtype of x, full of NaN."""
    out = LAYOUTS[layout](torch.zeros(x.shape, dtype=x.dtype))
    return out.fill_(torch.nan)


@given(cases(), st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"]), st.booleans())
@settings(max_examples=150)
def test_every_call_in_every_order(case, layout, negated):
    tensors = case.tensors()
    expected = truth(tensors, case.options)
    out = like(tensors["x"], layout)
    if negated:
        out = torch._neg_view(out)
    strides, version = out.stride(), out._version
    assert run(tensors, case.options, out=out) is out
    assert out.stride() == strides
    assert out._version > version
    assert_close(out, expected, case.dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("negated", [False, True])
def test_on_each_backend(backend, layout, negated):
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = Case(c=8, r=2, spatial=(5, 7), residual="map", affine=True).tensors()
    out = like(tensors["x"], layout)
    if negated:
        out = torch._neg_view(out)
    with se_fused.use_backend(backend):
        assert run(tensors, out=out) is out
    assert_close(out, truth(tensors, {}), torch.float32)


INPUTS = {"x": (2, 3, 2, 2), "residual": (2, 3, 2, 2), "w2": (3, 3), "b2": (3,), "shift": (3,)}


@given(views(INPUTS), st.booleans())
@settings(max_examples=600)
def test_right_or_refused_wherever_it_lies(drawn, exact):
    out_view, name, other_view = drawn
    if exact and name in ("x", "residual"):
        other_view = out_view
    flat = torch.randn(64)
    out, other = flat.as_strided(*out_view), flat.as_strided(*other_view)
    tensors = {**dict.fromkeys(NAMES), "x": torch.randn(2, 3, 2, 2), "w2": torch.randn(3, 3), name: other}
    if name == "shift":
        tensors["scale"] = torch.randn(3)
    mine, its = places(*out_view), places(*other_view)
    legal = len(set(mine)) == len(mine) and (not set(mine) & set(its) or (name == "x" and mine == its))
    copies = {key: t if t is None else t.clone() for key, t in tensors.items()}
    before = flat.clone()
    if legal:
        assert run(tensors, out=out) is out
        assert_close(out, truth(copies, {}), torch.float32)
        rest = sorted(set(range(64)) - set(mine))
        assert torch.equal(flat[rest], before[rest])
    else:
        message = rf"squeeze_excite: (out is a tensor that overlaps itself|{name} is in the memory of out)"
        with pytest.raises(ValueError, match=message):
            run(tensors, out=out)
        assert torch.equal(flat, before)


def test_slices_of_one_buffer_are_told_apart_without_counting_bytes(monkeypatch):
    """As for a concatenation. Counting the bytes took 82 ms here, and the call itself 6."""
    monkeypatch.setattr(memory, "_occupied_bytes", lambda *_: pytest.fail("counted"))
    both = torch.randn(8, 128, 56, 56)
    tensors = {**dict.fromkeys(NAMES[:6]), "x": both[:, :64], "w2": torch.randn(64, 64)}
    expected = truth(tensors, {})
    assert_close(run(tensors, out=both[:, 64:]), expected, torch.float32)
    interleaved = torch.randn(8, 64, 100, 2)
    tensors["x"] = interleaved[..., 0]
    expected = truth(tensors, {})
    assert_close(run(tensors, out=interleaved[..., 1]), expected, torch.float32)


@given(st.data())
@settings(max_examples=500)
def test_overlap_is_what_counting_bytes_gives(data):
    flat = torch.zeros(256)

    def view(of):
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        steps = [data.draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16])) for _ in shape]
        room = of.numel() - 1 - sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        return of.as_strided(shape, steps, data.draw(st.integers(0, room)))

    a, b = view(flat), view(data.draw(st.sampled_from([flat, flat.view(torch.float16), flat.view(torch.float64)])))
    begin = min(a.data_ptr(), b.data_ptr())
    counted = [memory._occupied_bytes(t, begin, 1024) for t in (a, b)]
    assert memory.overlap(a, b) == bool((counted[0] & counted[1]).any())


X = torch.randn(2, 8, 5, 7)
WANTED = "wanted the shape, dtype and device of x"
BAD = {
    "no tensor": (lambda: "y", TypeError, f"out is 'y'; {WANTED}"),
    "True": (lambda: True, TypeError, f"out is True; {WANTED}"),
    "another dtype": (lambda: torch.empty(X.shape, dtype=torch.float64), TypeError, f"out is .*float64.*{WANTED}"),
    "sparse": (lambda: torch.zeros(X.shape).to_sparse(), TypeError, f"out is a torch.sparse_coo.*{WANTED}"),
    "nested": (lambda: torch.nested.nested_tensor([X[0], X[1]]), TypeError, "out is a nested tensor"),
    "another shape": (lambda: torch.empty(2, 8, 7, 5), ValueError, r"out is .*\[2, 8, 7, 5\].*of x"),
    "no elements": (lambda: torch.empty(0), ValueError, r"out is .*\[0\].*of x"),
    "broadcastable": (lambda: torch.empty(1, 2, 8, 5, 7), ValueError, r"out is .*\[1, 2, 8, 5, 7\].*of x"),
    "another device": (lambda: torch.empty(X.shape, device="meta"), ValueError, "out is .*on meta.*of x"),
    "expanded": (lambda: torch.empty(2, 8, 1, 1).expand(X.shape), ValueError, "out is a tensor that overlaps itself"),
    "requires grad": (lambda: torch.empty(X.shape).requires_grad_(), ValueError, "out is .*or out requires grad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_are_named(name):
    make, error, message = BAD[name]
    tensors = Case(c=8, r=2, spatial=(5, 7)).tensors()
    for grad in (True, False) if name != "requires grad" else (True,):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=f"squeeze_excite: {message}"):
            call(se_fused.squeeze_excite, tensors, {}, out=make())


def test_refused_where_autograd_records():
    tensors = Case().tensors()
    tensors["w2"].requires_grad_()
    out = like(tensors["x"])
    with pytest.raises(ValueError, match=r"out is .*; wanted None, because an input or out requires grad"):
        call(se_fused.squeeze_excite, tensors, {}, out=out)
    assert out.isnan().all()
    assert_close(run(tensors, out=out.requires_grad_()), truth(tensors, {}), torch.float32)


def test_refused_beside_inplace():
    tensors = Case().tensors()
    before = tensors["x"].clone()
    for out in (like(before), tensors["x"]):
        with pytest.raises(TypeError, match=r"out is a tensor .*; wanted None, because inplace is True"):
            run(tensors, inplace=True, out=out)
    assert torch.equal(tensors["x"], before)


def test_freed_and_locked_memory_is_named():
    tensors = Case().tensors()
    freed = like(tensors["x"])[:]
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"out is .*whose storage was freed"):
        run(tensors, out=freed)
    with torch.inference_mode():
        locked = like(tensors["x"])
    with pytest.raises(ValueError, match="out is an inference tensor outside inference mode"):
        run(tensors, out=locked)
    with torch.inference_mode():
        assert_close(run(tensors, out=locked), truth(tensors, {}), torch.float32)


def test_x_itself_is_in_place():
    tensors = Case(residual="x").tensors()
    expected = truth(tensors, {})
    assert run(tensors, out=tensors["x"]) is tensors["x"]
    assert_close(tensors["x"], expected, torch.float32)


def test_an_empty_map():
    tensors = Case(n=0).tensors()
    out = like(tensors["x"])
    assert run(tensors, out=out) is out


def test_under_autocast_it_has_the_dtype_of_the_result():
    tensors = Case(dtype=torch.bfloat16, float_weights=True).tensors()
    tensors["residual"] = torch.randn(tensors["x"].shape)  # float32, so y is too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(tensors)
        out = torch.empty_like(y)
        assert y.dtype is torch.float32
        assert torch.equal(run(tensors, out=out), y)
        with pytest.raises(TypeError, match=r"out is .*bfloat16.*of x"):
            run(tensors, out=tensors["x"])
        with pytest.raises(ValueError, match=r"inplace is True; wanted False, because autocast makes .*float32"):
            run(tensors, inplace=True)
        layer = se_fused.SqueezeExcite(tensors["x"].shape[1], hidden=4, inplace=True)
        with torch.no_grad():
            assert layer(tensors["x"], tensors["residual"]).dtype is torch.float32


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(se_fused.squeeze_excite, fullgraph=True, backend="aot_eager")
    tensors = Case(c=8, r=2).tensors()
    out = like(tensors["x"])
    with torch.no_grad():
        call(compiled, tensors, {}, out=out)
    assert_close(out, truth(tensors, {}), torch.float32)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen.append(str(function))
        return function(*arguments, **(named or {}))


def test_watched_calls_see_the_operator():
    tensors = Case().tensors()
    watch = Watch()
    watch.seen = []
    out = like(tensors["x"])
    with watch:
        assert run(tensors, out=out) is out
    assert_close(out, truth(tensors, {}), torch.float32)
    assert "se_fused.squeeze_excite_out.default" in watch.seen
    with torch.profiler.profile() as profile:
        run(tensors, out=out.fill_(torch.nan))
    assert_close(out, truth(tensors, {}), torch.float32)
    assert "se_fused::squeeze_excite_out" in {event.key for event in profile.key_averages()}


def test_vmap_refuses_what_it_cannot_write():
    tensors = Case().tensors()
    xs, out = torch.stack([tensors["x"]] * 2), like(tensors["x"])
    weights = [tensors[name] for name in ("w1", "b1", "w2", "b2")]
    mapped = torch.vmap(lambda x, y: se_fused.squeeze_excite(x, *weights, out=y))
    both = torch.stack([out, out])
    assert_close(mapped(xs, both)[1], truth(tensors, {}), torch.float32)
    assert torch.equal(both[0], both[1])
    with pytest.raises(RuntimeError, match="vmap: inplace"):
        torch.vmap(lambda x: se_fused.squeeze_excite(x, *weights, out=out))(xs)


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
def test_the_fast_path_takes_maps_of_one_order(monkeypatch, layout):
    answers, fast_path = [], backends.CPU.fast_path
    monkeypatch.setattr(backends.CPU, "fast_path", lambda *a, **k: answers.append(fast_path(*a, **k)) or answers[-1])
    tensors = Case(layout="channels_last").tensors()
    run(tensors, out=like(tensors["x"], layout))
    assert (answers[0] is not None) == (layout == "channels_last")


def test_explain_refuses_what_the_call_refuses():
    tensors = Case().tensors()
    assert call(se_fused.explain, tensors, {}, out=like(tensors["x"])).backend == "cpu"
    flat = torch.zeros(tensors["x"].numel() + 1)
    tensors["x"] = flat[1:].view(tensors["x"].shape)
    with pytest.raises(ValueError, match="x is in the memory of out"):
        call(se_fused.explain, tensors, {}, out=flat[:-1].view(tensors["x"].shape))
