"""Which device and which stream a GPU backend asks torch about, with stand-ins for torch's: no GPU here has ever had a second one beside it.

Belongs here: what can be known of devices, streams and drivers without any. Does not belong here: kernels (test_cuda_host.py, test_triton_aot.py),
what a real device does (test_cuda.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import ops, plan
from zo_kernels._backends import cuda
from zo_kernels.plan import Entry, Pass, Plan
from zo_kernels.views.buffer import Buffer, Fill, Forward
from zo_kernels.views.shadow import PerturbedWeight

ROOT = Path(__file__).resolve().parents[2]


class Devices:
    """torch.cuda of two GPUs: which is current, which of them has a stream that is being captured, and what was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.captured, self.stream = 0, -1, "own"
        self.waits: list[str] = []
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == self.captured)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleStream(self, self.stream))
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: hash(self.stream), raising=False)
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda _: None))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


class SimpleStream:
    def __init__(self, devices: Devices, name: str) -> None:
        self.devices, self.name = devices, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimpleStream) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def wait_event(self, _: Any) -> None:
        self.devices.waits.append(self.name)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return Devices(monkeypatch)


def test_a_capture_is_looked_for_on_the_device_of_the_work(devices: Devices) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    devices.captured = 1
    assert (plan.capturing(first), plan.capturing(second), devices.current) == (False, True, 0)
    with pytest.raises(RuntimeError, match="numbers in host memory cannot be captured"):
        plan.move(torch.zeros(1), second)


def test_tables_of_triton_are_kept_for_the_streams_that_read_them(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is dropped while another stream's kernel reads its tables must not free them under it."""
    triton = pytest.importorskip("zo_kernels._backends.triton")
    noted: list[tuple[str, str]] = []

    def table(name: str) -> Any:
        return SimpleNamespace(record_stream=lambda stream: noted.append((name, stream.name)))

    monkeypatch.setattr(triton, "_batch", lambda *_: triton.Batch(table("table"), table("spans"), 1, {}))
    weights: Any = Plan((Entry(torch.zeros(4), torch.zeros(4), 1),), torch.device("cuda", 1), torch.float32)
    triton._batches(weights, triton.GPU)
    triton._batches(weights, triton.GPU)
    assert (noted, devices.waits) == ([], []), "its own stream needs neither"
    devices.stream = "other"
    triton._batches(weights, triton.GPU)
    assert (noted, devices.waits) == ([("table", "other"), ("spans", "other")], ["other"])
    devices.captured = 0  # of the current device, which is not the plan's
    triton._batches(weights, triton.GPU)
    devices.captured = 1
    triton._batches(weights, triton.GPU)
    assert devices.waits == ["other", "other"], "a capture begins with a synchronisation"


def test_triton_launches_on_the_device_of_the_plan(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Current is another one, which stays so; the stream is the plan's device's."""
    triton = pytest.importorskip("zo_kernels._backends.triton")
    seen: list[Any] = []
    table = SimpleNamespace(data_ptr=lambda: 5, numel=lambda: 3)
    monkeypatch.setattr(triton, "_batch", lambda *_: triton.Batch(table, table, 1, {}))
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    monkeypatch.setattr(triton, "_compile_and_launch", lambda *given: seen.append((devices.current, given[1].grid)))
    weights: Any = Plan((Entry(torch.zeros(4), torch.zeros(4), 1),), torch.device("cuda", 1), torch.float32)
    p = Pass(1, [2], [0.5])
    triton.perturb(weights, p)
    assert (seen, devices.current) == ([(1, (3, 1, 1))], 0)
    (batch,) = weights.cache["triton"][0]
    _, form = triton._arguments(p, weights.device)
    batch.ready[form] = triton.Ready(lambda *given, stream: seen.append((devices.current, given[:3], stream)), ())
    triton.perturb(weights, p)
    assert (seen[1:], devices.current) == ([(1, (5, 5, 1), hash("own"))], 0)


class Elsewhere:
    """A backend that takes a pass only as its device has it: numbers of a loss on another one must have been moved."""

    def __init__(self) -> None:
        self.seen: list[Pass] = []

    def perturb(self, plan: Plan, p: Pass) -> None:
        assert all(t.device == plan.device for t in (p.tags, p.coefs, p.decay) if isinstance(t, Tensor)), "of another device"
        self.seen.append(p)


def test_layers_on_two_devices_have_a_buffer_and_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one forward, in the order in which it asks, with coefficients of the first device: meta stands for the second."""
    here, there = torch.device("cpu"), torch.device("meta")
    backend: Any = Elsewhere()
    chosen = backends.pick
    monkeypatch.setattr(backends, "pick", lambda device, name: backend if device == there else chosen(device, name))
    params = [nn.Parameter(torch.zeros(8, 4, device=device)) for device in (here, there, here, there)]
    shadows = [PerturbedWeight(p, Entry(p.detach(), p.detach(), stream), 0, SimpleNamespace()) for stream, p in enumerate(params)]
    forward = Forward()
    forward.passes = [Pass(1, torch.tensor([3]), torch.tensor([0.5]))]
    buffer = Buffer(1 << 14, None, forward)
    for _ in range(3):  # the first forward surprises, and the second one shows the order
        buffer.begin()
        backend.seen.clear()
        for stream, shadow in enumerate(shadows):
            (value,) = buffer.values([shadow])
            assert value.device == params[stream].device
            if value.device == here:
                assert torch.equal(value, 0.5 * ops.normal((8, 4), seed=1, stream=stream, tag=3))
    assert buffer.memory.keys() == {here, there} and len(buffer.fills) == 1
    assert len(backend.seen) == 1 and backend.seen[0].coefs.device == there, "one launch for both weights of a device"


def test_fills_take_a_pass_to_the_device_of_their_weights() -> None:
    """Coefficients that were computed on the first device (a rule that tries candidates), weights on a second: meta stands for it."""
    backend: Any = Elsewhere()
    there = torch.device("meta")
    weights = torch.zeros(8, device=there)
    filled = Plan((Entry(weights, weights, 1),), there, torch.float32)
    forward = Forward()
    forward.passes = [Pass(1, torch.tensor([3]), torch.tensor([0.5]))]
    Buffer(1 << 10, None, forward).write(Fill([(0, filled, backend)], {}, []))
    assert len(backend.seen) == 1


@pytest.mark.parametrize("door", ["run", "run_sequence"])
def test_the_doors_of_operations_do_too(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    backend = SimpleNamespace(
        perturb=lambda plan, p: seen.append(p.coefs.device), sequence=lambda plan, p: seen.append(p.coefs.device)
    )
    monkeypatch.setattr(ops.backends, "pick", lambda *_: backend)
    weights = torch.zeros(8, device="meta")
    plans = [Plan((Entry(weights, weights, 1),), weights.device, torch.float32)]
    one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    passes = plan.Passes(1, *one, torch.tensor([0, 1]), torch.ones(1), torch.zeros(1, dtype=torch.uint8))
    getattr(ops, door)(plans, Pass(1, *one) if door == "run" else passes)
    assert seen == [torch.device("meta")]


def test_a_runtime_that_needs_a_newer_driver_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("_C")
    module.WITH_CUDA, problem = True, ["CUDA driver version is insufficient for CUDA runtime version"]
    module.cuda_status = lambda: problem[0]
    monkeypatch.setattr(cuda, "extension", lambda: module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert re.search("driver version is insufficient.*newer driver than torch's", cuda.status() or "")
    problem[0] = ""
    assert cuda.status() is None


def test_launches_let_other_threads_go_on() -> None:
    """A launch blocks while the queue of its stream is full: none is called with the interpreter's lock."""
    text = (ROOT / "csrc" / "module.cpp").read_text()
    launches = re.findall(r"^.*\bzo_cuda_(?:perturb|update)\(&", text, re.M)
    assert len(launches) == 3
    assert all(line.strip().startswith("return zo_cuda_") for line in launches), "inside of launch_cuda"
    assert re.search(r"void launch_cuda\(.*?\) \{[^}]*gil_scoped_release release;\s*code = launch\(\);", text, re.S)


def test_kernels_with_the_most_to_keep_have_more_registers() -> None:
    triton = pytest.importorskip("zo_kernels._backends.triton")
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    plain = {"BIT_MASK": False, "RANDOM_MASK": False, "SCALE": False}
    bfloat16 = torch.bfloat16

    def registers(rule: str, state: torch.dtype = torch.float32, **flags: bool) -> int:
        return int(triton.update_options(rule, state, plain | flags)["maxnreg"])

    assert registers("hizoo") == registers("adam", bfloat16) == registers("adam", bfloat16, SCALE=True) == 128
    assert registers("adam", SCALE=True, BIT_MASK=True) == registers("momentum", bfloat16, SCALE=True, BIT_MASK=True) == 128
    assert registers("hizoo", BIT_MASK=True) == registers("hizoo", RANDOM_MASK=True) == 168
    assert registers("adam", bfloat16, SCALE=True, BIT_MASK=True) == 168
    everything = {"SEQUENCE": True, "STOCHASTIC": True, "SCALE": 2, "BIT_MASK": True, "RANDOM_MASK": False, "KIND": 0}
    assert triton.loop_options(everything) == {"maxnreg": 168}
    assert triton.loop_options(everything | {"STOCHASTIC": False}) == {"maxnreg": 128}
    assert triton.loop_options(everything | {"SEQUENCE": False}) == {}
