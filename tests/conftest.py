"""What every test starts from: no network, torch's own generator seeded, and a SIGINT that interrupts; and what a run says last: which tests were
not run, and why."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup does, and a run then leaves it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download must fail, before transformers is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads that wait for one another would take each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: with a worker a core, one that begins last is waited for alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- what was not run ---------------------------------------------------------------------------------------------------

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository, on development machines
LEFT_OUT = pytest.StashKey[int]()  # tests that -m and -k leave out


def missing() -> Iterator[tuple[str, str]]:
    """What this machine or build lacks, and what is therefore not shown: whether tests say so by a skip or are not there at all."""
    from zo_kernels import _C

    if not _C.WITH_CUDA:
        yield (
            "nvcc (the extension was built without CUDA)",
            "the machine code of the CUDA kernels was not looked at: with nvcc, rebuild with ZO_KERNELS_CUDA=1",
        )
    if importlib.util.find_spec("triton") is None:
        yield "triton", "its kernels were neither compiled nor interpreted: pip install 'triton>=3.6'"
    best = _C.ISA_NAMES[_C.cpu_best_isa()]
    if best != _C.ISA_NAMES[-1]:
        yield f"a processor with {_C.ISA_NAMES[-1]}", f"the widest CPU kernels that ran are those of {best}"
    if not torch.cuda.is_available():
        yield "a GPU", "no kernel ran on one: make gpu-check does that"
    if not SHARED.is_dir():
        yield "../shared", "the command line was not tried with its model and data"


@pytest.hookimpl(trylast=True)
def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        config = items[0].config
        config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of xdist, which collects everything
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    count = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(count, node.config.stash.get(LEFT_OUT, 0))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None]:
    """The outermost wrapper: behind everything else that is said."""
    yield
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ()))
    left_out, lacks = config.stash.get(LEFT_OUT, 0), list(missing())
    if not (reasons or left_out or lacks):
        return
    terminalreporter.section("not run")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:6} skipped: {reason}")
    if left_out:
        chosen = " ".join(
            f"-{option} {text!r}" for option, text in (("m", config.option.markexpr), ("k", config.option.keyword)) if text
        )
        terminalreporter.line(f"{left_out:6} left out by {chosen or 'what was asked for'}")
    for what, consequence in lacks:
        terminalreporter.line(f"not here: {what}; {consequence}")
