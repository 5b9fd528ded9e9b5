"""Modules that cannot be replaced as SE layers: which of them are named as near misses, and for which reason."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from se_layers import Classic, Convolutional, varied
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from examples import zoo
from se_fused.near_miss import near_miss
from se_fused.replace import replace

zoo.import_torchvision()
import timm  # noqa: E402
from timm.layers import EcaModule  # noqa: E402
from timm.layers.cbam import ChannelAttn  # noqa: E402
from timm.layers.squeeze_excite import SqueezeExciteCl  # noqa: E402
from torchvision.models.segmentation.deeplabv3 import ASPP  # noqa: E402
from torchvision.models.segmentation.lraspp import LRASPPHead  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class MBConvBlock(nn.Module):
    """SE on the expanded map, its two layers beside the others, as in efficientnet_pytorch."""

    def __init__(self, c: int = 8, expand: int = 4) -> None:
        super().__init__()
        wide = c * expand
        if expand != 1:
            self._expand_conv, self._bn0 = nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide)
        self._se_reduce, self._se_expand = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)
        self._project_conv, self._bn2 = nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c)
        self._swish = nn.SiLU()

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        x = inputs
        if hasattr(self, "_expand_conv"):
            x = self._swish(self._bn0(self._expand_conv(x)))
        x = self._swish(self._bn1(self._depthwise_conv(x)))
        s = self._se_expand(self._swish(self._se_reduce(F.adaptive_avg_pool2d(x, 1))))
        return self._bn2(self._project_conv(torch.sigmoid(s) * x)) + inputs


class SEBasicBlock(nn.Module):
    """SE in the forward of a residual block, with its layers in a Sequential."""

    def __init__(self, c: int = 32, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x).relu())
        s = self.fc(self.pool(out).flatten(1))[:, :, None, None]
        out = out * s.expand_as(out)
        return F.relu(out + F.interpolate(x, size=out.shape[2:]))


class SEFirst(nn.Module):
    """SE on the input of a block, which goes on after it."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.down, self.up, self.conv = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class SE3d(nn.Module):
    """SE with one layer on volumes, which multiplies in place."""

    def __init__(self, c: int = 12) -> None:
        super().__init__()
        self.conv, self.se = nn.Conv3d(c, c, 3, padding=1), nn.Conv3d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out *= torch.sigmoid(self.se(out.mean((2, 3, 4), keepdim=True)))
        return out


class Gate(nn.Module):
    """Channel attention whose parent does the multiplication, as in frequent copies of CBAM."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(c, c // 8, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 8, c, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)) + self.fc(F.adaptive_max_pool2d(x, 1)))


def sca(c: int = 32) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))


def flat_gate(*last: nn.Module, c: int = 32) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 8), nn.ReLU(), nn.Linear(8, c), *last)


class ScSE(Convolutional):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(24, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * torch.sigmoid(self.spatial(x))


class Tokens(nn.Module):
    """SE on tokens [B, L, C]."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, c // 4), nn.Linear(c // 4, c)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(self.fc1(x.mean(1, keepdim=True)).relu()))


def grouped() -> nn.Module:
    layer = Convolutional(24, 8)
    layer.down, layer.up = nn.Conv2d(24, 8, 1, groups=4), nn.Conv2d(8, 24, 1, groups=4)
    return layer


def three_layers(*hidden: int) -> nn.Module:
    layer = Classic()
    first, second = hidden
    layer.fc = nn.Sequential(
        nn.Linear(32, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 32), nn.Sigmoid()
    )
    return layer


class OnlyFloat32(Convolutional):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.float32, "x must be float32"
        return super().forward(x)


class ToFloat32(Convolutional):
    def squeeze(self, x: Tensor) -> Tensor:
        return super().squeeze(x.float())

    def scale(self, x: Tensor, s: Tensor) -> Tensor:
        return x * s.to(x.dtype)


class CastsTheGate(Convolutional):
    def gate(self, p2: Tensor) -> Tensor:
        return torch.sigmoid(p2.float())


class PoolsInFloat32(Convolutional):
    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True, dtype=torch.float32).to(x.dtype)


class CastsTheWeights(Convolutional):
    def squeeze(self, x: Tensor) -> Tensor:
        self.down.weight.data = self.down.weight.data.float()
        return super().squeeze(x)


class WithDetail(Convolutional):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class FixedWindow(nn.Module):
    def __init__(self, size: int, c: int = 32) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AvgPool2d(size), nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(self.pool(x)).relu()).sigmoid()


class TwoMaps(SEBasicBlock):
    """Its residual comes from outside."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(x) + skip


class Wrapped(nn.Module):
    """A layer below a name of its own, as in speechbrain."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.w = nn.Linear(*widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


class InWrappers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(32, 32, 1), nn.BatchNorm1d(32))
        self.bottleneck = nn.Sequential(Wrapped(32, 8), nn.ReLU(), Wrapped(8, 32), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bottleneck(x.mean(2))[..., None]


def parametrized_block() -> nn.Module:
    block = SEBasicBlock()
    parametrizations.weight_norm(block.fc[0])
    parametrizations.spectral_norm(block.fc[2])
    return block


BLOCK = "SE written into the block: "
GATE = "it returns the gate only, its parent multiplies"
NAMED = {
    "MBConv": (MBConvBlock, BLOCK + "two fully connected layers [R=2, C=32] on a pooled map, then a product"),
    "MBConv without expansion": (
        partial(MBConvBlock, 8, 1),
        BLOCK + "two fully connected layers [R=2, C=8] on a pooled map, then a product",
    ),
    "basic block": (SEBasicBlock, BLOCK + "two fully connected layers [R=8, C=32] on a pooled map, then a product"),
    "basic block with stride": (partial(SEBasicBlock, 32, 2), BLOCK + "two fully connected layers [R=8, C=32]"),
    "SE before the block": (SEFirst, BLOCK + "two fully connected layers [R=8, C=32]"),
    "volume block, one layer": (SE3d, BLOCK + "one fully connected layer [C=12] on a pooled map, then a product"),
    "gate of CBAM": (Gate, GATE),
    "gate of NAFNet": (sca, GATE),
    "gate, two layers": (lambda: sca().extend([nn.ReLU(), nn.Conv2d(32, 32, 1)]), GATE),
    "gate of shape [N, C]": (lambda: flat_gate(nn.Sigmoid()), GATE),
    "gate of shape [N, C], hard": (lambda: flat_gate(nn.Hardsigmoid()), GATE),
    "scSE": (ScSE, "it has a spatial gate beside the channel gate (scSE)"),
    "tokens": (Tokens, "its channels come last, as in [B, L, C]"),
    "channels last": (partial(SqueezeExciteCl, 32), "its channels come last, as in [B, H, W, C]"),
    "grouped": (grouped, "two grouped fully connected layers [R=8, C=24, 4 groups]"),
    "three layers": (lambda: three_layers(8, 8), "three fully connected layers [R=8, R=8, C=32]"),
    "three layers of three widths": (lambda: three_layers(16, 4), "three fully connected layers [R=16, R=4, C=32]"),
    "asserts float32": (OnlyFloat32, "it does not run in float64: AssertionError: x must be float32"),
    "casts the map": (ToFloat32, "it does not run in float64: it casts to float32"),
    "casts the gate": (CastsTheGate, "it does not run in float64: it casts to float32"),
    "pools in float32": (PoolsInFloat32, "it does not run in float64: it casts to float32"),
    "casts the weights": (CastsTheWeights, "it does not run in float64: TypeError: one layer of float32 and float64"),
    "tuple": (WithDetail, "its result is not one map of the shape of x"),
    "window of a fixed size": (partial(FixedWindow, 56), "it pools windows of a fixed size"),
    "window that covers a part": (partial(FixedWindow, 28), "it pools windows of a fixed size"),
    "block of two maps": (
        TwoMaps,
        BLOCK + "two fully connected layers [R=8, C=32] on a pooled map, then a product; it needs 2 inputs",
    ),
    "layers in wrappers": (
        InWrappers,
        BLOCK + "two fully connected layers [R=8, C=32] on a pooled map, then a product",
    ),
    "reparametrised block": (
        parametrized_block,
        BLOCK + "two fully connected layers [R=8, C=32] on a pooled map, then a product",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_names(case: str) -> None:
    make, reason = NAMED[case]
    got = near_miss(make())
    assert got is not None
    assert got.startswith(reason)


class Bottleneck(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 32, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Added(Convolutional):
    """Adds the context instead of multiplying by it, as GCNet does."""

    def scale(self, x: Tensor, s: Tensor) -> Tensor:
        return x + s


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(self.down(x).relu()))


class RmsMlp(nn.Module):
    """Multiplies the map [B, L, C] by its mean over the channels, which has B * L numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x * x.square().mean(-1, keepdim=True).rsqrt()).relu())


UNNAMED = {
    "bottleneck": Bottleneck,
    "grouped bottleneck": partial(Bottleneck, 4),
    "context added": lambda: Added(),
    "spatial gate": SpatialGate,
    "MLP with RMSNorm": RmsMlp,
    "MLP": lambda: nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid()),
    "self attention": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "head": flat_gate,
    "head with softmax": lambda: flat_gate(nn.Softmax(1)),
    "pooling branch": lambda: sca().extend([nn.BatchNorm2d(32), nn.ReLU()]),
    "ASPP": lambda: ASPP(32, [2, 3], 32),
    "LR-ASPP": lambda: LRASPPHead(16, 32, 2, 8),
    "ECA": lambda: EcaModule(16),
    "squeeze of both axes apart": lambda: varied(squeeze=lambda x: x.mean(2, keepdim=True)),
    "module list": lambda: nn.ModuleList([nn.Linear(32, 32)]),
    "Linear": lambda: nn.Linear(32, 32),
    "lazy": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.LazyConv2d(32, 1)),
    "no parameters": nn.ReLU,
}


@pytest.mark.parametrize("case", UNNAMED)
def test_does_not_name(case: str) -> None:
    assert near_miss(UNNAMED[case]()) is None


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnext50_32x4d",
        "vit_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "gcresnet50t",
    ],
)
def test_models_without_se_have_no_near_miss(name: str) -> None:
    report = replace(timm.create_model(name), dry_run=True)
    assert (report.replaced, report.skipped, report.near) == ({}, {}, {})


def test_replace_names_the_smallest_module_once() -> None:
    block = MBConvBlock()
    model = nn.ModuleDict(
        {
            "stage": nn.Sequential(MBConvBlock(), block, Classic()),
            "again": block,
            "parent": nn.Sequential(nn.ReLU(), Gate()),
            "named": nn.Sequential(Classic(), nn.Conv2d(32, 32, 1)),
        }
    )
    report = replace(model, exclude="named.*")
    assert list(report.replaced) == ["stage.2"]
    assert list(report.skipped) == ["named.0"]
    assert set(report.inline) == {"stage.0", "stage.1", "again"}
    assert report.near == {"parent.1": GATE}
    assert replace(model, dry_run=True, include="nothing").near == report.near


def test_what_is_inside_a_skipped_layer_is_not_named() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x)

    report = replace(Whole())
    assert list(report.skipped) == [""]
    assert report.near == {}


def test_a_cast_is_the_reason_for_skipping() -> None:
    assert replace(PoolsInFloat32()).skipped == {"": "it does not run in float64: it casts to float32"}
    assert "applied more than once" in replace(ChannelAttn(32)).skipped[""]


def test_leaves_no_trace() -> None:
    block = parametrized_block().train()

    def fail(*_: object) -> None:
        raise AssertionError("a hook of the model was called")

    block.conv1.register_forward_hook(fail)
    block.register_forward_pre_hook(fail)

    def own(cls: type) -> dict[str, object]:
        # Python itself sets these names on a class when it copies an object of it.
        return {name: value for name, value in vars(cls).items() if name != "__slotnames__"}

    classes = {name: (type(m), own(type(m)), vars(m).keys()) for name, m in block.named_modules()}
    state = {name: (t, t.clone(), t.data_ptr()) for name, t in block.state_dict(keep_vars=True).items()}
    rng = torch.get_rng_state()
    assert near_miss(block) is not None
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: (type(m), own(type(m)), vars(m).keys()) for name, m in block.named_modules()} == classes
    for name, t in block.state_dict(keep_vars=True).items():
        before, values, pointer = state[name]
        assert t is before
        assert torch.equal(t, values)
        assert t.data_ptr() == pointer
    assert all(m.training for m in block.modules())


def test_works_under_any_mode() -> None:
    wanted = near_miss(MBConvBlock())
    with torch.inference_mode():
        assert near_miss(MBConvBlock()) == wanted
    with torch.enable_grad():
        assert near_miss(MBConvBlock().half()) == wanted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert near_miss(MBConvBlock().bfloat16()) == wanted


def test_gives_up_on_a_loop_over_positions() -> None:
    class Looping(SEBasicBlock):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10_000):
                Looping.steps += 1
                x = x + 1
            return super().forward(x)

    assert near_miss(Looping()) is None
    assert 0 < Looping.steps < 1000


def test_foreign_code_may_raise() -> None:
    class Raising(SEBasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such key")

        def __deepcopy__(self, memo: object) -> None:
            raise ValueError("no copies")

    assert near_miss(Raising()) is None
    block = SEBasicBlock()
    block.forward = lambda x: {}["no such key"]
    assert near_miss(block) is None


@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "sequencer2d_s"])
def test_is_quick(name: str) -> None:
    modules = list(timm.create_model(name).modules())
    start = time.thread_time()
    for module in modules:
        near_miss(module)
    assert time.thread_time() - start < 1
