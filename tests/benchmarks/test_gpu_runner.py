"""The runner of gpu-check: a part that fails, in whatever way, costs only itself."""

from __future__ import annotations

import dataclasses
import json
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[2]
PASSES = "print('case 0: fine'); print('1 of 1 cases')"


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function that runs gpu-check with programs in place of some parts: (exit status, outcomes by part)."""

    def run(seconds: float = 1800, silence: float = 0, **programs: str) -> tuple[int, dict[str, dict[str, object]]]:
        def part_of(part: gpu_check.Part) -> gpu_check.Part:
            def command(task: gpu_check.Task) -> list[str]:
                head = f"import os, signal, sys, time\nstart = {task.start}\n"
                return [sys.executable, "-u", "-c", head + textwrap.dedent(programs[part.name])]

            return dataclasses.replace(part, command=command, silence=part.silence and (silence or part.silence))

        parts = [part_of(part) for part in gpu_check.PARTS if part.name in programs]
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        code = gpu_check.main(["--out", str(tmp_path), "--parts", ",".join(programs), "--minutes", str(seconds / 60)])
        monkeypatch.undo()
        outcomes = json.loads((tmp_path / "run.json").read_text())["parts"]
        return code, {outcome["part"]: outcome for outcome in outcomes}

    return run


def test_a_case_that_raises_costs_its_part_and_is_named(part, tmp_path: Path) -> None:
    raises = """
        if start == 0:
            print('case 0: first'); print('case 1: second')
            raise RuntimeError('an illegal memory access')
        print(f'case {start}: third'); print('1 of 1 cases')
    """
    code, outcomes = part(smoke=raises, models=PASSES)
    assert code == 1
    assert outcomes["smoke"]["outcome"] == "failed"
    assert outcomes["smoke"]["blamed"] == ["case 1: second: RuntimeError: an illegal memory access"]
    assert "case 2: third" in (tmp_path / "log.txt").read_text(), "it goes on after the case that broke it"
    assert outcomes["models"]["outcome"] == "passed"


def test_a_killed_child_is_resumed_after_its_case(part, tmp_path: Path) -> None:
    killed = """
        for case in range(start, 4):
            print(f'case {case}: number {case}')
            if case == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
        print('2 of 2 cases')
    """
    code, outcomes = part(layer=killed, sweep=PASSES)
    assert code == 1
    assert outcomes["layer"]["outcome"] == "failed"
    assert outcomes["layer"]["blamed"] == ["case 1: number 1: killed by SIGSEGV"]
    assert "case 3: number 3" in (tmp_path / "log.txt").read_text()
    assert outcomes["sweep"]["outcome"] == "passed"


def test_a_case_that_hangs_is_ended_with_its_children_and_named(part, tmp_path: Path) -> None:
    hangs = f"""
        import subprocess
        if start:
            print('case 6: goes on'); print('1 of 1 cases'); sys.exit()
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        open({str(tmp_path / "pid")!r}, 'w').write(str(child.pid))
        print('case 5: the one that hangs')
        time.sleep(600)
    """
    code, outcomes = part(silence=8, sweep=hangs, triton=PASSES)
    assert code == 1
    assert outcomes["sweep"]["blamed"] == ["case 5: the one that hangs: no word for 8 s"]
    assert "case 6: goes on" in (tmp_path / "log.txt").read_text()
    assert outcomes["triton"]["outcome"] == "passed"
    assert not is_running((tmp_path / "pid").read_text())


def test_a_part_that_never_ends_is_ended_by_its_limit(part) -> None:
    code, outcomes = part(
        seconds=10, microbenchmarks="while True: print('case 0: on and on'); time.sleep(0.01)", triton=PASSES
    )
    assert code == 1
    assert outcomes["microbenchmarks"]["outcome"] == "failed"
    assert outcomes["microbenchmarks"]["reason"].startswith("no end within its time in ")
    assert outcomes["microbenchmarks"]["seconds"] < 60


def test_a_case_that_only_looks_like_one_and_garbled_facts_break_nothing(part) -> None:
    garbled = "print('case of trouble'); print('facts {oops'); raise RuntimeError('no case at hand')"
    code, outcomes = part(smoke=garbled, microbenchmarks=PASSES)
    assert code == 1
    assert outcomes["smoke"]["reason"] == "RuntimeError: no case at hand in no case"
    assert outcomes["microbenchmarks"]["outcome"] == "passed"


def test_a_command_that_cannot_be_started_is_a_failure_of_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [dataclasses.replace(p, command=lambda task: ["/no/such/program"]) for p in gpu_check.PARTS]
    monkeypatch.setattr(gpu_check, "PARTS", broken)
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "smoke"]) == 1
    (smoke,) = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert smoke["outcome"] == "failed"
    assert "/no/such/program" in smoke["reason"]


def test_a_gpu_that_a_crash_has_taken_away_does_not_undo_the_failure(part) -> None:
    code, outcomes = part(smoke="""
        if start:
            print('wrong: the cuda kernels cannot run here'); sys.exit(1)
        print('case 0: first')
        os.kill(os.getpid(), signal.SIGABRT)
    """)  # fmt: skip
    assert code == 1
    assert outcomes["smoke"]["outcome"] == "failed"
    assert outcomes["smoke"]["reason"] == "killed by SIGABRT in case 0: first"


def test_what_python_says_as_it_ends_is_no_failure(part) -> None:
    code, outcomes = part(microbenchmarks="print('case 0: fine'); print('Traceback (ignored)'); print('1 of 1 cases')")
    assert code == 0
    assert outcomes["microbenchmarks"]["outcome"] == "passed"


def test_no_process_outlives_the_run(tmp_path: Path) -> None:
    """SIGTERM must end every process, because `timeout` and batch systems send it."""
    program = f"""
        import dataclasses, signal, sys
        from benchmarks import gpu_check
        hang = "import os, time; print('case 0: hangs', os.getpid(), flush=True); time.sleep(600)"
        parts = [p for p in gpu_check.PARTS if p.name == "smoke"]
        gpu_check.PARTS = [dataclasses.replace(p, command=lambda task: [sys.executable, "-c", hang]) for p in parts]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        gpu_check.main(["--out", {str(tmp_path)!r}, "--parts", "smoke", "--minutes", "9"])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)
    log = tmp_path / "log.txt"
    while not (log.exists() and "hangs" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    child = log.read_text().split("hangs")[1].split()[0]
    process.terminate()
    process.wait()
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "goes on" not in log.read_text(), "nothing is begun after the end"


def test_a_wrong_result_fails_its_part_and_goes_on(part) -> None:
    code, outcomes = part(smoke="print('case 0: x'); print('wrong: y is off'); sys.exit(1)", microbenchmarks=PASSES)
    assert code == 1
    assert outcomes["smoke"]["wrong"] == ["wrong: y is off"]
    assert outcomes["microbenchmarks"]["outcome"] == "passed"


def test_no_rows_is_a_failure_and_nothing_run_too(part) -> None:
    assert part(layer="print('0 of 0 cases'); sys.exit(1)")[0] == 1
    code, outcomes = part(models="print('not run: timm is not installed'); sys.exit(77)")
    assert code == 1, "nothing ran"
    assert (outcomes["models"]["outcome"], outcomes["models"]["reason"]) == ("not run", "timm is not installed")
    assert part(models="print('not run: no timm'); sys.exit(77)", microbenchmarks=PASSES)[0] == 0


@pytest.mark.parametrize(
    ("output", "status", "outcome", "code"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", 9, "failed", 1),
        ("========= Error: Device not supported", 1, "not run", 1),
        ("Failed to initialize NumPy\n========= ERROR SUMMARY: 5 errors", 9, "failed", 1),
        ("nothing of a sanitizer", 0, "failed", 1),
    ],
)
def test_what_the_sanitizer_says(
    output: str, status: int, outcome: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--parts", "memcheck"]) == code
    (found,) = json.loads((tmp_path / "out" / "run.json").read_text())["parts"]
    assert found["outcome"] == outcome
