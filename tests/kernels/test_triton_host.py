"""The host's side of a launch through Triton, on a GPU that is emulated: what is launched, with what, and how many calls that takes.

Belongs here: launches that need no search for their kernel. Does not belong here: what kernels compute (test_triton.py), what they are made of
(test_triton_aot.py), times (benchmarks/launches.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)

from benchmarks import emulated_triton as launches
from benchmarks.harness import calls
from zo_kernels._backends import _triton_kernels as kernels
from zo_kernels._backends import cuda
from zo_kernels._backends import triton as backend
from zo_kernels.plan import Entry, Pass, Passes, Plan

FACTOR = torch.tensor(0.75)
TAGS, COEFS = torch.tensor([3, 4]), torch.tensor([0.5, -0.25])
# Of each form two passes, whose numbers differ: words of either sign, zeros, ones, multiples of 16.
FORMS: dict[str, tuple[Pass, Pass]] = {
    "one term": (Pass(1, [0], [1.0]), Pass(2**64 - 1, [2**32 - 1], [-0.0])),
    "two terms": (Pass(16, [1, 2], [0.5, 0.0]), Pass(2**40, [32, 2**31], [-1e-3, 1e38])),
    "no term": (Pass(1, [], []), Pass(7, [], [])),
    "rademacher": (Pass(1, [0], [1.0], kind="rademacher"), Pass(3, [9], [2.0], kind="rademacher")),
    "decay": (Pass(1, [0], [1.0], 0.5), Pass(3, [9], [2.0], 0.1)),
    "no term, decay": (Pass(1, [], [], 0.5), Pass(7, [], [], 1e-45)),
    "decay on the device": (Pass(1, [0], [1.0], FACTOR), Pass(3, [9], [2.0], FACTOR)),
    "stochastic": (Pass(1, [0], [1.0], rounding="stochastic"), Pass(3, [9], [2.0], rounding="stochastic")),
    "terms on the device": (Pass(1, TAGS, COEFS), Pass(3, TAGS.clone(), COEFS.clone())),
    "one term on the device": (Pass(1, TAGS[:1], COEFS[:1]), Pass(3, TAGS[1:], COEFS[1:], None)),
    "many terms": (Pass(1, [1, 2, 3], [1.0, 2.0, 3.0]), Pass(3, [4, 5, 6, 7], [1.0, 2.0, 3.0, 4.0])),
}


@pytest.fixture
def gpu() -> Iterator[launches.Gpu]:
    with launches.emulated() as made:
        yield made


def plan_of(**more: Any) -> Plan:
    weights = [torch.zeros(n, dtype=torch.bfloat16) for n in (5000, 33)]
    return Plan(tuple(Entry(w, w, k, **more) for k, w in enumerate(weights)), torch.device("cpu"), torch.bfloat16)


def test_the_values_are_the_kernels_in_its_order() -> None:
    free = [p.name for p in kernels.perturb_kernel.params if not p.is_constexpr]
    assert free == ["table", "spans", "tiles", *backend.Values._fields]
    assert all(p.is_constexpr for p in kernels.perturb_kernel.params[len(free) :])


@pytest.mark.parametrize("name", FORMS)
def test_a_ready_launch_gives_what_a_search_gives(gpu: launches.Gpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FORMS[name]
    scratch, moved = torch.zeros(8, dtype=torch.int64), dict[str, torch.Tensor]()  # the same memory in both launches
    monkeypatch.setattr(torch, "empty", lambda *_, **__: scratch)
    monkeypatch.setattr(backend, "move", lambda t, _: moved.setdefault(str(t), t))
    plan = plan_of()
    backend.perturb(plan, first)
    backend.perturb(plan, second)  # ready
    (batch,) = plan.cache["triton"][0]
    assert list(batch.ready) == [backend._arguments(first, plan.device)[1]]
    batch.ready.clear()
    backend.perturb(plan, second)  # searched for
    *_, ready, searched = gpu.launches()
    assert ready == searched
    assert ready[0] == 1 == gpu.compiled, "one kernel"
    assert ready[2] == launches.STREAM
    assert len(ready) == 3 + len(kernels.perturb_kernel.params)


def test_forms_have_kernels_of_their_own(gpu: launches.Gpu) -> None:
    plan, masked = plan_of(), plan_of(keep=1 << 31)
    for number, (first, second) in enumerate(FORMS.values()):
        for p in (first, second, first):
            backend.perturb(plan, p)
        backend.perturb(masked, first)
        assert len({launch[0] for launch in gpu.launches()}) == gpu.compiled >= number
    used = [{launch[0] for launch in gpu.launches()[k : k + 3]} for k in range(0, len(gpu.launches()), 4)]
    assert all(len(numbers) == 1 for numbers in used)
    # One term and no term are one kernel.
    assert len(set().union(*used)) == len(FORMS) - 2
    assert {launch[0] for launch in gpu.launches()[3::4]}.isdisjoint(set().union(*used)), "a mask is another kernel's"


def test_a_sequence_is_ready_too(gpu: launches.Gpu) -> None:
    plan = plan_of()
    for tags in ([1, 2, 3], [4, 5, 6]):
        firsts, roundings = torch.tensor([0, 1, 3]), torch.tensor([0, 0], dtype=torch.uint8)
        backend.sequence(plan, Passes(5, torch.tensor(tags), torch.ones(3), firsts, torch.ones(2), roundings, "gaussian"))
    (first, second) = gpu.launches()
    assert gpu.compiled == 1 and first[:3] == second[:3]
    names = [p.name for p in kernels.perturb_kernel.params]
    given = dict(zip(names, second[3:], strict=True))
    assert (given["n_passes"], given["most_terms"], given["n_terms"], given["SEQUENCE"]) == (2, 2, 3, True)


def test_a_plan_whose_masks_are_drawn_anew_has_new_tables(gpu: launches.Gpu) -> None:
    plan = plan_of(keep=1 << 31, mask_tag=1)
    p = FORMS["one term"][0]
    backend.perturb(plan, p)
    held = plan.cache["triton"]
    plan.retag(2)
    backend.perturb(plan, p)
    assert plan.cache["triton"] is not held
    first, second = gpu.launches()
    assert first[0] == second[0] and first[3:5] != second[3:5]


@pytest.mark.parametrize(("name", "most"), [("one term", 45), ("update", 45), ("terms on the device", 50)])
def test_calls_of_a_launch(gpu: launches.Gpu, name: str, most: int) -> None:
    """A search takes more than 120 in Triton 3.7."""
    way = launches.ways(launches.FORMS[name])
    way["ready"]()
    compiled = gpu.compiled
    assert calls(way["ready"]) <= most < calls(way["search"])
    assert gpu.compiled == compiled


def test_a_fill_of_half_a_gpus_cache_has_eight_rounds_of_blocks() -> None:
    """2^24 elements in 16 bits, on an H100: blocks of one tile, in both backends."""
    weights = torch.empty(1 << 24, dtype=torch.bfloat16)
    plan = Plan((Entry(weights, weights, 1),), torch.device("cpu"), torch.bfloat16)
    (batch,) = backend._batches(plan, backend.GPU)
    assert (batch.tiles, batch.grid) == (1, (8192, 1, 1))
    assert batch.grid[0] > 8 * 6 * 132 and 16 * backend.GPU.groups == cuda.tile_size(1 << 24, 132) == cuda.SPAN
