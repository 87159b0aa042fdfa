"""The GPU backends on a GPU: `cuda` and `triton` equal the reference on every bit, and keep their promises about streams and waiting.

Belongs here: what needs a device. Does not belong here: what can be known without one (test_cuda_host.py, test_triton*.py), speed
(benchmarks/gpu_pass.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases, update_cases
from zo_kernels import _backends as registry
from zo_kernels import checks, lowrank, ops, reference
from zo_kernels import update as rules
from zo_kernels.plan import Entry, Pass, Passes, Plan, make_passes, make_plans

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)
N = 100_003
STREAM = 0xC0FFEE


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    module = registry.load(request.param)
    reason = module.status() or module.supports(DEVICE)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def run(plan: Plan, p: Pass, backend: str) -> None:
    ops.run([plan], p, backend)


def expected(start: Tensor, *passes: Pass, offset: int = 0) -> Tensor:
    """`start` after these passes, by the reference; on the CPU."""
    result = start.cpu().clone()
    (plan,) = make_plans([result], [STREAM], offsets=[offset])
    for p in passes:
        reference.perturb(plan, p)
    return result


def on_device(tags: list[int], coefs: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(tags, dtype=torch.int64, device=DEVICE), torch.tensor(coefs, dtype=torch.float32, device=DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, a synchronisation of the host with the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_cases(case: cases.Case, backend: str) -> None:
    cases.check(backend, case, "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_magnitude_masks(dtype: torch.dtype, backend: str) -> None:
    cases.check_magnitude_masks(dtype, registry.load(backend).magnitude_mask, "cuda", (*cases.SIZES, 100_003))


@pytest.mark.parametrize("kind", checks.KINDS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), *[(t, r) for t in (torch.float16, torch.bfloat16) for r in checks.ROUNDINGS]],
)
def test_ten_million(dtype: torch.dtype, rounding: str, kind: str, backend: str) -> None:
    """More than 10^7 results of each type equal those of the C++ backend, which the tests hold against the reference."""
    on_cpu = cases.weights(10_000_019, dtype)
    on_gpu = on_cpu.to(DEVICE)
    arguments = {"seed": cases.SEED, "streams": [STREAM], "kind": kind, "rounding": rounding}
    for p in (on_cpu, on_gpu):
        zk.perturb_([p], [(1, 1e-3), (9, -2e-4)], backend="cpu" if p is on_cpu else backend, **arguments)
    assert cases.same_bits(on_gpu, on_cpu)


def test_more_than_2_to_32_elements(backend: str) -> None:
    """Every index that 32 bits could cut is on the way: elements, bytes, and calls at q = 2^32 (by an offset)."""
    n, offset = (1 << 32) + 12_345, (1 << 36) - (1 << 20)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of GPU memory free")
    theta = torch.zeros(n, dtype=torch.float16, device=DEVICE)
    p = Pass(cases.SEED, [3, 4], [1e-2, -3e-3], rounding="stochastic")
    (plan,) = make_plans([theta], [STREAM], offsets=[offset])
    run(plan, p, backend)
    for start in (0, (1 << 20) - 777, (1 << 31) - 777, (1 << 32) - 777, n - 5001):
        part = theta[start : start + 5001]
        assert cases.same_bits(part, expected(torch.zeros_like(part), p, offset=offset + start)), f"from element {start}"


@pytest.mark.parametrize("terms", [1, 8, 9, 64, 1000, 1500])
@pytest.mark.parametrize("kind", checks.KINDS)
def test_numbers_and_device_terms(kind: str, terms: int, backend: str) -> None:
    start = cases.weights(5003, torch.bfloat16)
    tags, coefs = list(range(7, 7 + terms)), [1e-2 * (-1) ** k / (1 + k) for k in range(terms)]
    want = expected(start, Pass(cases.SEED, tags, coefs, kind=kind))
    for given in (list(zip(tags, coefs, strict=True)), on_device(tags, coefs)):
        got = start.to(DEVICE)
        zk.perturb_([got], given, seed=cases.SEED, streams=[STREAM], kind=kind, backend=backend)
        assert cases.same_bits(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, 2.0**-101])
@pytest.mark.parametrize("kind", checks.KINDS)
def test_dead_device_terms(kind: str, bad: float, backend: str) -> None:
    """A coefficient that is not finite or too small skips its term, found on the device; without a live term not one bit changes."""
    start = cases.weights(N, torch.float16)
    start[3], start[4] = -0.0, float("nan")
    for coefs in ([bad], [bad, 2e-3], [2e-3, bad, 1e-3]):
        tags = [4, 5, 6][: len(coefs)]
        kept = [(tag, c) for tag, c in zip(tags, coefs, strict=True) if c is not bad]
        want = expected(start, Pass(cases.SEED, [tag for tag, _ in kept], [c for _, c in kept], kind=kind))
        got, out = start.to(DEVICE), torch.zeros_like(start, device=DEVICE)
        arguments = {"seed": cases.SEED, "streams": [STREAM], "kind": kind, "backend": backend}
        zk.perturb_([got], on_device(tags, coefs), out=[out], **arguments)
        zk.perturb_([got], on_device(tags, coefs), **arguments)
        assert cases.same_bits(got, want)
        assert cases.same_bits(out, want)


@pytest.mark.parametrize("decay", [float("nan"), float("inf"), 0.9])
def test_device_decay(decay: float, backend: str) -> None:
    """A non-finite decay counts as 1."""
    start = cases.weights(N, torch.float16)
    for coefs in ([], [1e-3]):
        tags = list(range(len(coefs)))
        got = start.to(DEVICE)
        given = on_device(tags, coefs)
        there = torch.tensor(decay, device=DEVICE)
        zk.perturb_([got], given, seed=cases.SEED, streams=[STREAM], decay=there, backend=backend)
        assert cases.same_bits(got, expected(start, Pass(cases.SEED, tags, coefs, decay=torch.tensor(decay))))


@pytest.mark.parametrize("row_len", [32, 96, 1024, 1, 7, 40, 2100, 4096])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rows(dtype: torch.dtype, row_len: int, backend: str) -> None:
    """Gathered rows get the noise of their places in the full tensor."""
    rows = torch.tensor([5, 0, 5, 2, 11, 10, 7, 7, 1])
    source = cases.weights(12 * row_len, dtype).view(12, row_len)[rows].contiguous()
    p = Pass(cases.SEED, [1, 2], [1e-2, 3e-3])
    results = []
    for device in ("cpu", DEVICE):
        target = torch.zeros(source.shape, dtype=dtype, device=device)
        entry = Entry(source.to(device), target, STREAM, rows=rows.to(device), row_len=row_len)
        plan = Plan((entry,), target.device, dtype)
        reference.perturb(plan, p) if device == "cpu" else run(plan, p, backend)
        results.append(target)
    assert cases.same_bits(results[1], results[0])


@pytest.mark.parametrize("row_len", [64, 7, 40, 4096])
def test_rows_of_low_rank(row_len: int, backend: str) -> None:
    """Gathered rows of a table with factors and with a value for each element."""
    rows = torch.tensor([5, 0, 5, 2, 11])
    source = cases.weights(12 * row_len, torch.bfloat16).view(12, row_len)[rows].contiguous()
    left, right = cases.low_rank_pair(12, row_len, 2)
    values = torch.linspace(0.1, 3, 12 * row_len)
    results = []
    for device in ("cpu", DEVICE):
        target = torch.zeros(source.shape, dtype=torch.bfloat16, device=device)
        there = [t.to(device) for t in (rows, values, left, right)]
        entry = Entry(source.to(device), target, STREAM, rows=there[0], row_len=row_len, scale=there[1], rsqrt=True, left=there[2],
                          right=there[3], rank=2, cols=row_len)  # fmt: skip
        plan = Plan((entry,), target.device, torch.bfloat16)
        p = Pass(cases.SEED, [1], [1e-2])
        reference.perturb(plan, p) if device == "cpu" else run(plan, p, backend)
        results.append(target)
    assert cases.same_bits(results[1], results[0])


def test_many_tensors_in_one_list(backend: str) -> None:
    """A model's worth of tensors, all sizes, in one call equals one call for each."""
    sizes = [(37 * k * k) % 9973 for k in range(400)]
    together = [torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) for n in sizes]
    apart = [t.clone() for t in together]
    zk.perturb_(together, [(1, 1.0)], seed=1, streams=list(range(400)), backend=backend)
    for stream, t in enumerate(apart):
        zk.perturb_([t], [(1, 1.0)], seed=1, streams=[stream], backend=backend)
    assert all(cases.same_bits(a, b) for a, b in zip(together, apart, strict=True))


# ---- streams, graphs, waiting -------------------------------------------------------------------------------------------


def test_nothing_waits_for_the_device(backend: str) -> None:
    """Numbers, many numbers and device terms, with a fresh plan and a used one."""
    theta = torch.zeros(N, dtype=torch.float16, device=DEVICE)
    decay = torch.tensor(0.9, device=DEVICE)
    many = [(k, 1e-3) for k in range(64)]
    device_terms = on_device([1, 2], [1e-3, 1e-3])
    zk.perturb_([theta], [(1, 1e-3)], seed=0, streams=[1], backend=backend)  # compiles, for Triton
    zk.perturb_([theta], device_terms, seed=0, streams=[1], decay=decay, rounding="stochastic", backend=backend)
    zk.perturb_([theta], many, seed=0, streams=[1], backend=backend)
    (plan,) = make_plans([theta], [1])
    with no_waiting():
        for terms in ([(1, 1e-3)], many, device_terms):
            zk.perturb_([theta], terms, seed=0, streams=[1], backend=backend)
        zk.perturb_([theta], device_terms, seed=0, streams=[1], decay=decay, rounding="stochastic", backend=backend)
        for _ in range(2):
            run(plan, Pass(0, *device_terms), backend)


def test_current_stream(backend: str) -> None:
    """A pass belongs to the current stream: what was queued there before it is done before it, on every stream it moves to."""
    start = cases.weights(N, torch.float16)
    theta = torch.zeros(N, dtype=torch.float16, device=DEVICE)
    source = start.to(DEVICE)
    p, second = Pass(cases.SEED, [1], [1e-2]), Pass(cases.SEED, [2], [3e-2])
    (plan,) = make_plans([theta], [STREAM])
    zk.perturb_([torch.zeros_like(theta)], [(1, 1e-2)], seed=0, streams=[1], backend=backend)  # compiles, for Triton
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(50_000_000)  # some tens of milliseconds: the copy is still to come when the host is done here
        theta.copy_(source)
        run(plan, p, backend)
    two.wait_stream(one)
    with torch.cuda.stream(two):
        run(plan, second, backend)
    torch.cuda.synchronize()
    assert cases.same_bits(theta, expected(start, p, second))


def test_a_plan_used_on_another_stream_at_once(backend: str) -> None:
    """The second stream waits for the plan's tables, which the first, still busy, has not yet uploaded."""
    start = cases.weights(N, torch.bfloat16)
    source, out = start.to(DEVICE), torch.zeros(N, dtype=torch.bfloat16, device=DEVICE)
    p = Pass(cases.SEED, [1], [1e-2])
    zk.perturb_([source], [(1, 1e-2)], seed=0, streams=[1], out=[out], backend=backend)  # compiles, for Triton
    (plan,) = make_plans([source], [STREAM], out=[out])
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(50_000_000)
        run(plan, p, backend)
    with torch.cuda.stream(two):
        run(plan, p, backend)
    two.synchronize()
    assert cases.same_bits(out, expected(start, p))
    torch.cuda.synchronize()


def test_cuda_graph(backend: str) -> None:
    """A captured pass reads its terms and its decay anew at every replay."""
    start = cases.weights(N, torch.float16)
    theta = start.to(DEVICE)
    tags, coefs = on_device([1, 2], [1e-3, 2e-3])
    decay = torch.tensor(1.0, device=DEVICE)
    (plan,) = make_plans([theta], [STREAM])
    p = Pass(cases.SEED, tags, coefs, decay=decay)
    run(plan, p, backend)  # tables, and for Triton the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(plan, p, backend)
    want = expected(start, Pass(cases.SEED, [1, 2], [1e-3, 2e-3], decay=1.0))
    for new_tags, new_coefs, new_decay in (([5, 6], [0.5, -1e-3], 0.99), ([7, 8], [float("nan"), 1e-2], 1.0)):
        tags.copy_(torch.tensor(new_tags))
        coefs.copy_(torch.tensor(new_coefs))
        decay.fill_(new_decay)
        graph.replay()
        live = [(t, c) for t, c in zip(new_tags, new_coefs, strict=True) if c == c]
        want = expected(want, Pass(cases.SEED, [t for t, _ in live], [c for _, c in live], decay=torch.tensor(new_decay)))
        assert cases.same_bits(theta, want)


def test_capture_of_a_new_plan_is_refused() -> None:
    if registry.load("cuda").status():
        pytest.skip(str(registry.load("cuda").status()))
    theta = torch.zeros(N, device=DEVICE)
    (plan,) = make_plans([theta], [STREAM])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run it once before the capture"), torch.cuda.graph(graph):
        run(plan, Pass(0, [1], [1.0]), "cuda")
    run(plan, Pass(0, [1], [0.5]), "cuda")  # and the plan is none the worse
    assert theta.any()


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_rules_with_new_states_and_on_a_second_stream(rule: str, backend: str) -> None:
    """New states have a table of their own, which another stream waits for."""
    module, count = registry.load(backend), len(rules.RULES[rule].states)
    start = cases.weights(N, torch.float16)
    theta, wanted = start.to(DEVICE), start.clone()
    (plan,), (host,) = make_plans([theta], [STREAM]), make_plans([wanted], [STREAM])
    squares = [1e-6] if rule == "adam_history" else None
    p = rules.RulePass(cases.SEED, [1], [1e-3], "gaussian", "nearest", rule, update_cases.NUMBERS[rule], squares)
    ours, theirs = ([[[torch.full((N,), 0.5, device=d) for _ in range(count)]] for _ in range(2)] for d in (DEVICE, "cpu"))
    for k in (0, 1):
        module.update(plan, ours[k], p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module.update(plan, ours[1], p)
    stream.synchronize()
    for k in (0, 1, 1):
        reference.update(host, theirs[k], p)
    assert cases.same_bits(theta, wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert all(cases.same_bits(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_a_rule_in_a_cuda_graph(rule: str, backend: str) -> None:
    """A captured pass of a rule reads terms and numbers anew at every replay, and writes the states that it was captured with; new states are refused."""
    module, count = registry.load(backend), len(rules.RULES[rule].states)
    start = cases.weights(N, torch.bfloat16)
    theta, wanted = start.to(DEVICE), start.clone()
    (plan,), (host,) = make_plans([theta], [STREAM]), make_plans([wanted], [STREAM])
    numbers = torch.tensor(update_cases.NUMBERS[rule])
    squares = torch.tensor([1e-6]) if rule == "adam_history" else None

    def rule_pass(device: Any, tag: int, go: float) -> rules.RulePass:
        terms = torch.tensor([tag]).to(device), torch.tensor([1.0 if rule == "hizoo" else 1e-3]).to(device)
        given = torch.cat([torch.tensor([go]), numbers[1:]]).to(device)
        return rules.RulePass(
            cases.SEED, *terms, "gaussian", "stochastic", rule, given, None if squares is None else squares.to(device)
        )

    ours, theirs = ([[torch.full((N,), 0.5, device=d) for _ in range(count)]] for d in (DEVICE, "cpu"))
    p = rule_pass(DEVICE, 1, 0.0)
    module.update(plan, ours, p)  # tables, and for Triton the kernel; writes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module.update(plan, ours, p)
    for tag, go in ((5, 1.0), (6, 0.0), (7, 1.0)):
        now = rule_pass(DEVICE, tag, go)
        for target, source in ((p.tags, now.tags), (p.coefs, now.coefs), (p.numbers, now.numbers)):
            target.copy_(source)  # type: ignore[union-attr, arg-type]
        graph.replay()
        reference.update(host, theirs, rule_pass("cpu", tag, go))
    assert cases.same_bits(theta, wanted)
    assert all(cases.same_bits(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    if count:
        other = [[torch.full((N,), 0.5, device=DEVICE) for _ in range(count)]]
        with pytest.raises(RuntimeError, match="has never run on these states"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            module.update(plan, other, p)


def test_sequences_twice_in_a_row_and_on_a_second_stream(backend: str) -> None:
    """The second has other and more terms; its tables are not those of the first, which is still running, and a second stream waits for the plan's."""
    start = cases.weights(N, torch.float16)
    theta, wanted = start.to(DEVICE), start.clone()
    (plan,), (host,) = make_plans([theta], [STREAM]), make_plans([wanted], [STREAM])
    sequences = [
        Passes(cases.SEED, *make_passes([{"terms": [(first + k, 1e-3 * (k + 1))], "decay": 0.99} for k in range(count)]))
        for first, count in ((1, 5), (100, 40), (300, 3))
    ]
    torch.cuda._sleep(50_000_000)
    for passes in sequences[:2]:
        ops.run_sequence([plan], passes, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.run_sequence([plan], sequences[2], backend)
    torch.cuda.synchronize()
    for passes in sequences:
        reference.sequence(host, passes)
    assert cases.same_bits(theta, wanted)


PLACES = (0, (1 << 31) - 777, (1 << 32) - 777)  # and the end: where 32 bits could cut an index, or one of bytes


@pytest.mark.parametrize("what", ["rule", "sequence", "low rank", "magnitude mask"])
def test_more_than_2_to_32_elements_of_everything_else(what: str, backend: str) -> None:
    n = 65_539 * 65_537  # of a matrix
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of GPU memory free")
    module = registry.load(backend)
    theta = torch.zeros(n, dtype=torch.float16, device=DEVICE).add_(0.25)
    places = [(start, min(start + 5001, n)) for start in (*PLACES, n - 5001)]
    before = [theta[a:b].cpu() for a, b in places]
    passes = Passes(cases.SEED, *make_passes([{"terms": [(k, 1e-2)], "decay": 0.9} for k in (1, 2)]))
    p = rules.RulePass(cases.SEED, [3], [1e-2], "gaussian", "nearest", "momentum", update_cases.NUMBERS["momentum"])
    left, right = (t.to(DEVICE) for t in cases.low_rank_pair(65_539, 65_537, 2))
    state = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) if what == "rule" else None
    bits = torch.zeros((n + 7) // 8, dtype=torch.uint8, device=DEVICE) if what == "magnitude mask" else None
    factors = [(left, right)] if what == "low rank" else None
    (plan,) = make_plans([theta], [STREAM], masks=[bits], factors=factors)
    one = Pass(cases.SEED, [3], [1e-2])
    if what == "rule":
        module.update(plan, [[state]], p)
    elif what == "sequence":
        ops.run_sequence([plan], passes, backend)
    elif what == "low rank":
        run(plan, one, backend)
    else:
        assert bits is not None
        for a, b in places:
            theta[a:b:3] = 2.0
        ops.magnitude_masks([plan], [torch.ones(1, device=DEVICE)], backend)
    for (a, b), start in zip(places, before, strict=True):
        if bits is not None:
            a8 = -(-a // 8) * 8  # whole bytes of the place
            found = bits[a8 // 8 : b // 8].cpu()
            assert torch.equal(found, zk.pack_mask(theta[a8 : b // 8 * 8].cpu() <= 1)), f"from element {a}"
            continue
        pair = None if factors is None else [(left.cpu(), right.cpu().t().contiguous().t())]
        (host,) = make_plans([start], [STREAM], offsets=[a], factors=pair)
        if what == "rule":
            held = torch.zeros_like(start, dtype=torch.bfloat16)
            reference.update(host, [[held]], p)
            assert state is not None and cases.same_bits(state[a:b], held), f"from element {a}"
        elif what == "sequence":
            reference.sequence(host, passes)
        else:
            reference.perturb(host, one)
        assert cases.same_bits(theta[a:b], start), f"from element {a}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half(dtype: torch.dtype, backend: str) -> None:
    cases.check_every_half(dtype, registry.load(backend).perturb, "cuda")


@pytest.mark.parametrize("rank", [1, 2, 16, 64])
def test_factors_are_those_of_the_cpu(rank: int, backend: str) -> None:
    for made, wanted in zip(
        lowrank.factors(7, STREAM, 5, 3, 1001, 517, rank, device=DEVICE, backend=backend),
        lowrank.factors(7, STREAM, 5, 3, 1001, 517, rank, backend="reference"),
        strict=True,
    ):
        assert made.stride() == wanted.stride() and torch.equal(made.cpu(), wanted)
