#!/usr/bin/env python3
"""The core of the tests on the installed package, by Python and torch: one line for each pair in docs/versions.csv.

    .ci/versions.py PYTHON TORCH...     such as: .ci/versions.py python3.12 torch==2.10.0 "torch==2.12.*" torch

PYTHON needs pip and venv. Builds one wheel, which then serves each torch in an environment of its own (up to 6 GB,
removed afterwards). Nothing is taken from the checkout but the tests. Fails if a test does, or if something cannot be
installed.
"""

import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "versions.csv"
COLUMNS = ["date", "commit", "python", "torch", "built_with", "fast_path", "passed", "failed", "skipped", "note"]
CORE = """
operation/forward operation/gradients operation/contract operation/aliases backends/fast_path native/native cuda/plan
replace/replace replace/recognise
"""
# torchvision and timm have layers that replace and recognise are tested on; pip takes the torchvision of that torch.
BESIDE = ["torchvision", "timm", "numpy", "pytest", "pytest-xdist", "hypothesis"]
# Run without a compiler: the wheel's libraries have to load as they are.
FACTS = """
import json, pathlib, platform, sys, torch, se_fused
from se_fused import backends, native
assert pathlib.Path(se_fused.__file__).is_relative_to(sys.prefix), se_fused.__file__
why = backends.CPU.why_not(torch.device("cpu"))
assert why is None, why
built = json.loads((native.library("cpu").parent / "build.json").read_text())["compiler"]
fast_path = "yes" if backends.CPU.has_fast_path() else "no"
versions = dict(python=platform.python_version(), torch=torch.__version__)
print(json.dumps(versions | dict(built_with=built, fast_path=fast_path)))
"""


def output(*command, **more):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout.strip()


def tested(python, torch, wheel, tests, work):
    """The line of one torch, and what failed."""
    output(python, "-m", "venv", "--clear", work / "venv")
    python = work / "venv" / "bin" / "python"
    output(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, wheel, *BESIDE)
    facts = json.loads(output(python, "-c", FACTS, cwd=tests, env=os.environ | {"CXX": "none"}))
    files = ["tests/{}/test_{}.py".format(*name.split("/")) for name in CORE.split()]
    done = subprocess.run([python, "-m", "pytest", "-rfE", *files], cwd=tests, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-20_000:], flush=True)
    last = done.stdout.strip().rpartition("\n")[2]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}
    failed = sum(counts.get(word, 0) for word in ("failed", "error", "errors"))
    note = "; ".join(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)[:5])
    if done.returncode and not note:
        note = f"pytest exited with {done.returncode}"
    return facts | {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}, note


def main(python, *torches):
    changed = output("git", "status", "--porcelain", "--", ".", ":!docs", cwd=ROOT)
    commit = output("git", "rev-parse", "--short", "HEAD", cwd=ROOT) + ("+" if changed else "")
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tests = work / "checkout_without_package"
        for name in ("tests", "examples", "benchmarks", "dev"):
            shutil.copytree(ROOT / name, tests / name)
        shutil.copy(ROOT / "pyproject.toml", tests)
        output(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work, ROOT)
        (wheel,) = work.glob("*.whl")
        for torch in torches:
            print(f"== {python} {torch}", flush=True)
            line, note = tested(python, torch, wheel, tests, work)
            notes.append(note)
            line |= {"date": datetime.date.today().isoformat(), "commit": commit, "note": note}
            with RECORD.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(line)
    return 1 if any(notes) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
