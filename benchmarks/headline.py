"""The README's numbers, from the files of record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from . import baselines, coverage, coverage_report, engines, gpu_report, shapes
from .layer_cpu_report import Line, mean
from .networks import ratios
from .text import spread_of

_BASELINES = [*baselines.BASELINES]
# The lines are as long as they are with the numbers in them.
TEXT = """
* **Whole networks on a CPU**, inference: `replace(model, level="block")`, which computes SE layers together with the layers around
  them, makes them {models_block} times as fast as eager PyTorch, on average {models_block_means}. Plain
  `replace(model)` changes little: {models_replaced_mean} on average ({models_replaced}). The layers alone hold little more: without any SE layer
  the networks run at {models_without_mean} ({models_without}). These are {models} networks of {models_libraries}.
* **Training steps** of {training_count} networks on a CPU run at {training_networks} times eager speed, {training_noise} of them within the noise.
* **One SE layer** on a CPU runs at {layer_eager} times eager speed, in place at {in_place_eager}, and forward with backward at {training_eager}. Compared with the
  fastest of eager, torch.compile, ONNX Runtime and OpenVINO it runs at {layer_best}; with `out=`,
  which writes into memory that is there already, as the two engines do, at {layer_out_best}. These are
  geometric means of {layer_shapes} shapes (float32, {threads} threads).
* **Other ways to run a network.** Under torch.compile `replace` gains nothing ({models_compiled}). Exported to ONNX Runtime and
  OpenVINO, the originals run at {models_engines} times eager speed: for inference alone, look there first.
* **`replace`** fuses {coverage_fused} of {coverage_layers} SE layers in {coverage_kinds} models. Each stands for all that are made of the same modules:
  {coverage_architectures} architectures of {coverage_libraries} libraries. It says why it keeps the others ([list](docs/coverage.md)).
* **On a GPU** (one {gpu}): of {gpu_cases} calls {gpu_right} ran and agree with float64; the others were forced plans that cannot run them.
  {gpu_models} networks run at {gpu_calls} times eager speed after `replace` as ordinary calls, slower in {gpu_slower} cases, and at
  {gpu_graphs} in a CUDA graph. One layer runs at {gpu_calls_eager} times eager speed as a call (batch 1, float16); in a CUDA graph it is
  faster than torch.compile at {gpu_faster}. Level "block" has never run on a GPU.

[How this was measured](docs/benchmarks.md) · [How fast is your network?](#how-fast-is-your-network)
"""  # noqa: E501


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"


def _batches(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(line["n"] for line in lines))


def _mean(lines: Iterable[Line], variant: str, n: str | None = None) -> float:
    """The geometric mean of original / variant over the networks, of batch n or of all."""
    return statistics.geometric_mean(ratios([line for line in lines if n in (None, line["n"])], variant))


def _by_batch(layer: Sequence[Line], base: str) -> str:
    """The speed of `base` relative to the fastest baseline, for each batch."""
    batches = {"1": shapes.BATCH_1, "16": shapes.BATCH_16}
    means = {n: mean(layer, "forward", _BASELINES, base, members) for n, members in batches.items()}
    return _listed([f"{found:.2f} at batch {n}" for n, found in means.items()])


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
    of_gpu = {
        mode: [
            float(line["ratio_to_fused"])
            for line in gpu.models
            if (line["variant"], line["mode"]) == ("original", mode)
        ]
        for mode in ("calls", "graph")
    }
    as_calls = [c.ratio("eager", "calls") for c in cases if (c.dtype, c.layout, c.direction, c.n) == first]
    in_graphs = [found for case in cases if (found := case.ratio("compile")) is not None]
    return {
        "threads": layer[0]["threads"],
        "layer_shapes": str(len(shapes.LAYER)),
        "layer_eager": f"{mean(layer, 'forward', ['eager']):.1f}",
        "layer_best": _by_batch(layer, "fused"),
        "in_place_eager": f"{mean(layer, 'forward', ['eager'], 'fused_inplace'):.1f}",
        "layer_out_best": _by_batch(layer, "fused_out"),
        "training_networks": _range(ratios(training, "replaced")),
        "training_count": str(len(ratios(training, "replaced"))),
        "training_noise": str(
            sum(spread_of(line, "ratio_{}").p20 < 1 for line in training if line["variant"] == "replaced")
        ),
        "training_eager": f"{mean(layer, 'forward_backward', ['eager']):.1f}",
        "models": str(len({line["network"] for line in networks})),
        "models_libraries": _listed(list(dict.fromkeys(line["network"].partition(":")[0] for line in networks))),
        "models_replaced": _range(ratios(networks, "replaced")),
        "models_block": _range(ratios(networks, "block")),
        "models_block_means": _listed([f"{_mean(networks, 'block', n):.2f} at batch {n}" for n in _batches(networks)]),
        "models_replaced_mean": f"{_mean(networks, 'replaced'):.2f}",
        "models_without_mean": f"{_mean(networks, 'without SE'):.2f}",
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
        "gpu_cases": str(len(gpu.smoke)),
        "gpu_faster": f"{sum(found > 1 for found in in_graphs)} of {len(in_graphs)} calls",
        "gpu_models": str(len({line["model"] for line in gpu.models})),
        "gpu_calls": _range(of_gpu["calls"]),
        "gpu_slower": f"{sum(found < 1 for found in of_gpu['calls'])} of {len(of_gpu['calls'])}",
        "gpu_graphs": _range(of_gpu["graph"]),
    }


def text(found: dict[str, str]) -> str:
    return TEXT.format_map(found)
