"""Every kind of SE layer in the packages that the tests have: replaced, it gives the original's numbers and gradients;
and what is refused runs as it did, bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

import se_fused
from examples import zoo
from se_fused.recognised import Recognised

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
# Elements of the largest map that is compared: 56 x 56 positions of 64 channels.
_ELEMENTS = 200_000

# Model: SE layers replaced, and skipped for a reason.
MODELS = {
    "timm:coatnet_0_rw_224": (5, 0),
    "timm:dm_nfnet_f0": (12, 0),
    "timm:ecaresnet50d": (0, 0),
    "timm:efficientnet_b0": (16, 0),
    "timm:efficientnetv2_rw_s": (30, 0),
    "timm:efficientvit_m0": (2, 0),
    "timm:ese_vovnet19b_slim": (4, 0),
    "timm:fastvit_t8": (1, 0),
    "timm:fbnetv3_b": (18, 0),
    "timm:gcvit_xxtiny": (11, 0),
    "timm:ghostnet_100": (7, 0),
    "timm:hardcorenas_a": (8, 0),
    "timm:lcnet_050": (2, 0),
    "timm:legacy_seresnet18": (8, 0),
    "timm:legacy_seresnext26_32x4d": (8, 0),
    "timm:maxvit_pico_rw_256": (11, 0),
    "timm:mixnet_s": (13, 0),
    "timm:mobilenetv3_small_100": (9, 0),
    "timm:mobileone_s4": (12, 0),
    "timm:nf_seresnet26": (8, 0),
    "timm:rdnet_tiny": (15, 0),
    "timm:regnety_002": (13, 0),
    "timm:repghostnet_050": (7, 0),
    "timm:repvit_m1_0": (10, 0),
    "timm:rexnet_100": (0, 13),
    "timm:semnasnet_075": (8, 0),
    "timm:seresnet18": (8, 0),
    "timm:seresnext26d_32x4d": (8, 0),
    "timm:shvit_s1": (2, 0),
    "timm:tinynet_a": (19, 0),
    "timm:tresnet_m": (18, 0),
    "timm:skresnet18": (0, 0),
    "timm:resnest14d": (0, 0),
    "timm:gcresnet33ts": (0, 0),
    "torchvision:efficientnet_b0": (16, 0),
    "torchvision:efficientnet_v2_s": (30, 0),
    "torchvision:maxvit_t": (11, 0),
    "torchvision:mobilenet_v3_large": (8, 0),
    "torchvision:regnet_y_400mf": (16, 0),
    "transformers:EfficientNet": (55, 0),
    "transformers:RegNet": (22, 0),
    "transformers:MobileViT": (0, 0),
}


def build(name: str) -> nn.Module:
    library, _, kind = name.partition(":")
    if library != "transformers":
        return zoo.build(name)
    transformers = pytest.importorskip("transformers")
    options = {"RegNet": {"layer_type": "y"}}.get(kind, {})
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))


@pytest.mark.parametrize("name", MODELS)
def test_layers_of(name):
    replaced, skipped = MODELS[name]
    try:
        with torch.device("meta"):
            model = build(name)
    except NotImplementedError:  # torchvision's RegNet reads numbers as it is built
        model = build(name)
    originals = {key: copy.deepcopy(layer) for key, layer in model.named_modules() if se_fused_in(layer)}
    report = se_fused.replace(model)
    assert (len(report.replaced), len(report.skipped)) == (replaced, skipped), str(report)
    kinds = {}
    for key, found in report.replaced.items():
        kinds.setdefault((found.layer, found.act, found.gate, found.squeeze, found.residual), key)
    for key in kinds.values():
        compare(originals[key], model.get_submodule(key), report.replaced[key])


def se_fused_in(layer: nn.Module) -> bool:
    return 0 < sum(1 for _ in layer.parameters()) <= 6


def compare(original: nn.Module, layer: nn.Module, found: Recognised) -> None:
    """On a map of realistic size, in eval and train mode; both on real memory, with the same random weights."""
    for each in (original, layer):
        each.to_empty(device="cpu").double()
        generator = torch.Generator().manual_seed(1)
        for p in each.parameters():
            p.data.normal_(generator=generator).mul_(1 / math.sqrt(max(p.shape[1:], default=1)))
    side = round((_ELEMENTS / found.channels) ** (1 / (found.dims[0] - 2)))
    x = torch.randn(1, found.channels, *(side + i for i in range(found.dims[0] - 2)), dtype=torch.float64)
    g = torch.randn_like(x)
    for mode in (True, False):
        results = []
        for each in (original.train(mode), layer.train(mode)):
            given = x.clone().requires_grad_()
            y = each(given)
            results.append([y.detach(), *torch.autograd.grad(y, [given, *each.parameters()], g)])
        for got, wanted in zip(results[1], results[0], strict=True):
            # F.hardsigmoid's backward takes 1/6 from float32.
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", [name for name, (replaced, _) in MODELS.items() if replaced == 0])
def test_what_is_refused_runs_as_before(name):
    torch.manual_seed(0)
    model = build(name).eval()
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 64, 64)) if "vit" in name else (3, 64, 64)
    x = torch.randn(1, *size)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(x))
        se_fused.replace(model)
        got = torch.utils._pytree.tree_leaves(model(x))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True) if isinstance(a, torch.Tensor))
