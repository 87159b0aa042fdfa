"""The front of torch's CUDA graphs, with stand-ins for torch's: which device, which stream, and what a capture that breaks leaves behind.

Belongs here: what `graph.Recording` asks of torch, in which order. Does not belong here: what a captured step computes (test_graph.py), real graphs
(test_gpu.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zo_kernels.optim import graph


class Cuda:
    """torch.cuda of two GPUs of which the first is current. `breaks`: the capture cannot be ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, breaks: bool = False) -> None:
        self.current, self.stream, self.breaks = 0, "default", breaks
        self.said: list[str] = []
        self.underway = self.counting = False
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"on_{name}"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda index: f"stream of {index}")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "default_generators", (None, self))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda index, pool: self.said.append(f"release {pool} of {index}"), raising=False
        )
        monkeypatch.setattr(torch, "rand", self.rand)

    @contextmanager
    def _set(self, what: str, value: Any) -> Iterator[None]:
        before = getattr(self, what)
        setattr(self, what, value)
        try:
            yield
        finally:
            setattr(self, what, before)

    def on_device(self, device: torch.device) -> Any:
        return self._set("current", device.index)

    def on_stream(self, stream: str) -> Any:
        return self._set("stream", stream)

    # -- of a graph, as torch 2.13 has it --

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert not gc.isenabled(), "the collector may unload modules"
        self.said.append(f"begin on {self.stream} of {self.current}, {pool}, {capture_error_mode}")
        self.underway = self.counting = True

    def capture_end(self) -> None:
        if self.breaks:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.underway = self.counting = False
        self.said.append("end")

    def reset(self) -> None:
        self.said.append("reset")

    def end_allocation(self, index: int, pool: Any) -> None:
        if not self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway = False

    # -- of a generator --

    def rand(self, *_: Any, device: torch.device) -> None:
        if self.counting:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def get_state(self) -> str:
        return "as it was"

    def set_state(self, state: str) -> None:
        self.said.append(f"generator {state}")

    def clone_state(self) -> SimpleNamespace:
        return SimpleNamespace(counting=False)

    def graphsafe_set_state(self, state: SimpleNamespace) -> None:
        self.counting = state.counting


def record(fails: Exception | None = None) -> None:
    with graph.Recording(graph.Recording.place_on(torch.device("cuda", 1))).record():
        if fails is not None:
            raise fails


def test_a_capture_runs_on_the_device_of_the_weights_and_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the current device's it would record nothing of what other devices do, and every replay would change nothing."""
    cuda = Cuda(monkeypatch)
    place = graph.Recording.place_on(torch.device("cuda", 1))
    assert place == graph.Place(torch.device("cuda", 1), "stream of 1", (0, 7))
    assert graph.Recording.place_on(torch.device("cuda")).device == torch.device("cuda", 0)
    record()
    assert cuda.said == ["begin on stream of 1 of 1, (0, 7), thread_local", "end"]
    assert (cuda.current, cuda.stream, gc.isenabled()) == (0, "default", True)


@pytest.mark.parametrize("breaks", [False, True])
def test_what_a_broken_capture_leaves_behind(monkeypatch: pytest.MonkeyPatch, breaks: bool) -> None:
    """`.item()` in a capture: torch cannot end it, and its own context manager would stay on the capture's stream."""
    cuda = Cuda(monkeypatch, breaks)
    with pytest.raises(ValueError, match="what the closure said"):
        record(ValueError("what the closure said"))
    assert (cuda.current, cuda.stream, gc.isenabled()) == (0, "default", True)
    assert not cuda.underway and not cuda.counting, "the allocator and the generator serve others again"
    assert cuda.said[1:] == (["release (0, 7) of 1", "generator as it was"] if breaks else ["end", "reset", "generator as it was"])


def test_a_capture_that_breaks_at_its_end_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, breaks=True)
    with pytest.raises(RuntimeError, match="due to a previous error"):
        record()
    assert (cuda.stream, cuda.underway, cuda.counting) == ("default", False, False)


def test_the_collector_stays_off_where_it_was_off(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    gc.disable()
    try:
        record()
        assert not gc.isenabled()
    finally:
        gc.enable()
