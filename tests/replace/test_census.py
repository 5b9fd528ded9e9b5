"""Replaces the kinds of SE layers in the installed packages and compares numbers and gradients with the original's.

A model without a layer to replace must run as it did, bit for bit.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import se_fused
from benchmarks import coverage, coverage_report, libraries, report
from se_fused.recognised import Recognised

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
# Elements of the largest map that is compared: 56 x 56 positions of 64 channels.
_ELEMENTS = 200_000

# Models with more are left to the record.
_PARAMETERS = 8_000_000
# The record, which `benchmarks/coverage.py` writes, of the smaller models of the libraries that the tests install.
RECORD = {
    f"{row['library']}:{row['model']}": row
    for row in report.read(coverage.RECORD)
    if row["library"] in ("timm", "torchvision", "transformers")
    and not row["error"]
    and int(row["parameters"]) < _PARAMETERS
}


def build(name: str, how: Callable[[str, str], nn.Module] = libraries.build) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "transformers":
        pytest.importorskip("transformers")
    return how(library, model)


def test_the_record_is_of_all_libraries() -> None:
    lines = report.read(coverage.RECORD)
    assert {line["library"] for line in lines} == {*libraries.LIBRARIES}
    assert not coverage_report.disagreeing(lines)


@pytest.mark.parametrize("name", RECORD)
def test_layers_of(name):
    model = build(name, libraries.build_bare)
    originals = {key: copy.deepcopy(layer) for key, layer in model.named_modules() if se_fused_in(layer)}
    done = se_fused.replace(model)
    found = coverage.counts(done)
    assert found == {key: RECORD[name][key] for key in found}, str(done)
    kinds = {}
    for key, found in done.replaced.items():
        kinds.setdefault((found.layer, found.act, found.gate, found.squeeze, found.residual), key)
    for key in kinds.values():
        compare(originals[key], model.get_submodule(key), done.replaced[key])


def se_fused_in(layer: nn.Module) -> bool:
    return 0 < sum(1 for _ in layer.parameters()) <= 6


def compare(original: nn.Module, layer: nn.Module, found: Recognised) -> None:
    """Compare both layers on a map of realistic size, in both modes, on real memory with the same random weights."""
    for each in (original, layer):
        each.to_empty(device="cpu").double()
        generator = torch.Generator().manual_seed(1)
        for p in each.parameters():
            p.data.normal_(generator=generator).mul_(1 / math.sqrt(max(p.shape[1:], default=1)))
        for buffer in each.buffers():  # those of batch norms
            buffer.copy_(torch.rand(buffer.shape, generator=generator).add(0.5))
    side = round((_ELEMENTS / found.channels) ** (1 / (found.dims[0] - 2)))
    # Batch norms in train mode take no batch of 1.
    x = torch.randn(
        2 if found.norms else 1, found.channels, *(side + i for i in range(found.dims[0] - 2)), dtype=torch.float64
    )
    g = torch.randn_like(x)
    for mode in (True, False):
        results = []
        for each in (original.train(mode), layer.train(mode)):
            given = x.clone().requires_grad_()
            y = each(given)
            results.append([y.detach(), *torch.autograd.grad(y, [given, *each.parameters()], g)])
        for got, wanted in zip(results[1], results[0], strict=True):
            # As wide as `equivalence` allows for gradients, because F.hardsigmoid's backward uses a float32 1/6.
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", [name for name, row in RECORD.items() if row["replaced"] == row["inline"] == "0"])
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
