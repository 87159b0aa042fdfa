"""The perturbed linear: its weights bit for bit, its sums within the bound that their arithmetic gives.

Belongs here: both ways of computing it, in two passes and by Triton's kernel (in the interpreter, and on a GPU where there is one), and its
checks. Does not belong here: what can be read from the compiled kernel (test_triton_aot.py).

Two comparisons carry everything. Rows of the identity as x show the perturbed weights themselves: one product is the weight, the others
are zeros, so nothing rounds, and the result must equal what `perturb_` writes. And any x must give, for weights W written by `perturb_`,
the exact x W^T + b up to the rounding of its fp32 sum,

    |y - (x W^T + b)| <= gamma_n (|x| |W|^T + |b|) + the rounding to the result's type,      gamma_n = n u / (1 - n u)

with n = K + 2 roundings on the way of a summand whatever the order (Higham, Accuracy and Stability, section 3.1: K - 1 additions, in fp32 one
product, the bias, the sum of two parts), u = 2^-24. Tensor cores cut off where they add, so on a GPU u = 2^-23 and n doubles.

Whether kernels are interpreted is decided when triton is imported, so the interpreter has a process of its own, as in test_triton.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zo_kernels as zk
from tests.kernels import cases, interpreter
from zo_kernels import linear

try:
    from zo_kernels._backends import triton as backend

    MISSING = backend._import()[1]
except ImportError as error:
    MISSING = str(error)

STREAM, BIAS_STREAM = 0xDEADBEEF, 77
KINDS = ("gaussian", "rademacher")
TERMS: tuple[Any, ...] = (
    [(7, 1e-2)],
    [(0xFFFFFFFF, -3e-3), (5, 2e-2)],
    [(1, 1e-2), (2, 0.0), (3, -4e-3), (4, 1e-3), (5, 2.0**-101)],
)


def perturbed(t: Tensor, terms: Any, sign: int, stream: int, kind: str, offset: int = 0) -> Tensor:
    """What `perturb_` writes for ± the terms, by the reference, on the CPU."""
    out = torch.empty_like(t, device="cpu")
    if isinstance(terms, tuple):
        terms = terms[0].cpu(), sign * terms[1].cpu()
    else:
        terms = [(tag, sign * c) for tag, c in terms]
    source = t.cpu().contiguous()
    zk.perturb_(
        [source], terms, seed=cases.SEED, streams=[stream], out=[out], offsets=[offset], kind=kind, backend="reference"
    )  # fmt: skip
    return out


def matrix(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Weights of ordinary size, with zeros and subnormals. No infinities: 0 times one of them would not be 0."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    flat = w.view(-1)
    some = flat[:: max(1, n * k // 9)]
    special = torch.tensor([0.0, -0.0, tiny / 4, -tiny / 2, 1.0]).to(dtype)
    some.copy_(special[torch.arange(len(some)) % len(special)])
    return w


def check_weights(weight: Tensor, terms: Any, kind: str, device: str = "cpu", offset: int = 0, **options: Any) -> None:
    """x = rows of the identity, twice: y shows columns of theta + s and theta - s; all of them, or the ends and what tiles end at."""
    n, k = weight.shape
    columns = [c for c in range(k) if k <= 96 or c < 16 or c >= k - 16 or c % 64 in (0, 31, 32, 63)]
    eye = torch.eye(k, dtype=weight.dtype, device=device)[columns]
    y = zk.perturbed_linear(
        torch.cat([eye, eye]), weight, terms=terms, seed=cases.SEED, stream=STREAM, kind=kind, offset=offset, **options
    ).cpu()
    for half, sign in ((y[: len(columns)], 1), (y[len(columns) :], -1)):
        want = perturbed(weight, terms, sign, STREAM, kind, offset)[:, columns]
        assert torch.equal(half.T, want), f"sign {sign}: {(want != half.T).nonzero()[:8].tolist()} of {n} x {k}"


def check_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Any, kind: str = "gaussian", halves: bool = True, gpu: bool = False, **options: Any
) -> Tensor:  # fmt: skip
    """Against exact arithmetic (float64 has 29 bits more than the sums that are judged)."""
    streams = {"stream": STREAM, "bias_stream": None if bias is None else BIAS_STREAM}
    y = zk.perturbed_linear(x, weight, bias, terms=terms, seed=cases.SEED, kind=kind, halves=halves, **streams, **options)
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert y.dtype == x.dtype
    u, n = (2.0**-23, 2 * (x.shape[-1] + 2)) if gpu else (2.0**-24, x.shape[-1] + 2)
    gamma = n * u / (1 - n * u)
    parts = zip(x.cpu().chunk(2), y.cpu().chunk(2), (1, -1), strict=True) if halves else [(x.cpu(), y.cpu(), 1)]
    for x_half, y_half, sign in parts:
        w = perturbed(weight, terms, sign, STREAM, kind, options.get("offset", 0)).double()
        exact, size = x_half.double() @ w.T, x_half.double().abs() @ w.abs().T
        if bias is not None:
            b = perturbed(bias, terms, sign, BIAS_STREAM, kind, options.get("bias_offset", 0)).double()
            exact, size = exact + b, size + b.abs()
        info = torch.finfo(x.dtype)
        before = gamma * size
        bound = before + info.eps / 2 * (exact.abs() + before) + info.smallest_normal * info.eps
        wrong = (y_half.double() - exact).abs() > bound
        assert not wrong.any(), f"sign {sign}: {wrong.nonzero()[:8].tolist()}"
    return y


def inputs(m: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(*m, k, generator=g).to(dtype)
    return x, matrix(n, k, dtype), torch.randn(n, generator=g).to(dtype)


SHAPES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((2,), 1, 32),
    ((6,), 5, 96),
    ((34,), 70, 160),
    ((2, 13), 257, 544),
    ((4, 3, 11), 33, 1056),
)  # M = 1, 3, 17, 13, 66; tiles that end inside, in every dimension


def check_shapes(device: str, dtype: torch.dtype, gpu: bool, turn: int | None = None, **options: Any) -> None:
    """Each shape with a bias, without one, and undivided; or, where that takes long, one of the three, which another `turn` (0, 1, 2) has elsewhere."""
    for j, (m, n, k) in enumerate(SHAPES):
        x, w, b = (t.to(device) for t in inputs(m, n, k, dtype))
        if turn is None or (j + turn) % 3 == 0:
            check_sums(x, w, b, TERMS[j % 3], KINDS[j % 2], gpu=gpu, bias_offset=5 * j, **options)
        if turn is None or (j + turn) % 3 == 1:
            check_sums(x, w, None, TERMS[0], gpu=gpu, **options)
        if turn is None or (j + turn) % 3 == 2:
            check_sums(x[0], w, b, TERMS[1], halves=False, gpu=gpu, **options)


def check_device_terms(device: str, **options: Any) -> None:
    """Coefficients that a device computed, dead ones among them; no term at all."""
    w = matrix(40, 64, torch.float16).to(device)
    tags = torch.arange(3, device=device)
    for coefs in ([1e-2, float("nan"), -3e-3], [float("inf"), 0.0, float("nan")]):
        check_weights(w, (tags, torch.tensor(coefs, device=device)), "gaussian", device, **options)
    check_weights(w, (tags[:1], torch.tensor([2e-2], device=device)), "rademacher", device, **options)
    check_weights(w, [], "gaussian", device, **options)
    check_weights(w, [(9, 0.0)], "rademacher", device, **options)


def check_views(device: str, gpu: bool, **options: Any) -> None:
    """Rows of a larger (tied) table, with its offset; weights, bias and x off any alignment; x with strides."""
    for dtype in cases.DTYPES:
        table = matrix(90, 64, dtype).to(device)
        check_weights(table[11:50], TERMS[0], "gaussian", device, offset=11 * 64, **options)
        x, w, b = (t.to(device) for t in inputs((10,), 39, 64, dtype))
        shifted = torch.zeros(40 * 64 + 1, dtype=dtype, device=device)[1:]
        shifted[: 39 * 64].copy_(w.view(-1))
        w = shifted[: 39 * 64].view(39, 64)
        check_weights(w, TERMS[0], "gaussian", device, **options)
        wide = torch.zeros(10, 100, dtype=dtype, device=device)
        wide[:, 3:67] = x
        check_sums(wide[:, 3:67], w, torch.cat([b, b])[1:40], TERMS[0], gpu=gpu, **options)


if not interpreter.INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_in_the_interpreter() -> None:
        if MISSING:
            pytest.skip(MISSING)
        assert interpreter.run_tests(__file__) >= 19

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_two_passes_weights(dtype: torch.dtype, kind: str) -> None:
        for n, k, offset in ((1, 1, 0), (5, 33, 3), (70, 96, 32), (3, 7, 2**56 - 21)):
            check_weights(matrix(n, k, dtype), TERMS[1], kind, offset=offset)

    def test_two_passes_sums() -> None:
        check_shapes("cpu", torch.float32, gpu=False)
        check_device_terms("cpu")
        check_views("cpu", gpu=False)

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 5), st.integers(0, 40), st.integers(1, 70), st.sampled_from(cases.DTYPES), st.booleans(), st.sampled_from(TERMS)
    )  # fmt: skip
    def test_two_passes_of_any_shape(m: int, n: int, k: int, dtype: torch.dtype, halves: bool, terms: Any) -> None:
        """Also none at all: no row of x, no row of the weight."""
        x, w, b = inputs((2 * m,), n, k, dtype)
        check_sums(x, w, b, terms, halves=halves)

    def test_nothing_is_written_and_nothing_is_differentiated() -> None:
        x, w, b = inputs((4,), 40, 64, torch.float16)
        w, x = w.requires_grad_(), x.requires_grad_()
        before = [t.detach().clone() for t in (x, w, b)]
        y = zk.perturbed_linear(x, w, b, terms=TERMS[0], seed=1, stream=2, bias_stream=3)
        assert not y.requires_grad
        assert all(cases.same_bits(t.detach(), old) for t, old in zip((x, w, b), before, strict=True))

    def test_two_pass_reason() -> None:
        x, w = torch.zeros(2, 64), torch.zeros(3, 64)
        assert linear.two_pass_reason(x, w) is None
        assert linear.two_pass_reason(x, w, 4096) is None
        assert "from element 5" in str(linear.two_pass_reason(x, w, 5))
        assert "rows of 40 elements" in str(linear.two_pass_reason(x[:, :40], w[:, :40]))
        assert linear.two_pass_reason(x[:0], w)

    X, W, B = torch.zeros(4, 32), torch.zeros(6, 32), torch.zeros(6)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": None}, TypeError, "x is a NoneType"),
            ({"x": X.half()}, TypeError, r"x is torch.float16 on cpu, weight torch.float32 on cpu: convert x"),
            ({"x": torch.zeros(4, 31)}, ValueError, r"x has shape \(4, 31\), weight \(6, 32\)"),
            ({"x": torch.zeros(5, 32)}, ValueError, r"\(5, 32\); its first dimension must hold two halves"),
            ({"x": torch.zeros(32)}, ValueError, "two halves"),
            ({"weight": W.int()}, TypeError, "weight has dtype torch.int32"),
            ({"weight": torch.zeros(32, 6).T}, ValueError, "weight of shape .* is not contiguous"),
            ({"weight": B}, ValueError, r"weight has shape \(6,\); give \[N, K\]"),
            ({"bias": torch.zeros(5)}, ValueError, r"bias is torch.float32 \(5,\) on cpu; give torch.float32 \(6,\)"),
            ({"bias": B.half()}, ValueError, "bias is torch.float16"),
            ({"bias_stream": None}, ValueError, "bias_stream is None: give the bias's stream"),
            ({"bias": None}, ValueError, "bias_stream=3 without a bias"),
            ({"stream": -1}, ValueError, "stream=-1 must be an integer"),
            ({"bias_stream": 1 << 32}, ValueError, "bias_stream=4294967296"),
            ({"seed": 1 << 64}, ValueError, "seed="),
            ({"kind": "uniform"}, ValueError, "kind='uniform'"),
            ({"terms": 3}, TypeError, "terms=3"),
            ({"terms": [(1, float("nan"))]}, ValueError, "must be finite"),
            ({"offset": -32}, ValueError, "offset=-32"),
            ({"offset": (1 << 56) - 32}, ValueError, "weight: offset .* exceeds 2\\^56"),
            ({"bias_offset": (1 << 56) - 1}, ValueError, "bias: offset .* exceeds 2\\^56"),
            ({"backend": "metal"}, ValueError, "backend='metal'"),
        ],
    )
    def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments: dict[str, Any] = {"x": X, "weight": W, "bias": B, "terms": [(1, 1e-3)], "seed": 1, "stream": 2, "bias_stream": 3}
        zk.perturbed_linear(**arguments)
        with pytest.raises(error, match=message):
            zk.perturbed_linear(**{**arguments, **changes})

    no_gpu = not torch.cuda.is_available() or bool(MISSING)
    gpu = [pytest.mark.gpu, pytest.mark.skipif(no_gpu, reason=f"no CUDA device, or no triton ({MISSING})")]

    class TestOnTheGPU:
        pytestmark = gpu

        @pytest.mark.parametrize("kind", KINDS)
        @pytest.mark.parametrize("dtype", cases.DTYPES)
        def test_weights(self, dtype: torch.dtype, kind: str) -> None:
            for n, k, offset in ((1, 32, 0), (70, 96, 2**36 - 32 * 40), (300, 1056, 2**40), (5, 40, 0), (2048, 2048, 0)):
                check_weights(matrix(n, k, dtype).cuda(), TERMS[0], kind, "cuda", offset, backend="triton")
                check_weights(matrix(n, k, dtype).cuda(), TERMS[2], kind, "cuda", offset)

        @pytest.mark.parametrize("dtype", cases.DTYPES)
        def test_sums(self, dtype: torch.dtype) -> None:
            check_shapes("cuda", dtype, gpu=True, backend="triton")
            x, w, b = (t.cuda() for t in inputs((256,), 2048, 2048, dtype))
            first = check_sums(x, w, b, TERMS[0], gpu=True)
            again = check_sums(x, w, b, TERMS[0], gpu=True)
            assert torch.equal(first, again)

        def test_views_and_device_terms(self) -> None:
            check_views("cuda", gpu=True, backend="triton")
            check_device_terms("cuda", backend="triton")

        def test_a_new_step_compiles_nothing(self) -> None:
            from zo_kernels._backends import _triton_linear as kernels

            x, w, b = (t.cuda() for t in inputs((32,), 2048, 2048, torch.float16))

            def compiled() -> int:
                both = (kernels.linear_kernel, kernels.finish_kernel)
                return sum(len(cache[0]) for kernel in both for cache in kernel.device_caches.values())

            counts = []
            for seed, tag, coef in ((0, 0, 1.0), (1, 16, 0.0), (2**64 - 1, 2**32 - 1, -1e-3), (2**31, 2**31, 16.0)):
                for rows in (2, 20, 32):
                    zk.perturbed_linear(x[:rows], w, b, terms=[(tag, coef)], seed=seed, stream=tag, bias_stream=tag)
                counts.append(compiled())
            assert counts == [counts[0]] * 4, counts

else:
    assert not MISSING

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_weights(dtype: torch.dtype, kind: str) -> None:
        """Tiles that end inside, and offsets on both sides of q = 2^32 and at the end of the contract's range."""
        shapes = ((1, 32, 0), (70, 96, 2**36 - 32 * 40), (260, 544, 2**40 + 32), (4, 64, 2**56 - 256))
        for (n, k, offset), terms in zip(shapes, (*TERMS, TERMS[0]), strict=True):
            check_weights(matrix(n, k, dtype), terms, kind, offset=offset, backend="triton")

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_sums(dtype: torch.dtype) -> None:
        """Every shape in all three ways, and every type too, but not each with each: an interpreted sum knows its type where it reads and writes."""
        check_shapes("cpu", dtype, gpu=False, turn=cases.DTYPES.index(dtype), backend="triton")

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_the_weights_do_not_depend_on_the_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Small tiles, K in parts: what runs on a GPU, at the smallest size that has all of it. Types, kinds and numbers of parts meet in turn:
        none knows of the others."""
        turn = cases.DTYPES.index(dtype)
        launch = backend.LinearLaunch(x_rows=16, w_rows=16, columns=64, warps=1, stages=1, programs=64, least_tiles=1)
        monkeypatch.setattr(backend, "LINEAR_INTERPRETER", launch)
        kind = KINDS[turn % 2]
        check_weights(matrix(19, 32, dtype), TERMS[0], kind, offset=96, backend="triton")  # one part
        check_weights(matrix(19, 160, dtype), TERMS[0], kind, offset=96, backend="triton")  # tiles of x and w, and three of K
        x, w, b = inputs((10,), 19, 352, dtype)
        check_sums(x, w, b, TERMS[1], kind, backend="triton", bias_offset=13)
        for least, halves in [(least, halves) for least in (1, 2, 4) for halves in (True, False)][
            turn::3
        ]:  # six tiles of K in 6, 3 and 1 parts
            monkeypatch.setattr(backend, "LINEAR_INTERPRETER", dataclasses.replace(launch, least_tiles=least))
            check_sums(x, w, b, TERMS[0], halves=halves, backend="triton")

    def test_bias() -> None:
        """x = 0 shows the bias bit for bit, at every place of a group of 32 and a Rademacher call of 128."""
        for dtype in cases.DTYPES:
            bias = matrix(1, 160, dtype)[0]
            for kind in KINDS:
                for offset in (0, 17, 2**36 - 100):
                    y = zk.perturbed_linear(
                        torch.zeros(2, 32, dtype=dtype), torch.ones(160, 32, dtype=dtype), bias, terms=TERMS[1], seed=cases.SEED, stream=1,
                        bias_stream=BIAS_STREAM, kind=kind, bias_offset=offset, backend="triton",
                    )  # fmt: skip
                    for row, sign in ((y[0], 1), (y[1], -1)):
                        assert torch.equal(row, perturbed(bias, TERMS[1], sign, BIAS_STREAM, kind, offset))

    def test_device_terms() -> None:
        check_device_terms("cpu", backend="triton")

    def test_views() -> None:
        check_views("cpu", gpu=False, backend="triton")

    @pytest.mark.parametrize(("k", "offset"), [(40, 0), (64, 5)])
    def test_rows_that_cut_a_group_take_two_passes(k: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(backend, "linear")
        with pytest.MonkeyPatch.context() as patch:
            used = []
            patch.setattr(backend, "perturb", lambda plan, p, real=backend.perturb: (used.append(plan), real(plan, p)))
            check_weights(matrix(9, k, torch.float16), TERMS[0], "gaussian", offset=offset, backend="triton")
            assert len(used) == 2

    def test_an_infinity_beyond_the_end_of_a_row_does_no_harm() -> None:
        """Where K ends inside a tile the kernel meets the next row's weights, and noise that may overflow: 0 times either would be NaN."""
        w = torch.ones(3, 96, dtype=torch.float16)
        w[1, 0] = float("inf")
        x = torch.ones(2, 96, dtype=torch.float16)
        y = zk.perturbed_linear(x, w, terms=TERMS[0], seed=1, stream=2, backend="triton")
        assert y.isfinite().tolist() == [[True, False, True]] * 2
        assert y[0, 1] == float("inf")
        # Weights overflow where |z| > 3.5: in some rows, and in many more beyond the end of one.
        w, x = torch.ones(256, 96, dtype=torch.float16), torch.full((2, 96), 2.0**-10, dtype=torch.float16)
        got, want = (
            zk.perturbed_linear(x, w, terms=[(1, 65504 / 3.5)], seed=1, stream=2, backend=name) for name in ("triton", "reference")
        )
        assert torch.equal(got.isfinite(), want.isfinite())
        assert 0 < (~want.isfinite()).sum() < 128

    def test_nothing_else_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
        """Sentinels around the result and the partial sums, and the arguments as they were."""
        made: list[Tensor] = []
        real = torch.empty

        def guarded(*size: Any, **kw: Any) -> Tensor:
            shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
            made.append(torch.full((shape.numel() + 2 * cases.GUARD,), 7.0, **kw))
            return made[-1][cases.GUARD : cases.GUARD + shape.numel()].view(shape)

        launch = backend.LinearLaunch(x_rows=16, w_rows=16, columns=64, warps=1, stages=1, programs=64, least_tiles=1)
        for tiles in (backend.LINEAR_INTERPRETER, launch):
            monkeypatch.setattr(backend, "LINEAR_INTERPRETER", tiles)
            x, w, b = inputs((6,), 37, 160, torch.float16)
            before = [t.clone() for t in (x, w, b)]
            monkeypatch.setattr(torch, "empty", guarded)
            zk.perturbed_linear(x, w, b, terms=TERMS[0], seed=1, stream=2, bias_stream=3, backend="triton")
            monkeypatch.setattr(torch, "empty", real)
            assert all(cases.same_bits(t, old) for t, old in zip((x, w, b), before, strict=True))
        assert len(made) == 3  # y; y and partial sums
        for t in made:
            assert (t[: cases.GUARD] == 7).all() and (t[-cases.GUARD :] == 7).all()
            assert (t[cases.GUARD : -cases.GUARD] != 7).all()
