"""Times calls with nothing to compute at this commit and at another one, in pairs of processes that take turns.

python -m benchmarks.call_overhead COMMIT [--out benchmarks/results/call_overhead.csv]
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from se_fused import timing

from . import ROOT, layer_cpu
from .text import markdown

RECORD = layer_cpu.RECORD.with_name("call_overhead.csv")
# Where code and memory of a process lie is decided at its start and changes its times, so several pairs take part.
PAIRS = 10
# Reads the name of a call, runs one batch of it, and answers with the nanoseconds per call.
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from itertools import repeat
import torch, se_fused
from examples.zoo import import_torchvision
torch.set_num_threads(1)
SqueezeExcitation = import_torchvision().ops.SqueezeExcitation
x, w1, w2 = torch.randn(1, 16, 1, 1), torch.randn(4, 16), torch.randn(16, 4)
own, replaced = se_fused.SqueezeExcite(16).eval(), SqueezeExcitation(16, 4).eval()
assert se_fused.replace(replaced).replaced
def bare(): se_fused.squeeze_excite(x, w1, None, w2, None)
def in_place(): se_fused.squeeze_excite(x, w1, None, w2, None, inplace=True)
def strided(): se_fused.squeeze_excite(y, w1, None, w2, None)
def training(): own(x)  # with gradients, below
def layer(): own(x)
def layer_replaced(): replaced(x)
y = torch.randn(1, 32, 1, 1)[:, ::2]
calls = {f.__name__: f for f in (bare, in_place, strided, training, layer, layer_replaced)}
print(*calls, flush=True)
for line in sys.stdin:
    name = line.strip()
    call = calls[name]
    with torch.inference_mode(name != "training"):
        for _ in repeat(None, 50): call()
        start = time.perf_counter_ns()
        for _ in repeat(None, 500): call()
        print((time.perf_counter_ns() - start) / 500, flush=True)
"""


@contextmanager
def worker(root: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], call: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(call + "\n")
    process.stdin.flush()
    return float(process.stdout.readline()) / 1e3


def main(
    before: Annotated[str, typer.Argument(help="The commit to compare with.")],
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    rounds: Annotated[int, typer.Option(min=PAIRS)] = 300,
) -> None:
    conditions = layer_cpu.conditions(1) | {"before": before}
    facts = {key: conditions[key] for key in ("date", "commit", "before", "cpu", "torch")}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder, "before")
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(earlier), before], check=True)
        try:
            times: dict[str, timing.Times] = {}
            for _ in range(PAIRS):
                with worker(earlier) as (old, calls), worker(ROOT) as (new, _):
                    for i in range(rounds // PAIRS):
                        for call in calls:
                            turns = [("before", old), ("after", new)]
                            for side, process in turns if i % 2 else reversed(turns):
                                found = times.setdefault(call, {"before": [], "after": []})
                                found[side].append(ask(process, call))
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(earlier)], check=True)
    lines = []
    for call, found in times.items():
        ratios = [after / earlier for after, earlier in zip(found["after"], found["before"], strict=True)]
        p20, p50, p80 = (f"{ratio:.3f}" for ratio in timing.spread(ratios))
        us = {f"{side}_us": f"{timing.spread(values).p50:.2f}" for side, values in found.items()}
        ratio = {"after_by_before": p50, "p20": p20, "p80": p80}
        lines.append(facts | {"call": call, "rounds": len(ratios)} | us | ratio)
        typer.echo(f"{call}: {us['before_us']} us before, {us['after_us']} after, ratio {p50} ({p20} to {p80})")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def table(lines: Iterable[dict[str, str]]) -> str:
    """The CSV as a table."""
    lines = list(lines)
    rows = [
        [line["call"].replace("_", " "), line["before_us"], line["after_us"],
         f"{line['after_by_before']} ({line['p20']} to {line['p80']})"]
        for line in lines
    ]  # fmt: skip
    line = lines[0]
    return (
        markdown(["call", f"µs at {line['before']}", f"µs at {line['commit']}", "later / earlier (p20 to p80)"], rows)
        + f"\n{line['cpu']}, one thread, PyTorch {line['torch']}, {line['date']}; "
        f"{line['rounds']} interleaved rounds.\n"
    )


if __name__ == "__main__":
    typer.run(main)
