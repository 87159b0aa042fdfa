"""Runs every benchmark that fits this machine, then draws the figures and fills in the tables of docs/benchmarks.md.

    python benchmarks/run.py --out benchmarks/results [--quick] [--figures docs/figures] [--only cpu_pass drift ...]

Belongs here: which scripts run with which arguments. Does not belong here: measuring. Each script is a process of its own, so
that neither memory nor compiled code of one reaches the next. A script that fails does not stop the rest; the exit status tells.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run(*command: str) -> bool:
    print("==", " ".join(Path(part).name if part.startswith("/") else part for part in command), flush=True)
    # The repository comes first, whether or not the library is installed.
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode == 0


def cpu_pass(out: Path, quick: bool) -> bool:
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("== cpu_pass: left out, pytest-benchmark is not installed")
        return True
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report.json")  # it names the host, so it is not kept
        size = ["--weights=1048576", "--sweeps=2", "--no-compile"] if quick else []
        options = [
            f"--benchmark-json={report}",
            "--benchmark-disable-gc",
            "--benchmark-columns=median",
            "-p",
            "no:cacheprovider",
            "-q",
        ]
        timed = run("-m", "pytest", str(HERE / "cpu_pass.py"), *options, *size)
        return timed and run(str(HERE / "cpu_pass.py"), report, str(out / "cpu_pass.csv"))


def drift(out: Path, quick: bool) -> bool:
    return run(str(HERE / "drift.py"), "--out", str(out / "drift.csv"), *(["--steps", "20"] if quick else []))


def fidelity(out: Path, quick: bool) -> bool:
    script = [str(HERE / "fidelity.py"), "--out", str(out / "fidelity.csv")]
    # The second learning rate has updates far below half a unit of bf16.
    return run(*script, *(["--quick"] if quick else [])) and (quick or run(*script, "--append", "--loops", "open", "--lr", "1e-7"))


def step(out: Path, quick: bool) -> bool:
    size = ["--model-shape", "llama-tiny", "--dtype", "float32", "--tokens", "2x8", "--rounds", "2"] if quick else []
    return run(str(HERE / "step.py"), "--device", "cpu", "--out", str(out / "step.csv"), *size)


def scaling(out: Path, quick: bool) -> bool:
    return run(str(HERE / "scaling.py"), "--device", "cpu", "--out", str(out / "scaling.csv"), *(["--quick"] if quick else []))


def journal(out: Path, quick: bool) -> bool:
    return run(
        str(HERE / "journal.py"),
        "--out",
        str(out / "journal.csv"),
        *(["--records", "100", "--rounds", "2", "--model-shape", "llama-tiny"] if quick else []),
    )


def told(out: Path, quick: bool) -> bool:
    size = ["--model-shape", "llama-tiny", "--tokens", "2x8", "--rounds", "2"] if quick else []
    return run(str(HERE / "told.py"), "--out", str(out / "told.csv"), *size)


def replay(out: Path, quick: bool) -> bool:
    return run(str(HERE / "replay.py"), "--device", "cpu", "--out", str(out / "replay.csv"), *(["--quick"] if quick else []))


def rule_pass(out: Path, quick: bool) -> bool:
    return run(str(HERE / "rule_pass.py"), "--device", "cpu", "--out", str(out / "rule_pass.csv"), *(["--quick"] if quick else []))


def sass(out: Path, quick: bool) -> bool:
    if quick:
        print("== sass: left out, it has no small size")
        return True
    # The page's table is of this type; `make sass` counts all, in many minutes.
    return run(str(HERE / "sass.py"), "--dtypes", "float16", "--out", str(out / "sass.csv"))


def gpu_rule_pass(out: Path, quick: bool) -> bool:
    return run(
        str(HERE / "rule_pass.py"), "--device", "cuda", "--out", str(out / "gpu_rule_pass.csv"), *(["--quick"] if quick else [])
    )


def gpu_pass(out: Path, quick: bool) -> bool:
    return run(str(HERE / "gpu_pass.py"), "--out", str(out / "gpu_pass.csv"), *(["--quick"] if quick else []))


def gpu_linear(out: Path, quick: bool) -> bool:
    return run(str(HERE / "gpu_linear.py"), "--out", str(out / "gpu_linear.csv"), *(["--quick"] if quick else []))


def gpu_step(out: Path, quick: bool) -> bool:
    size = ["--model-shape", "opt-125m", "--tokens", "16x32", "--rounds", "3"] if quick else []
    return run(str(HERE / "step.py"), "--device", "cuda", "--out", str(out / "gpu_step.csv"), *size)


def gpu_scaling(out: Path, quick: bool) -> bool:
    return run(str(HERE / "scaling.py"), "--device", "cuda", "--out", str(out / "gpu_scaling.csv"), *(["--quick"] if quick else []))


def gpu_replay(out: Path, quick: bool) -> bool:
    return run(str(HERE / "replay.py"), "--device", "cuda", "--out", str(out / "gpu_replay.csv"), *(["--quick"] if quick else []))


SCRIPTS = (
    cpu_pass, rule_pass, drift, fidelity, step, scaling, replay, journal, told, sass, gpu_pass, gpu_rule_pass, gpu_linear, gpu_step, gpu_scaling, gpu_replay,
)  # fmt: skip
RUNS = {script.__name__: script for script in SCRIPTS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument(
        "--figures", type=Path, help="folder of the figures; default: docs/figures if --out is benchmarks/results, else --out"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args(arguments)
    committed = args.out.resolve() == (HERE / "results").resolve()
    figures = args.figures or (HERE.parent / "docs" / "figures" if committed else args.out)
    if args.quick and committed:
        parser.error("--quick would overwrite the committed results with meaningless ones: give another --out")
    gpu = torch.cuda.is_available()
    done = True
    for name in args.only:
        if name.startswith("gpu_") and not gpu:
            print(f"== {name}: left out, torch finds no CUDA device")
            continue
        start = time.monotonic()
        done &= RUNS[name](args.out, args.quick)
        print(f"== {name} took {time.monotonic() - start:.0f} s", flush=True)
    done &= run(str(HERE / "plot.py"), "--results", str(args.out), "--figures", str(figures))
    if committed:
        done &= run(str(HERE / "tables.py"))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
