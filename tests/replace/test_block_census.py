"""The record of what `replace(model, level="block")` joins, which `benchmarks/census.py` writes, against the code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import nn

from benchmarks import census, coverage, libraries, report
from se_fused import replace

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
RECORD = {f"{line['library']}:{line['model']}": line for line in report.read(census.RECORD)}


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_byobnet", "timm:test_efficientnet", "timm:test_efficientnet_gn", "timm:test_maxvit",
        "timm:test_nfnet", "timm:lcnet_035", "timm:legacy_seresnet18", "timm:hgnet_tiny",
        "timm:ese_vovnet39b", "timm:repghostnet_050", "torchvision:mobilenet_v3_small",
    ],
)  # fmt: skip
def test_a_line(name: str) -> None:
    line = RECORD[name]
    found = census.counts(replace(libraries.build_bare(line["library"], line["model"]), level="block"))
    assert found == {key: line[key] for key in found}


def test_the_benchmark_writes_such_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("timm", name) for name in ("resnet18", "lcnet_050", "lcnet_035")]
    assert {*names, ("timm", "rdnet_tiny"), ("torchvision", "maxvit_t")} <= set(census.names())
    assert all(name in libraries.models(library) for library, name in census.names())
    monkeypatch.setattr(census, "names", lambda: names)
    monkeypatch.setattr(census, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    census.main(tmp_path / "census.csv")
    (line,) = report.read(tmp_path / "census.csv")
    wanted = RECORD["timm:lcnet_035"]
    assert line.keys() == wanted.keys()
    varies = {"date", "commit", "cpu", "torch", "error", "original_error", "block_error"}
    assert {key: line[key] for key in line.keys() - varies} == {key: wanted[key] for key in line.keys() - varies}


@pytest.mark.parametrize("name", RECORD)
def test_results(name: str) -> None:
    """They differ by rounding alone."""
    line = RECORD[name]
    assert int(line["layers"]) == int(line["joined"]) + int(line["alone"]) > 0
    if line["error"]:
        assert line["classes"] == "equal"
        if not float(line["error"]) <= coverage.ROUNDING:
            assert float(line["block_error"]) <= 3 * float(line["original_error"])


def test_the_smallest_of_each_kind() -> None:
    networks = [
        coverage.Network("timm", *facts) for facts in (("a", 9, "x"), ("b", 5, "x"), ("c", 2, "y"), ("d", 1, ""))
    ]
    assert [network.model for network in coverage.smallest(networks)] == ["b", "c"]


def test_kinds() -> None:
    """Networks of other widths and depths are of one kind, others are not."""
    kinds = {name: census.look_at(("timm", name)).kind for name in ("lcnet_035", "lcnet_050", "resnet18", "seresnet18")}
    assert kinds["lcnet_035"] == kinds["lcnet_050"] != kinds["seresnet18"] != ""
    assert kinds["resnet18"] == ""


def test_a_size_that_a_network_takes() -> None:
    class Even(nn.Sequential):
        default_cfg = {"input_size": (3, 2 * census.SIDE, 2 * census.SIDE)}  # noqa: RUF012

    assert census.side_for(nn.Conv2d(3, 1, 1)) == census.SIDE
    assert census.side_for(Even(nn.Conv2d(3, 1, census.SIDE + 1))) == 2 * census.SIDE
    assert census.side_for(nn.Conv2d(3, 1, census.SIDE + 1)) == 224
