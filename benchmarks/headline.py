"""The README's numbers, from the files of record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from . import baselines, coverage, coverage_report, engines, gpu_report, shapes
from .layer_cpu_report import Line, mean
from .networks import ratios

_BASELINES = [name for name in baselines.BASELINES if name != "eager"]
_GPU_NETWORKS = [("original", "graph"), ("original", "calls")]
TEXT = """
* **Whole networks** on a CPU run at {models_block} times eager speed after
  `replace(model, level="block")`, on average at {models_block_mean}. It computes SE layers together with the
  layers around them. After plain `replace(model)` they run at {models_replaced}. Without any SE layer they would
  run at {models_without}. These are {models} networks of {models_libraries}, with batches of {models_batches}.
* **Training steps** of whole networks run at {training_networks} times eager speed.
* **One SE layer** on a CPU runs at {layer_eager} times eager speed, in place at {in_place_eager}, and forward with
  backward at {training_eager}. The fastest of torch.compile, ONNX Runtime and OpenVINO takes {layer_best} times as
  long, and {layer_out_best} times as long as a layer that writes into memory that is there already (`out=`), as the two
  engines do. These are geometric means of {layer_shapes} shapes (float32, {threads} threads).
* **Other ways to run a network.** Under torch.compile `replace` changes nothing ({models_compiled}). Exported to
  ONNX Runtime and OpenVINO, the originals run at {models_engines} times eager speed: for inference alone, look
  there first.
* **`replace`** fuses {coverage_fused} of {coverage_layers} SE layers in {coverage_kinds} kinds of models, which stand
  for {coverage_architectures} architectures of {coverage_libraries} libraries. It says why it keeps the others
  ([list](docs/coverage.md)).
* **On a GPU** (one {gpu}) all {gpu_right} calls that were compared with float64 agree. Whole networks run at
  {gpu_networks} times eager speed: some get slower. One layer, called from Python, runs at {gpu_calls_eager} times
  eager speed (batch 1, float16). Inside a CUDA graph torch.compile takes {gpu_graph_compile} times as
  long as the layer.

[How this was measured](docs/benchmarks.md)
"""


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def numbers(
    layer: Sequence[Line],
    networks: Sequence[Line],
    compiled: Sequence[Line],
    training: Sequence[Line],
    covered: Sequence[Line],
    gpu: gpu_report.Results,
) -> dict[str, str]:
    """The numbers as texts, by their names in TEXT."""
    cases = gpu_report.best_measured(gpu)
    first = ("float16", "contiguous", "forward", 1)
    with_layers = [line for line in covered if coverage_report.layers([line])]
    as_calls = [c.ratio("eager", "calls") for c in cases if (c.dtype, c.layout, c.direction, c.n) == first]
    in_graphs = [found for case in cases if (found := case.ratio("compile")) is not None]
    return {
        "threads": layer[0]["threads"],
        "layer_shapes": str(len(shapes.LAYER)),
        "layer_eager": f"{mean(layer, 'forward', ['eager']):.1f}",
        "layer_best": f"{mean(layer, 'forward', _BASELINES):.1f}",
        "in_place_eager": f"{mean(layer, 'forward', ['eager'], 'fused_inplace'):.1f}",
        "layer_out_best": f"{mean(layer, 'forward', _BASELINES, 'fused_out'):.1f}",
        "training_networks": _range(ratios(training, "replaced")),
        "training_eager": f"{mean(layer, 'forward_backward', ['eager']):.1f}",
        "models": str(len({line["network"] for line in networks})),
        "models_libraries": _listed(list(dict.fromkeys(line["network"].partition(":")[0] for line in networks))),
        "models_batches": _listed(list(dict.fromkeys(line["n"] for line in networks))),
        "models_replaced": _range(ratios(networks, "replaced")),
        "models_block": _range(ratios(networks, "block")),
        "models_block_mean": f"{statistics.geometric_mean(ratios(networks, 'block')):.2f}",
        "models_without": _range(ratios(networks, "without SE")),
        "models_engines": _range(value for name in engines.ENGINES for value in ratios(networks, name)),
        "models_compiled": _range(ratios(compiled, "replaced")),
        "coverage_kinds": str(len(with_layers)),
        "coverage_libraries": str(len(coverage_report.libraries(covered))),
        "coverage_architectures": str(coverage.total(with_layers, "architectures")),
        "coverage_fused": str(coverage.total(covered, "replaced") + coverage.total(covered, "inline")),
        "coverage_layers": str(coverage_report.layers(covered)),
        "gpu": gpu.run["gpu"].removeprefix("NVIDIA "),
        "gpu_right": str(sum(line["outcome"] == "right" for line in gpu.smoke)),
        "gpu_calls_eager": f"{statistics.geometric_mean(found for found in as_calls if found is not None):.1f}",
        "gpu_graph_compile": f"{min(in_graphs):.1f} to {max(in_graphs):.1f}",
        "gpu_networks": _range(
            float(line["ratio_to_fused"]) for line in gpu.models if (line["variant"], line["mode"]) in _GPU_NETWORKS
        ),
    }


def text(found: dict[str, str]) -> str:
    return TEXT.format_map(found)
