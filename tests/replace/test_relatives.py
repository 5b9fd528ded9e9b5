"""Channel attention other than SE: what `replace` names in a model, and what it must not name."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from se_layers import Convolutional
from torch import Tensor, nn

from examples import zoo
from se_fused import relatives
from se_fused.relatives import relative
from se_fused.replace import Report, replace

zoo.import_torchvision()
import timm  # noqa: E402
from timm.layers import (  # noqa: E402
    CecaModule,
    EcaModule,
    EvoNorm2dS0,
    GatherExcite,
    GlobalContext,
    NonLocalAttn,
    SelectiveKernel,
    SEModule,
    SplitAttn,
)
from timm.layers.cbam import CbamModule, LightSpatialAttn, SpatialAttn  # noqa: E402
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn, SimpleCoordAttn, StripAttn  # noqa: E402
from timm.layers.grn import GlobalResponseNorm  # noqa: E402
from timm.models._efficientnet_blocks import CondConvResidual  # noqa: E402
from timm.models.mobilevit import LinearSelfAttention  # noqa: E402
from torchvision.models.mobilenetv2 import InvertedResidual  # noqa: E402
from torchvision.models.segmentation.deeplabv3 import ASPP  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class OriginalEca(nn.Module):
    """As in the repository of ECA-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


class EcaBlock(nn.Module):
    """ECA in the forward of a residual block."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.eca = nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.conv2(F.relu(self.conv1(x))))
        s = self.eca(out.mean((2, 3))[:, None]).sigmoid()
        return F.relu(x + out * s.view(len(x), -1, 1, 1))


class EcaAfterSwish(OriginalEca):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x.sigmoid())


class Context(nn.Module):
    """GCNet's block. how: whether the mean is a product of matrices, or a product and a sum."""

    def __init__(self, how: str, c: int = 32) -> None:
        super().__init__()
        self.how, self.key = how, nn.Conv2d(c, 1, 1)
        self.add = nn.Sequential(nn.Conv2d(c, 8, 1), nn.LayerNorm([8, 1, 1]), nn.ReLU(), nn.Conv2d(8, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.key(x).flatten(2).softmax(-1)
        if self.how == "matmul":
            mean = torch.matmul(x.flatten(2), weights.transpose(1, 2))
        elif self.how == "einsum":
            mean = torch.einsum("nci,nki->nc", x.flatten(2), weights)
        else:
            mean = (x.flatten(2) * weights).sum(-1)
        return x + self.add(mean.reshape(*x.shape[:2], 1, 1))


class SelectiveKernels(nn.Module):
    """As in a frequent copy of SKNet: one layer for each branch, a softmax over their stack."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(c, c, 3, 1, i, i) for i in (1, 2, 3)])
        self.fc, self.fcs = nn.Linear(c, 8), nn.ModuleList([nn.Linear(8, c) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([conv(x) for conv in self.convs], 1)
        z = F.relu(self.fc(maps.sum(1).mean(-1).mean(-1)))
        s = torch.stack([fc(z) for fc in self.fcs], 1).softmax(1)
        return (maps * s[..., None, None]).sum(1)


class Splits(nn.Module):
    """As in the repository of ResNeSt: the splits and their gates are in lists."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(c, 2 * c, 3, groups=2), nn.Conv2d(c, 8, 1), nn.Conv2d(8, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        splits = torch.split(x, x.shape[1] // 2, 1)
        s = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(sum(splits), 1))))
        s = s.view(len(x), 1, 2, -1).transpose(1, 2).softmax(1).reshape(len(x), -1, 1, 1)
        return sum(gate * split for gate, split in zip(torch.split(s, s.shape[1] // 2, 1), splits, strict=True))


class Coordinates(nn.Module):
    """As in the repository of coordinate attention."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.rows, self.columns = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv, self.bn = nn.Conv2d(c, 8, 1), nn.BatchNorm2d(8)
        self.conv_h, self.conv_w = nn.Conv2d(8, c, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = self.bn(self.conv(torch.cat([self.rows(x), self.columns(x).permute(0, 1, 3, 2)], 2)))
        y = y * (F.relu6(y + 3) / 6)
        y_h, y_w = torch.split(y, [h, w], 2)
        return x * self.conv_w(y_w.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(y_h).sigmoid()


class Windows(nn.Module):
    def __init__(self, gather: nn.Module, c: int = 32) -> None:
        super().__init__()
        self.gather, self.mlp = gather, nn.Sequential(nn.Conv2d(c, 8, 1), nn.ReLU(), nn.Conv2d(8, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * F.interpolate(self.mlp(self.gather(x)), x.shape[2:]).sigmoid()


class Spatial(nn.Module):
    """The spatial half of scSE."""

    def __init__(self, conv: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sigmoid() * x


class Style(nn.Module):
    """SRM: a layer for each channel on its mean and deviation."""

    def __init__(self, by_convolution: bool, c: int = 32) -> None:
        super().__init__()
        self.by_convolution, self.bn = by_convolution, nn.BatchNorm1d(c)
        self.cfc = nn.Conv1d(c, c, 2, groups=c) if by_convolution else nn.Parameter(torch.zeros(c, 2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        z = torch.stack([flat.mean(-1), flat.std(-1)], -1)
        z = self.cfc(z) if self.by_convolution else (z * self.cfc).sum(2, keepdim=True)
        return x * self.bn(z).sigmoid()[..., None]


class SimAM(nn.Module):
    """As in its repository: no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        return x * torch.sigmoid(d / (4 * (d.sum((2, 3), keepdim=True) / n + 1e-4)) + 0.5)


class Wider(nn.Module):
    """The gate of a block's result comes from its input, which has fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(24, 48, 3), nn.Linear(24, 8), nn.Linear(8, 48)

    def forward(self, x: Tensor) -> Tensor:
        s = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return self.conv(x) * s[:, :, None, None]


NAMED = {
    "ECA": (partial(EcaModule, 64), relatives.ECA),
    "ECA of any width": (EcaModule, relatives.ECA),
    "ECA with two convolutions": (partial(EcaModule, 64, use_mlp=True), relatives.ECA),
    "circular ECA": (partial(CecaModule, 64), relatives.ECA),
    "original ECA": (OriginalEca, relatives.ECA),
    "ECA in a block": (EcaBlock, relatives.ECA),
    "ECA after a swish": (EcaAfterSwish, relatives.ECA),
    "global context": (partial(GlobalContext, 32), relatives.CONTEXT),
    "global context, added": (partial(GlobalContext, 32, fuse_add=True, fuse_scale=False), relatives.CONTEXT),
    **{f"context by {how}": (partial(Context, how), relatives.CONTEXT) for how in ("matmul", "einsum", "sum")},
    "split attention": (partial(SplitAttn, 32), relatives.BRANCHES),
    "split attention, grouped": (
        partial(SplitAttn, 32, 64, groups=2, norm_layer=nn.BatchNorm2d, stride=2),
        relatives.BRANCHES,
    ),
    "original split attention": (Splits, relatives.BRANCHES),
    "selective kernel": (partial(SelectiveKernel, 32), relatives.BRANCHES),
    "selective kernel, wider": (partial(SelectiveKernel, 32, 64, split_input=False), relatives.BRANCHES),
    "selective kernels by layers": (SelectiveKernels, relatives.BRANCHES),
    **{
        cls.__name__: (partial(cls, 32), relatives.STRIPS)
        for cls in (CoordAttn, SimpleCoordAttn, EfficientLocalAttn, StripAttn)
    },
    "original coordinate attention": (Coordinates, relatives.STRIPS),
    # timm 1.0 cannot make a GatherExcite with layers.
    "gather-excite, 2": (partial(GatherExcite, 32, extent=2, use_mlp=False), relatives.WINDOWS),
    "gather-excite, 8, maximum": (
        partial(GatherExcite, 32, extent=8, use_mlp=False, add_maxpool=True),
        relatives.WINDOWS,
    ),
    "windows, mean": (lambda: Windows(nn.AvgPool2d(7, 4)), relatives.WINDOWS),
    "windows, maximum": (lambda: Windows(nn.MaxPool2d(4)), relatives.WINDOWS),
    "windows, 3 by 3 of them": (lambda: Windows(nn.AdaptiveAvgPool2d(3)), relatives.WINDOWS),
    "windows, depthwise": (lambda: Windows(nn.Conv2d(32, 32, 3, 2, groups=32)), relatives.WINDOWS),
    "spatial": (SpatialAttn, relatives.SPATIAL),
    "spatial, light": (LightSpatialAttn, relatives.SPATIAL),
    "spatial, one layer": (Spatial, relatives.SPATIAL),
    "spatial, volume": (partial(Spatial, nn.Conv3d), relatives.SPATIAL),
    "style": (partial(Style, False), relatives.ALONE),
    "style by a convolution": (partial(Style, True), relatives.ALONE),
    "gather-excite without layers": (partial(GatherExcite, 32, use_mlp=False), relatives.ALONE),
    "SimAM": (SimAM, relatives.STATISTICS),
    "wider": (Wider, relatives.ANOTHER),
}


@pytest.mark.parametrize("case", NAMED)
def test_names(case: str) -> None:
    make, name = NAMED[case]
    assert relative(make()) == name


def by(forward, *layers: nn.Module) -> nn.Module:
    """A module that computes `forward(x, *layers)`."""

    class By(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return forward(x, *self.layers)

    return By()


def normalised(x: Tensor, *dims: int) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) * x.var(dims, keepdim=True).clamp(min=1e-5).rsqrt()


def group_norm(x: Tensor) -> Tensor:
    return normalised(x.reshape(len(x), 4, -1), 2).reshape(x.shape)


def attention(x: Tensor, qkv: nn.Module) -> Tensor:
    q, k, v = qkv(x).flatten(2).chunk(3, 1)
    return x + (v @ (q.transpose(1, 2) @ k).softmax(-1)).reshape(x.shape)


def dynamic_relu(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    theta = 2 * up(F.relu(down(x.mean((2, 3))))).sigmoid() - 1
    theta = theta.view(*x.shape[:2], 1, 1, 2)
    return (x[..., None] * theta).amax(-1)


def modulation(x: Tensor, conv: nn.Module, down: nn.Module, up: nn.Module) -> Tensor:
    """A swish between the layers is no gate of the map."""
    p = down(x.mean((2, 3)))
    scale = up(p * p.sigmoid()).view(len(x), 2, -1, 1, 1)
    return torch.stack([conv(x), x], 1) * scale


def experts(x: Tensor, router: nn.Module, *maps: nn.Module) -> Tensor:
    """Weighs whole maps, as a mixture of experts does."""
    weights = router(x.mean((2, 3))).softmax(-1)
    return sum(weights[:, i, None, None, None] * each(x) for i, each in enumerate(maps))


CONV1, CONV3 = partial(nn.Conv2d, 32, 32, 1), partial(nn.Conv2d, 32, 32, 3, padding=1)
UNNAMED = {
    "classifier": lambda: by(lambda x, fc: fc(x.mean((2, 3))).softmax(-1), nn.Linear(32, 10)),
    "MLP of convolutions": lambda: by(lambda x, a, b: x + b(a(x).relu()), CONV1(), CONV1()),
    "MLP": lambda: by(lambda x, a, b: b(a(x).relu()), nn.Linear(32, 64), nn.Linear(64, 32)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "block of a ViT": lambda: timm.create_model("vit_tiny_patch16_224").blocks[0],
    "self attention on maps": lambda: by(attention, nn.Conv2d(32, 96, 1)),
    "non-local": partial(NonLocalAttn, 32),
    "linear attention": partial(LinearSelfAttention, 32),
    "GRU": lambda: by(lambda x, gru: gru(x)[0], nn.GRU(32, 32, batch_first=True)),
    "conv block": lambda: by(lambda x, a, b: F.relu(x + b(a(x).relu())), CONV3(), CONV3()),
    "inverted residual": lambda: InvertedResidual(32, 32, 2, 6),
    "relu6 of one channel": lambda: by(lambda x, a: x * F.relu6(a(x)), CONV1()),
    "ASPP": lambda: ASPP(32, [2, 3], 32),
    "pyramid": lambda: by(lambda x, a: x + F.interpolate(a(F.max_pool2d(x, 2)), x.shape[2:]), CONV1()),
    "stem, then GLU": lambda: by(
        lambda x, a, b: a(h := F.max_pool2d(x, 2)) * b(h).sigmoid(), CONV3(), CONV1()
    ),
    "GLU": lambda: by(lambda x, a: F.glu(a(x), 1), nn.Conv2d(32, 64, 1)),
    "GLU of two layers": lambda: by(lambda x, a, b: a(x) * b(x).sigmoid(), CONV1(), CONV1()),
    "swish": lambda: by(lambda x: x * x.sigmoid()),
    "layer norm": lambda: by(lambda x: normalised(x, 1)),
    "group norm": lambda: by(group_norm),
    "instance norm": lambda: by(lambda x: normalised(x, 2, 3)),
    "RMS norm": lambda: by(lambda x: x * x.square().mean(1, keepdim=True).rsqrt()),
    "instance norm and swish": lambda: by(lambda x: (h := normalised(x, 2, 3)) * h.sigmoid()),
    "group norm module and swish": lambda: by(lambda x, norm: (h := norm(x)) * h.sigmoid(), nn.GroupNorm(4, 32)),
    "response norm": lambda: GlobalResponseNorm(32, channels_last=False),
    "EvoNorm": partial(EvoNorm2dS0, 32),
    "context added": lambda: by(lambda x, a: x + a(x.mean((2, 3), keepdim=True)), CONV1()),
    "centerness": lambda: by(lambda x, a, b: a(x).sigmoid() * b(x).sigmoid(), CONV3(), nn.Conv2d(32, 1, 3, padding=1)),
    "modulation": lambda: by(modulation, CONV3(), nn.Linear(32, 8), nn.Linear(8, 64)),
    "context without layers": lambda: by(
        lambda x, a: x + (x * a(x).flatten(2).softmax(-1).view(len(x), 1, *x.shape[2:])).sum((2, 3), keepdim=True),
        nn.Conv2d(32, 1, 1),
    ),
    "dynamic ReLU": lambda: by(dynamic_relu, nn.Linear(32, 8), nn.Linear(8, 64)),
    "conditional convolutions": lambda: CondConvResidual(32, 32, num_experts=4),
    "experts": lambda: by(experts, nn.Linear(32, 2), CONV3(), CONV3()),
    "softmax over the positions": lambda: by(lambda x, a: x * a(x).flatten(2).softmax(-1).view(len(x), 1, *x.shape[2:]),
                                             nn.Conv2d(32, 1, 1)),
    "attention pooling": lambda: by(
        lambda x, a, b: b((x.flatten(2) * a(x).flatten(2).softmax(-1)).sum(-1)), nn.Conv2d(32, 1, 1), nn.Linear(32, 10)
    ),
    "SE": lambda: Convolutional(),
    "lazy": lambda: by(lambda x, a: x * a(x).sigmoid(), nn.LazyConv2d(1, 1)),
    "module list": lambda: nn.ModuleList([EcaModule()]),
    "chain": lambda: nn.Sequential(EcaModule()),
    "scripted": lambda: torch.jit.script(Spatial()),
}  # fmt: skip


@pytest.mark.parametrize("case", UNNAMED)
def test_does_not_name(case: str) -> None:
    assert relative(UNNAMED[case]()) is None


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        ("ecaresnet50d", {"EcaModule": f"{relatives.ECA}, 16 modules"}),
        ("resnest14d", {"SplitAttn": f"{relatives.BRANCHES}, 4 modules"}),
        ("skresnet18", {"SelectiveKernel": f"{relatives.BRANCHES}, 8 modules"}),
        ("gcresnet33ts", {"GlobalContext": f"{relatives.CONTEXT}, 10 modules"}),
        *((name, {}) for name in ("resnet50", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224")),
        *(
            (name, {})
            for name in ("seresnet18", "mobilenetv2_100", "mobilevitv2_050", "nfnet_l0", "efficientnet_cc_b0_4e")
        ),
    ],
)
def test_networks(model: str, seen: dict[str, str]) -> None:
    with torch.device("meta"):
        net = timm.create_model(model)
    report = replace(net, dry_run=True)
    assert report.seen == seen
    if seen:
        assert (report.replaced, report.skipped, report.near) == ({}, {}, {})


def test_what_has_an_outcome_is_not_asked_about() -> None:
    """The channel gate of CBAM is skipped as an SE layer, with its reason; its spatial gate is no SE layer."""
    model = nn.ModuleDict({"cbam": CbamModule(32), "se": SEModule(32), "eca": nn.Sequential(EcaModule(), EcaModule())})
    report = replace(model, dry_run=True)
    assert (list(report.replaced), list(report.skipped), report.near) == (["se"], ["cbam.channel"], {})
    assert report.seen == {"EcaModule": f"{relatives.ECA}, 2 modules", "SpatialAttn": f"{relatives.SPATIAL}, 1 module"}


def test_inside_a_block_with_se() -> None:
    class Both(Convolutional):
        """SE in a block with SimAM inside."""

        def __init__(self) -> None:
            super().__init__()
            self.simam, self.conv = SimAM(), nn.Conv2d(24, 24, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.conv(self.simam(x)))

    report = replace(Both())
    assert list(report.inline) == [""]
    assert report.seen == {"SimAM": f"{relatives.STATISTICS}, 1 module"}


def test_one_class_with_two_names() -> None:
    report = replace(nn.Sequential(GatherExcite(32, extent=2, use_mlp=False), Style(True), Style(False)))
    assert report.seen == {"Style": f"{relatives.ALONE}, 2 modules", "GatherExcite": f"{relatives.WINDOWS}, 1 module"}
    either = nn.Sequential(SplitAttn(32), type("SplitAttn", (OriginalEca,), {})())
    assert replace(either).seen == {"SplitAttn": f"{relatives.ECA}; or {relatives.BRANCHES}, 2 modules"}


def test_structures_that_differ_are_asked_apart() -> None:
    """The class and the number of weights are the same; only the first gate has one channel."""

    def forward(x: Tensor, conv: nn.Module) -> Tensor:
        s = conv(x).sigmoid()
        return x.unflatten(1, (s.shape[1], -1)) * s[:, :, None]

    gates = [by(forward, nn.Conv2d(32, c, 1)) for c in (1, 16)]
    one, many = gates
    many.__class__ = type(one)
    assert replace(nn.Sequential(*gates)).seen == {"By": f"{relatives.SPATIAL}, 1 module"}
    assert replace(nn.Sequential(*reversed(gates))).seen == {"By": f"{relatives.SPATIAL}, 1 module"}


def test_each_structure_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def count(module: nn.Module) -> str | None:
        asked.append(type(module))
        return relative(module)

    monkeypatch.setattr(relatives, "relative", count)
    with torch.device("meta"):
        replace(timm.create_model("ecaresnet50d"), dry_run=True)
    # The kernels of ECA have two sizes.
    assert asked.count(EcaModule) == 2


def test_text() -> None:
    eca = f"seen, not SE: EcaModule: {relatives.ECA}, 16 modules"
    assert str(Report(nn.ReLU(), {}, {}, seen={"EcaModule": f"{relatives.ECA}, 16 modules"})).splitlines() == [
        "no SE layer found",
        eca,
    ]
    lines = str(replace(nn.Sequential(SEModule(32), EcaModule(), EcaModule()))).splitlines()
    assert lines[0] == "1 of 1 SE layer replaced"
    assert lines[-1] == f"seen, not SE: EcaModule: {relatives.ECA}, 2 modules"


def test_changes_nothing() -> None:
    layer = GlobalContext(32).train()

    def fail(*_: object) -> None:
        raise AssertionError("a hook of the module was called")

    layer.conv_attn.register_forward_hook(fail)
    layer.register_forward_pre_hook(fail)
    attributes = {name: (type(m), dict(vars(m))) for name, m in layer.named_modules()}
    state = {name: (t, t.clone()) for name, t in layer.state_dict(keep_vars=True).items()}
    rng, python_rng = torch.get_rng_state(), random.getstate()
    assert replace(layer).seen == {"GlobalContext": f"{relatives.CONTEXT}, 1 module"}
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert {name: (type(m), dict(vars(m))) for name, m in layer.named_modules()} == attributes
    for name, t in layer.state_dict(keep_vars=True).items():
        assert t is state[name][0]
        assert torch.equal(t, state[name][1])


def test_works_under_any_mode() -> None:
    with torch.inference_mode():
        assert relative(Splits()) == relatives.BRANCHES
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(Context("matmul").bfloat16()) == relatives.CONTEXT
    with torch.device("meta"):
        assert relative(Coordinates()) == relatives.STRIPS


def test_foreign_code_may_raise() -> None:
    class Raising(OriginalEca):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such key")

    class Uncopied(OriginalEca):
        def __deepcopy__(self, memo: object) -> None:
            raise ValueError("no copies")

    class Looping(OriginalEca):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10_000):
                x = super().forward(x)
            return x

    for cls in (Raising, Uncopied, Looping):
        assert relative(cls()) is None
