"""Commands of the application in processes of their own, for what only a process shows: a kill.

Belongs here: how such a process is made, without the seconds that an interpreter takes to import torch and transformers: one that has
imported them forks. It has run nothing before, so that no thread pool of torch's is there to be lost. Does not belong here: assertions.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

PARENT = """
import json, os, signal, sys

import peft, torch, transformers
from transformers import AutoTokenizer, LlamaForCausalLM
import zo_kernels
from zo_finetune import compare, console, figures, run, suite
from zo_finetune.cli import main
from zo_finetune.objectives.classification import Classification

torch.set_num_threads(1)
zo_kernels.MeZOStep(torch.nn.Linear(1, 1), 1e-3)  # torch imports its compiler for the first optimizer
console.PATIENCE = 3600.0
figures.draw_curve = lambda path, *_: path.write_bytes(b"")
loss = Classification.loss

def child(order):
    os.dup2(os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    left = [order["calls"]]

    def counted(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), order["how"])
        return loss(*args)

    Classification.loss = counted
    return main(order["command"])

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(json.loads(line))
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Children:
    """Starts its process for the first command, and ends it as a context manager."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None

    def run(self, command: list[str], stderr: Path, calls: int, how: int = signal.SIGKILL) -> int:
        """Run a command to its end; returns its wait status.

        Args:
            stderr: a file for what it says.
            calls, how: it gets this signal in its so-manyth loss.
        """
        if self._parent is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._parent = subprocess.Popen(
                [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert self._parent.stdin is not None and self._parent.stdout is not None
        order: dict[str, Any] = {"command": command, "stderr": str(stderr), "calls": calls, "how": int(how)}
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._parent is not None:
            self._parent.communicate()
