"""Fuzz the readers: `make fuzz RUNS=1000000`, or

    python -m tests.fuzz.run --target journal masks --runs 1000000 [--engine atheris|random] [--seed 0] [--crashes FOLDER]

Belongs here: the two engines, counting, the command line. Does not belong here: what is fuzzed (targets.py).

`atheris` is libFuzzer with the coverage of Python code; the target's own mutator takes turns with libFuzzer's. `random` needs nothing but
Python: it mutates seeds and a small pool of accepted inputs. Both stop at the first finding, keep its input, and end with status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST = 10  # seconds of CPU time that one input may take (SIGALRM is pytest-timeout's)
POOL = 256


@dataclass
class Tally:
    """What a run came to."""

    runs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    def line(self, name: str, engine: str) -> str:
        rate = self.runs / self.seconds if self.seconds else 0
        return (
            f"{name}: {self.runs} inputs by {engine}, {self.accepted} accepted, no finding; "
            f"{self.seconds:.0f} s, {rate:.0f} a second, slowest {1e3 * self.slowest:.0f} ms"
        )


def too_long(*_: Any) -> None:
    raise TimeoutError(f"an input took more than {LONGEST} s")


def fuzz_random(target: Any, runs: int, seed: int, crashes: Path | None = None) -> Tally:
    """`runs` inputs that are a function of `seed`.

    Raises:
        Whatever the target's check raises; the input is then in `crashes`.
    """
    rng, tally, pool = random.Random(seed), Tally(), list(target.seeds())
    fixed = len(pool)
    begin = time.perf_counter()
    before = signal.signal(signal.SIGPROF, too_long)
    try:
        while tally.runs < runs:
            data = pool[tally.runs] if tally.runs < fixed else rng.choice(pool)
            if tally.runs >= fixed:
                for _ in range(rng.choice((1, 1, 2, 3))):
                    data = target.mutate(data, rng)[:65536]
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_PROF, LONGEST)
            try:
                accepted = target.check(data)
            except BaseException:
                if crashes:
                    crashes.mkdir(parents=True, exist_ok=True)
                    (crashes / f"{target.name}-{tally.runs}").write_bytes(data)
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            tally.slowest = max(tally.slowest, time.perf_counter() - start)
            tally.runs += 1
            tally.accepted += accepted
            if accepted and rng.random() < 0.05:  # grow away from the seeds
                if len(pool) < POOL:
                    pool.append(data)
                else:
                    pool[rng.randrange(fixed, POOL)] = data
    finally:
        signal.signal(signal.SIGPROF, before)
    tally.seconds = time.perf_counter() - begin
    return tally


def fuzz_atheris(name: str, runs: int, seed: int, crashes: Path) -> None:
    """Ends the process, as libFuzzer does."""
    import atheris

    with atheris.instrument_imports(include=["zo_kernels", "zo_finetune", "json"]):
        from tests.fuzz.targets import TARGETS

        target, tally = TARGETS[name](), Tally()
        for data in target.seeds():  # some readers are imported when they are needed
            target.check(data)
    corpus = crashes / f"{name}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(target.seeds()):
        (corpus / f"seed-{k}").write_bytes(data)

    def one(data: bytes) -> None:
        start = time.perf_counter()
        tally.accepted += target.check(data)
        tally.slowest = max(tally.slowest, time.perf_counter() - start)
        tally.runs += 1
        if tally.runs == runs:
            tally.seconds = time.perf_counter() - begin
            print(tally.line(name, "atheris"), flush=True)

    def mutate(data: bytes, size: int, number: int) -> bytes:
        rng = random.Random(number)
        changed = atheris.Mutate(data, size) if rng.random() < 0.3 else target.mutate(data, rng)
        return changed[:size]

    options = [
        f"-runs={runs}",
        f"-seed={seed + 1}",
        f"-timeout={LONGEST}",
        "-max_len=65536",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    begin = time.perf_counter()
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={crashes}/{name}-", str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    names = ("journal", "factors", "start", "masks", "scales", "options", "folder", "rows", "tables")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=names, default=list(names))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto", help="auto: atheris if it is installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--crashes", type=Path, default=Path("build/fuzz"), help="folder of inputs that were findings, and of corpora"
    )
    args = parser.parse_args(arguments)
    os.environ["LANGUAGE"] = "C"  # argparse asks gettext for its words, which looks for a catalogue on the disk every time
    engine = args.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    if len(args.target) > 1:  # a process each: libFuzzer ends its own, and a crash of one must not hide another
        options = ["--runs", str(args.runs), "--engine", engine, "--seed", str(args.seed), "--crashes", str(args.crashes)]
        command = [sys.executable, "-m", "tests.fuzz.run", *options, "--target"]
        return max(subprocess.run([*command, name]).returncode != 0 for name in args.target)
    (name,) = args.target
    if engine == "atheris":
        fuzz_atheris(name, args.runs, args.seed, args.crashes)
        return 0
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]()
    try:
        tally = fuzz_random(target, args.runs, args.seed, args.crashes)
    except Exception:
        traceback.print_exc()
        print(f"{name}: a finding; its input is in {args.crashes}", file=sys.stderr)
        return 1
    finally:
        target.close()
    print(tally.line(name, "random"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
