"""The text of the report that `replace` returns."""

from __future__ import annotations

from torch import nn

from examples import zoo
from se_fused.replace import Report, replace

zoo.import_torchvision()
from se_layers import Plus  # noqa: E402
from timm.layers import SEModule  # noqa: E402


def sca() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1))


def test_text_counts_and_groups() -> None:
    model = nn.ModuleDict(
        {
            "a": SEModule(32),
            "b": SEModule(32, act_layer=nn.PReLU),
            "c": Plus(SEModule(16)),
            "d": SEModule(32),
            "e": nn.Sequential(sca(), sca()),
        }
    )
    assert str(replace(model)).splitlines() == [
        "3 of 6 SE layers replaced",
        "replaced: 3",
        "  SEModule: C=32, R=8, relu, sigmoid",
        "      a, d",
        "  Plus: C=16, R=8, relu, sigmoid, residual",
        "      c",
        "skipped: 1",
        "  it uses parameters beside those of its layers: act.weight",
        "      b",
        "near misses: 2",
        "  it returns the gate only, its parent multiplies",
        "      e.0, e.1",
    ]
    again = str(replace(model)).splitlines()
    assert again[:4] == ["0 of 6 SE layers replaced", "skipped: 4", "  already fused", "      a, c, d"]


def test_many_names_are_shortened() -> None:
    names = [f"blocks.{i}" for i in range(5)]
    model = nn.ReLU()
    assert "      blocks.0, blocks.1, blocks.2, blocks.3" in str(Report(model, {}, dict.fromkeys(names[:4], "why")))
    text = str(Report(model, {}, {}, dict.fromkeys(names, "why")))
    assert "      blocks.0, blocks.1, ..., blocks.4 (5 layers)" in text


def test_root_and_nothing() -> None:
    assert "      (the model)" in str(replace(sca()))
    assert str(replace(SEModule(16))).startswith("1 of 1 SE layer replaced")
    assert str(replace(nn.ReLU())) == "no SE layer found"
