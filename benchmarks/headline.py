"""The README's numbers, from the files of record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from . import coverage, gpu_report, shapes
from .layer_cpu_report import Line, mean, ratio, select, times

PEERS = ("compile", "onnxruntime", "openvino")
TEXT = """
* **A layer**: forward on {threads} CPU threads {layer_eager} times as fast as eager PyTorch and {layer_peer} times as
  fast as the fastest of torch.compile, ONNX Runtime and OpenVINO; in place {in_place_eager} and {in_place_peer} times
  (geometric means of {layer_shapes} shapes, float32; at {layer_losses} of them it is slower out of place than a peer).
* **Whole networks**: {models_replaced} times as fast as before `replace`, {models_in_place} times in place
  ({models} timm networks on a CPU, batch {models_batches}); under torch.compile nothing changes.
* **Training**: forward and backward {training_eager} times as fast as eager's layer, backward alone {backward_eager}.
* **`replace`** recognises {coverage_replaced} SE layers in {coverage_models} models of {coverage_libraries}, and leaves
  {coverage_skipped} with a reason.
* **GPU**: right on an {gpu} at all {gpu_right} calls compared with float64. As calls from Python {gpu_calls_eager}
  times as fast as eager (batch 1, float16, forward); inside a CUDA graph slower than torch.compile, which takes
  {gpu_graph_compile} of the time.
"""


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{times(min(found))} to {times(max(found))}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def numbers(
    layer: Sequence[Line], models: Sequence[Line], covered: Sequence[Line], gpu: gpu_report.Results
) -> dict[str, str]:
    """Each number as text, by its name in TEXT."""
    cells = select(layer, "float32", "contiguous", "forward")
    beside_peers = [ratio(cells[str(shape)], PEERS) for shape in shapes.LAYER]
    networks = {
        contender: _range(
            float(line["original_by_this"])
            for line in models
            if (line["mode"], line["contender"]) == ("eager", contender)
        )
        for contender in ("replaced", "in place")
    }
    cases = gpu_report.best_measured(gpu)
    first = ("float16", "contiguous", "forward", 1)
    as_calls = [c.ratio("eager", "calls") for c in cases if (c.dtype, c.layout, c.direction, c.n) == first]
    in_graphs = [found for case in cases if (found := case.ratio("compile")) is not None]
    return {
        "threads": layer[0]["threads"],
        "layer_shapes": str(len(shapes.LAYER)),
        "layer_eager": f"{mean(layer, 'forward', ['eager']):.1f}",
        "layer_peer": f"{mean(layer, 'forward', PEERS):.1f}",
        "layer_losses": str(sum(found is not None and found < 1 for found in beside_peers)),
        "in_place_eager": f"{mean(layer, 'forward', ['eager'], 'fused_inplace'):.1f}",
        "in_place_peer": f"{mean(layer, 'forward', PEERS, 'fused_inplace'):.1f}",
        "backward_eager": f"{mean(layer, 'backward', ['eager']):.1f}",
        "training_eager": f"{mean(layer, 'forward_backward', ['eager']):.1f}",
        "models": str(len({line["network"] for line in models})),
        "models_batches": _listed(list(dict.fromkeys(line["n"] for line in models))),
        "models_replaced": networks["replaced"],
        "models_in_place": networks["in place"],
        "coverage_models": str(len(covered)),
        "coverage_libraries": _listed(list(dict.fromkeys(line["library"] for line in covered))),
        "coverage_replaced": str(coverage.total(covered, "replaced")),
        "coverage_skipped": str(coverage.total(covered, "skipped")),
        "gpu": gpu.run["gpu"].removeprefix("NVIDIA "),
        "gpu_right": str(sum(line["outcome"] == "right" for line in gpu.smoke)),
        "gpu_calls_eager": f"{statistics.geometric_mean(found for found in as_calls if found is not None):.1f}",
        "gpu_graph_compile": f"{min(in_graphs):.2f} to {max(in_graphs):.2f}",
    }


def text(found: dict[str, str]) -> str:
    return TEXT.format_map(found)
