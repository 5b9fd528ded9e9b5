"""Times calls with nothing to compute at this commit and at another one, in pairs of processes that take turns.

python -m benchmarks.call_overhead COMMIT [--out benchmarks/results/call_overhead.csv]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from se_fused import timing

from . import ROOT, layer_cpu, networks
from .text import markdown, spread_of

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


def pair(earlier: Path, rounds: int) -> timing.Measured:
    """The times of each call in one pair of processes, by the call and "before" or "after"."""
    times: timing.Times = {}
    with worker(earlier) as (old, calls), worker(ROOT) as (new, _):
        others = timing.Others(mine=(old.pid, new.pid))
        for i in range(rounds):
            for call in calls:
                turns = [("before", old), ("after", new)]
                for side, process in turns if i % 2 else reversed(turns):
                    times.setdefault(f"{call} {side}", []).append(ask(process, call))
        return timing.Measured(times, others(), 0)


def measure(earlier: Path, rounds: int) -> timing.Measured:
    """The times of PAIRS pairs. Raises BusyMachine if others use the CPU during most pairs."""
    kept: list[timing.Measured] = []
    dropped = 0
    while len(kept) < PAIRS:
        found = pair(earlier, rounds // PAIRS)
        if found.others <= timing.QUIET:
            kept.append(found)
        elif (dropped := dropped + 1) > timing.PATIENCE * PAIRS:
            raise timing.BusyMachine(f"other processes use {found.others:.0%} of the CPU")
    times = {name: [us for each in kept for us in each.times[name]] for name in kept[0].times}
    return timing.Measured(times, max(each.others for each in kept), dropped * (rounds // PAIRS))


def main(
    before: Annotated[str, typer.Argument(help="The commit to compare with.")],
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = RECORD,
    rounds: Annotated[int, typer.Option(min=PAIRS)] = 300,
) -> None:
    conditions = layer_cpu.conditions(1) | {"before": before}
    facts = {key: conditions[key] for key in ("date", "commit", "before", "cpu", "threads", "torch")}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder, "before")
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(earlier), before], check=True)
        try:
            found = measure(earlier, rounds)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(earlier)], check=True)
    lines = []
    for call in dict.fromkeys(name.split()[0] for name in found.times):
        sides = {side: found.times[f"{call} {side}"] for side in ("before", "after")}
        line = facts | {"call": call, "others": f"{found.others:.3f}", "dropped": str(found.dropped)}
        line |= {"rounds": str(len(sides["after"]))}
        for side, times in sides.items():
            line |= {f"{side}_{p}_us": f"{us:.3f}" for p, us in timing.spread(times)._asdict().items()}
        ratios = timing.ratio_spread(found.times, f"{call} after", f"{call} before")._asdict().items()
        lines.append(line | {f"ratio_{p}": f"{ratio:.3f}" for p, ratio in ratios})
        typer.echo(", ".join(row(lines[-1])))
    networks.write(out, lines)


def row(line: networks.Line) -> list[str]:
    """The call, its microseconds at both commits, and their ratio."""
    columns = ("before_{}_us", "after_{}_us", "ratio_{}")
    rounds = int(line["rounds"])
    return [line["call"].replace("_", " "), *(timing.text(spread_of(line, column), rounds) for column in columns)]


def table(lines: Iterable[networks.Line]) -> str:
    """The CSV as a table."""
    lines = list(lines)
    before, after = lines[0]["before"], lines[0]["commit"]
    header = ["call", f"µs at {before}", f"µs at {after}", f"{after} / {before}"]
    return f"{markdown(header, map(row, lines))}\n{networks.machine(lines, bold='')}"


if __name__ == "__main__":
    typer.run(main)
