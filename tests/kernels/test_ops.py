"""The front door of the operation: what it refuses, how it groups, its registration with torch."""

from __future__ import annotations

import contextlib
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zo_kernels as zk
from tests.kernels.cases import same_bits, weights
from zo_kernels import _backends, ops
from zo_kernels.plan import make_plans

OK: dict[str, Any] = {"seed": 1, "streams": [2]}
W = torch.ones(4, 6)

REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: zk.perturb_(W, [(0, 1.0)], **OK), TypeError, "params is a Tensor"),
    (lambda: zk.perturb_([3.0], [(0, 1.0)], **OK), TypeError, r"params\[0\] is a float"),
    (lambda: zk.perturb_([W.double()], [(0, 1.0)], **OK), TypeError, r"params\[0\] has dtype torch.float64"),
    (lambda: zk.perturb_([W.int()], [(0, 1.0)], **OK), TypeError, r"params\[0\] has dtype torch.int32"),
    (lambda: zk.perturb_([W.t()], [(0, 1.0)], **OK), ValueError, r"params\[0\] of shape \(6, 4\) is not contiguous"),
    (lambda: zk.perturb_([W.to("meta")], [(0, 1.0)], **OK), ValueError, r"params\[0\] is on the meta device"),
    (lambda: zk.perturb_([W.to_sparse()], [(0, 1.0)], **OK), ValueError, "not contiguous"),
    (lambda: zk.perturb_([W, W], [(0, 1.0)], seed=1, streams=[2, 3]), ValueError, r"params\[0\] and params\[1\] share memory"),
    (lambda: zk.perturb_([W.view(-1)[:9], W.view(-1)[8:]], [(0, 1.0)], seed=1, streams=[2, 3]), ValueError, "share memory"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=1, streams=[2, 3]), ValueError, "streams has length 2, params has length 1"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=1, streams=None), ValueError, "streams is None"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=1, streams=[-1]), ValueError, r"streams\[0\]=-1"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=1, streams=[2**32]), ValueError, r"streams\[0\]=4294967296"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=-1, streams=[2]), ValueError, "seed=-1"),
    (lambda: zk.perturb_([W], [(0, 1.0)], seed=1.5, streams=[2]), ValueError, "seed=1.5"),
    (lambda: zk.perturb_([W], [(-3, 1.0)], **OK), ValueError, r"terms\[0\]: tag=-3"),
    (lambda: zk.perturb_([W], [(0, 1.0), (2**32, 1.0)], **OK), ValueError, r"terms\[1\]: tag=4294967296"),
    (lambda: zk.perturb_([W], [(0, float("nan"))], **OK), ValueError, r"terms\[0\]: coefficient=nan"),
    (lambda: zk.perturb_([W], [(0, 1e39)], **OK), ValueError, "must be finite in fp32"),
    (lambda: zk.perturb_([W], [(0, "x")], **OK), TypeError, "coefficient='x'"),
    (lambda: zk.perturb_([W], 3, **OK), TypeError, "terms=3"),
    (lambda: zk.perturb_([W], (torch.tensor([1.0]), torch.tensor([1.0])), **OK), TypeError, "1-d int64"),
    (lambda: zk.perturb_([W], (torch.tensor([1]), torch.tensor([1.0, 2.0])), **OK), TypeError, "the coefficients are"),
    (lambda: zk.perturb_([W], [(0, 1.0)], decay=float("inf"), **OK), ValueError, "decay=inf"),
    (lambda: zk.perturb_([W], [(0, 1.0)], decay=torch.ones(2), **OK), TypeError, "decay is"),
    (lambda: zk.perturb_([W], [(0, 1.0)], rounding="down", **OK), ValueError, "rounding='down'"),
    (lambda: zk.perturb_([W], [(0, 1.0)], kind="cauchy", **OK), ValueError, "kind='cauchy'"),
    (lambda: zk.perturb_([W], [(0, 1.0)], backend="tpu", **OK), ValueError, "backend='tpu'"),
    (lambda: zk.perturb_([W], [(0, 1.0)], backend="cuda", **OK), RuntimeError, "backend='cuda' was asked for"),
    (lambda: zk.perturb_([W], [(0, 1.0)], out=[torch.ones(4)], **OK), ValueError, r"out\[0\] is torch.float32 \(4,\)"),
    (lambda: zk.perturb_([W], [(0, 1.0)], out=[W.half()], **OK), ValueError, r"out\[0\] is torch.float16"),
    (lambda: zk.perturb_([W.view(-1)[:9]], [(0, 1.0)], out=[W.view(-1)[8:17]], **OK), ValueError, "out must lie apart"),
    (lambda: zk.perturb_([W], [(0, 1.0)], out=[], **OK), ValueError, "out has length 0"),
    (lambda: zk.perturb_([W], [(0, 1.0)], masks=[torch.ones(3, dtype=torch.bool)], **OK), ValueError, r"masks\[0\] has shape \(3,\)"),
    (lambda: zk.perturb_([W], [(0, 1.0)], masks=[torch.ones(4, dtype=torch.uint8)], **OK), ValueError, r"has shape \(3,\), contiguous"),
    (lambda: zk.perturb_([W], [(0, 1.0)], masks=[0.5], **OK), TypeError, r"masks\[0\] is <class 'float'>|masks\[0\] is float|RandomMask"),
    (lambda: zk.perturb_([W], [(0, 1.0)], scales=[torch.ones(5)], **OK), ValueError, r"scales\[0\] has 5 values"),
    (lambda: zk.perturb_([W], [(0, 1.0)], scales=[(torch.ones(5), 0)], **OK), ValueError, "block=0"),
    (lambda: zk.perturb_([W], [(0, 1.0)], scales=[(torch.ones(5), 4)], **OK), ValueError, "need 6"),
    (lambda: zk.perturb_([W], [(0, 1.0)], scales=[torch.ones(4).double()], **OK), TypeError, "float32"),
    (lambda: zk.perturb_([W], [(0, 1.0)], offsets=[-1], **OK), ValueError, r"offsets\[0\]=-1"),
    (lambda: zk.perturb_([W], [(0, 1.0)], offsets=[2**56 - 3], **OK), ValueError, "exceeds 2\\^56"),
    (lambda: zk.RandomMask(0.0), ValueError, "keep=0.0"),
    (lambda: zk.RandomMask(1.5), ValueError, "keep=1.5"),
    (lambda: zk.RandomMask(0.5, tag=-1), ValueError, "tag=-1"),
    (lambda: zk.pack_mask(torch.ones(3)), TypeError, "keep has dtype"),
    (lambda: zk.normal((2, -1), seed=0, stream=0, tag=0), ValueError, r"shape=\(2, -1\)"),
    (lambda: zk.normal(4, seed=0, stream=0, tag=0, dtype=torch.float64), TypeError, "float64"),
    (lambda: zk.normal(4, seed=0, stream=-2, tag=0), ValueError, "=-2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    assert (W == 1).all(), "changed something before it refused"


def test_lists_of_mixed_dtypes_and_empty_lists() -> None:
    params = [
        weights(n, d, special=False) for n, d in ((5, torch.float32), (33, torch.float16), (0, torch.bfloat16), (70, torch.float32))
    ]
    one_by_one = [p.clone() for p in params]
    zk.perturb_(params, [(1, 0.1)], seed=3, streams=[1, 2, 3, 4])
    for p, q, s in zip(params, one_by_one, (1, 2, 3, 4), strict=True):
        zk.perturb_([q], [(1, 0.1)], seed=3, streams=[s], backend="reference")
        assert same_bits(p, q)
    zk.perturb_([], [(1, 0.1)], seed=3, streams=[])
    assert [len(p.entries) for p in make_plans(params, [1, 2, 3, 4])] == [2, 1, 1]


def test_scales_at_the_limits() -> None:
    """A block beyond 64 bits is one block; an empty tensor has as many rows as its shape says. Both were once other errors."""
    wanted, got = torch.zeros(5), torch.zeros(5)
    for x, scale in ((wanted, 2.5), (got, (torch.tensor([2.5]), 10**30))):
        zk.perturb_([x], [(1, 0.1)], seed=3, streams=[1], scales=[scale])
    assert torch.equal(wanted, got) and wanted.any()
    for shape in ((0,), (0, 3), (3, 0)):
        zk.perturb_([torch.zeros(shape)], [(1, 0.1)], seed=3, streams=[1], scales=[torch.ones(shape[0])])


def test_random_mask_of_one_and_scale_forms() -> None:
    base = torch.randn(6, 5)
    results = []
    for scales in ([2.5], [torch.full((6,), 2.5)], [(torch.full((30,), 2.5), 1)], [(torch.tensor([2.5]), 30)]):
        x = base.clone()
        zk.perturb_([x], [(1, 0.1)], seed=3, streams=[1], scales=scales, masks=[zk.RandomMask(1.0)])
        results.append(x)
    assert all(same_bits(r, results[0]) for r in results)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 700), max_size=4),
    kind=st.sampled_from(["gaussian", "rademacher"]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_sharding_never_changes_a_bit(cuts: list[int], kind: str, rounding: str, dtype: torch.dtype, data: Any) -> None:
    """Any partition of a tensor into shards, each with its offset, equals the whole tensor."""
    n = 700
    whole = weights(n, dtype, special=False)
    terms = data.draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(-1, 1, width=32)), max_size=3))
    args: dict[str, Any] = {"seed": data.draw(st.integers(0, 2**64 - 1)), "kind": kind, "rounding": rounding}
    edges = [0, *sorted(cuts), n]
    shards = [whole[a:b].clone() for a, b in zip(edges, edges[1:], strict=False)]
    block = data.draw(st.integers(1, 90))
    scale = torch.rand(-(-n // block), generator=torch.Generator().manual_seed(0)) + 0.5
    mask = zk.RandomMask(data.draw(st.floats(0.05, 1)), 8)
    zk.perturb_([whole], terms, streams=[7], scales=[(scale, block)], masks=[mask], **args)
    zk.perturb_(
        shards,
        terms,
        streams=[7] * len(shards),
        offsets=edges[:-1],
        scales=[(scale[a // block :].clone(), block) for a in edges[:-1]],
        masks=[mask] * len(shards),
        **args,
    )
    assert same_bits(torch.cat(shards), whole)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_order_and_company_of_tensors_do_not_matter(data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=6))
    order = data.draw(st.permutations(range(len(sizes))))
    a = [weights(n, torch.float16, salt=k, special=False) for k, n in enumerate(sizes)]
    b = [t.clone() for t in a]
    zk.perturb_(a, [(1, 0.01)], seed=5, streams=list(range(len(a))))
    zk.perturb_([b[k] for k in order], [(1, 0.01)], seed=5, streams=list(order))
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_terms_on_tensors_equal_terms_on_the_host() -> None:
    a, b = W.clone(), W.clone()
    zk.perturb_([a], [(2**32 - 1, 0.1), (5, -0.2)], decay=0.9, seed=5, streams=[1])
    terms = (torch.tensor([2**32 - 1, 5]), torch.tensor([0.1, -0.2]))
    zk.perturb_([b], terms, decay=torch.tensor(0.9), seed=5, streams=[1])
    assert same_bits(a, b)


def test_single_coefficients_may_be_tensors() -> None:
    a, b = W.clone(), W.clone()
    zk.perturb_([a], [(1, 0.1), (5, -0.2)], seed=5, streams=[1])
    zk.perturb_([b], [(1, torch.tensor(0.1)), (5, -0.2)], seed=5, streams=[1])
    assert same_bits(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_tensor_coefficient_skips_its_term_alone(bad: float) -> None:
    a, b = W.clone(), W.clone()
    zk.perturb_([a], (torch.tensor([1, 2]), torch.tensor([bad, 0.5])), decay=torch.tensor(bad), seed=5, streams=[1])
    zk.perturb_([b], [(2, 0.5)], seed=5, streams=[1])
    assert same_bits(a, b)


def test_registration_with_torch() -> None:
    """Schema, fake kernel and mutation annotations hold: torch's own check of a custom operator."""
    params = [torch.randn(33), torch.randn(7, 3)]
    tensors, rest = ops.tensor_arguments(params, seed=5, streams=[1, 2])
    args = (*tensors, [1], [0.1], None, None, None, None, "nearest", *rest)
    torch.library.opcheck(torch.ops.zo_kernels.perturb_.default, args, test_utils=("test_schema", "test_faketensor"))


def test_it_compiles_into_a_graph() -> None:
    """Under torch.compile the operation is one opaque node, not a graph break."""

    def f(x: Tensor) -> Tensor:
        y = x * 2
        zk.perturb_([y], [(3, 0.5)], seed=5, streams=[1])
        return y + 1

    x = torch.randn(50)
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert same_bits(compiled(x), f(x))


def test_report() -> None:
    assert set(zk.backends()) == {"reference", "cpu", "triton", "cuda"}
    assert zk.backends()["reference"] is None
    done = subprocess.run([sys.executable, "-m", "zo_kernels"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in zk.backends())


def test_the_environment_variable_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZO_KERNELS_BACKEND", "reference")
    assert _backends.pick(torch.device("cpu")) is _backends.load("reference")
    for value, error in (("cuda", RuntimeError), ("nonsense", ValueError)):
        monkeypatch.setenv("ZO_KERNELS_BACKEND", value)
        with pytest.raises(error, match=value):
            zk.normal(3, seed=0, stream=0, tag=0)


def test_sharded_parameters_are_refused(tmp_path: Any) -> None:
    """A DTensor has no memory of its own to write to."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh
    from torch.distributed.tensor.placement_types import Shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 6), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"params\[0\] is a DTensor, .* pass its local tensor"):
            zk.perturb_([sharded], [(0, 1.0)], **OK)
        zk.perturb_([sharded.to_local()], [(0, 1.0)], offsets=[0], **OK)
    finally:
        torch.distributed.destroy_process_group()


# ---- what a pass reads beside the weights -------------------------------------------------------------------------------


def overlapping() -> dict[str, tuple[dict[str, Any], str]]:
    """name -> (arguments, what shares memory with what) of passes over w, with `out` o."""
    w, o = torch.linspace(-1, 1, 4096), torch.ones(4096)
    words, last = w.view(torch.int64), w.view(64, 64)
    return {
        "scale": ({"params": [w], "scales": [(w, 1)]}, r"scales\[0\] shares memory with params\[0\]"),
        "scale-end": ({"params": [w[:100]], "scales": [(w[99:200], 2)]}, r"scales\[0\] shares memory with params\[0\]"),
        "scale-root": ({"params": [w], "scales": [(w, 1, "rsqrt")]}, r"scales\[0\] shares memory"),
        "scale-of-another": (
            {"params": [o, w], "streams": [1, 2], "scales": [w[:1], None]},
            r"scales\[0\] shares memory with params\[1\]",
        ),
        "scale-out": ({"params": [w], "out": [o], "scales": [(o, 3)]}, r"scales\[0\] shares memory with out\[0\]"),
        "mask": ({"params": [w], "masks": [w.view(torch.uint8)[:512]]}, r"masks\[0\] shares memory with params\[0\]"),
        "left": ({"params": [w], "factors": [(w[:64, None], torch.ones(64, 1))]}, r"factors\[0\]: left shares memory"),
        "right": ({"params": [w], "factors": [(torch.ones(64, 1), last[-1:].t())]}, r"factors\[0\]: right shares memory"),
        "coefs": ({"params": [w], "terms": (torch.tensor([1]), w[5:6])}, "terms: the coefficients shares? memory"),
        "tags": ({"params": [w], "terms": (words[:1], torch.ones(1))}, "terms: the tags shares? memory"),
        "decay": ({"params": [w], "decay": w[-1:]}, r"decay shares memory with params\[0\]"),
    }


@pytest.mark.parametrize("name", overlapping())
def test_what_is_read_lies_apart_from_what_is_written(name: str) -> None:
    arguments, message = overlapping()[name]
    given = {"terms": [(1, 1.0)], "seed": 1, "streams": [1], **arguments}
    before = [t.clone() for t in given["params"]]
    with pytest.raises(ValueError, match=message):
        zk.perturb_(**given)
    assert all(map(torch.equal, before, given["params"]))


def test_sequences_and_neighbours_in_memory() -> None:
    w = torch.linspace(-1, 1, 64)
    for passes in ([{"terms": (torch.tensor([1]), w[:1])}], [{"terms": [], "decay": w[3:4]}]):
        before = w.clone()
        zk.perturb_sequence_([w.clone()], passes, seed=1, streams=[1])  # another tensor
        with contextlib.suppress(ValueError):  # numbers of several passes are gathered into memory of their own
            zk.perturb_sequence_([w], passes * 2, seed=1, streams=[1])
            w.copy_(before)
    with pytest.raises(ValueError, match=r"scales\[0\] shares memory"):
        zk.perturb_sequence_([w], [{"terms": [(1, 1.0)]}], seed=1, streams=[1], scales=[(w, 1)])
    # One allocation, no common byte; a scale for two tensors; a scale that is only read with `out`; empty tensors.
    zk.perturb_([w[:32]], [(1, 1.0)], seed=1, streams=[1], scales=[(w[32:], 1)])
    shared = torch.ones(32)
    zk.perturb_([w[:32], w[32:]], [(1, 1.0)], seed=1, streams=[1, 2], scales=[(shared, 1), (shared, 1)])
    zk.perturb_([w], [(1, 1.0)], seed=1, streams=[1], scales=[(w, 1)], out=[torch.empty(64)])
    zk.perturb_([w[:0], w], [(1, 1.0)], seed=1, streams=[1, 2], scales=[(w[:0], 1), None])


def test_a_random_mask_has_the_name_that_saved_states_know() -> None:
    """A group's mask is pickled with its optimizer's state, and torch compares the name with those that a user says are safe."""
    mask, file = zk.RandomMask(0.5, 3), io.BytesIO()
    assert b"zo_kernels.ops\nRandomMask" in pickle.dumps(mask, protocol=0)
    torch.save({"mask": mask}, file)
    file.seek(0)
    with torch.serialization.safe_globals([zk.RandomMask]):
        assert torch.load(file) == {"mask": mask}
