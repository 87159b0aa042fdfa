"""Low-rank directions: the factors U, V of z = U V^T, in memory that stays where it is.

    U[i, rho] = N(seed, stream, tag_u, i * rank + rho)        V[j, rho] = N(seed, stream, tag_v, 2^55 + rho * cols + j)

each rounded to 12 significant bits, so that every product of the two is exact in fp32 (docs/numerics.md, section 11). U lies in memory row
by row and V column by column: neighbouring elements of a row of z need neighbouring numbers of V. One of the two may be given instead: then the other
one is U, with the index that its side has.

Belongs here: how factors are made. Does not belong here: what a pass makes of them (`plan.Entry`, the backends), when U and V change
(the optimizer; LOZO, arXiv 2410.07698: U each step, V every so many).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels import checks, ops
from zo_kernels.plan import Pass, make_plans, move

FIRST_V = 1 << 55  # the index of V[0, 0]: U and V of one tag share no number
LEAST = 2.0**-60  # of a factor that is not 0: every product of two is then exact
ROOM = 64  # floats of which a table has a multiple: tables that follow each other start on a cache line


def round_to_12_bits_(x: Tensor) -> Tensor:
    """fp32 `x`, in place, to 12 significant bits: to nearest, ties to even. Finite stays finite for |x| < 2^127."""
    b = x.view(torch.int32)
    b += (b >> 12 & 1) + 0x7FF
    b &= -0x1000
    return x


class Factors:
    """The factors of a list of matrices on one device, made anew by `fill` at the same addresses.

    Args:
        shapes: (rows, cols) of each unsharded matrix.
        streams: one 32-bit stream for each, its name for the noise (`zo_kernels.stream_of`).
        seed: 0 .. 2^64 - 1.
        rank: of all, 1 .. 64.
        device: where they lie: that of the weights.
        backend: of the noise; default: the best for the device.
        given: one factor of each matrix as fp32 numbers of 12 bits, with its side: ("right", [cols, rank]) or ("left", [rows, rank]). It stays as it is,
            and the other one is U. Default: U is the left factor, and V, the right one, is noise too.
        kind: of U's noise, "gaussian" or "rademacher".

    `pairs[k]` is (left fp32 [rows, rank], right fp32 [cols, rank]) of matrix k, what `perturb_` takes as an entry of `factors`. What is noise is zeros
    before the first `fill`. Memory: 4 * rank * (rows + cols) bytes each.

    Raises:
        ValueError, TypeError: an argument is wrong; names it.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        streams: Sequence[int],
        *,
        seed: int,
        rank: int,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        given: Sequence[tuple[str, Tensor]] | None = None,
        kind: str = "gaussian",
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= checks.MAX_RANK:
            raise ValueError(f"rank={rank!r} must be an integer in 1 .. {checks.MAX_RANK}")
        self.seed, self.rank, self.backend, self.kind = checks.check_word("seed", seed, 64), rank, backend, kind
        streams = checks.check_streams(streams, len(shapes))
        for k, (rows, cols) in enumerate(shapes):
            if max(checks.check_word(f"shapes[{k}]", n, 56) for n in (rows, cols)) * rank > FIRST_V:
                raise ValueError(f"shapes[{k}]={(rows, cols)} with rank={rank} needs more than 2^55 numbers")
        on_the_right = [False] * len(shapes) if given is None else [side == "left" for side, _ in given]
        # U and V are one piece of memory each: one launch fills it, one operation rounds it.
        self.u, u = self._tables([size[right] for size, right in zip(shapes, on_the_right, strict=True)], device)
        self.v, v = self._tables([size[not right] for size, right in zip(shapes, on_the_right, strict=True)], device)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for mine, other, right in zip(u, v, on_the_right, strict=True):
            left, behind = (other, mine) if right else (mine, other)
            self.pairs.append((left.view(-1, rank), behind.view(rank, -1).t()))
        self._one = torch.ones(1, device=device)  # the coefficient beside a tag that is a tensor
        self._u_plans = make_plans(u, streams, offsets=[FIRST_V * right for right in on_the_right])
        self._v_plans = make_plans(v, streams, offsets=[FIRST_V] * len(v)) if given is None else []
        for k, (side, values) in enumerate(given or []):
            target = self.pairs[k][side == "right"]
            if values.shape != target.shape:
                raise ValueError(
                    f"given[{k}]: the {side} factor is {tuple(values.shape)}; of {shapes[k]} it is {tuple(target.shape)}"
                )
            target.copy_(values)

    def _tables(self, lengths: Sequence[int], device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
        sizes = [n * self.rank for n in lengths]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ROOM) * ROOM)
        flat = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        return flat, [flat[a : a + size] for a, size in zip(starts, sizes, strict=False)]

    def fill(self, tag_u: int | Tensor, tag_v: int | Tensor | None = None) -> None:
        """U of `tag_u`, and V of `tag_v`; None: V stays. A tag is 0 .. 2^32 - 1, or a one-element int64 tensor, whose low 32 bits count and
        from which nothing is read back: two launches of noise and three operations a side, whatever the number of matrices."""
        tags = [("tag_u", tag_u, self.u, self._u_plans), ("tag_v", tag_v, self.v, self._v_plans)]
        passes = [(self._pass(name, tag), flat, plans) for name, tag, flat, plans in tags if tag is not None]
        for p, flat, plans in passes:
            flat.zero_()
            ops.run(plans, p, self.backend)
            round_to_12_bits_(flat)

    def combine(self, tags: Sequence[int], coefs: Sequence[Any], places: Sequence[int]) -> Any:
        """U of the matrices at these places becomes RN12(sum_k (c_k / 2^e) U_k), U_k the noise of tag k before it is rounded, 2^e the power of two above
        the largest |c_k|; what is smaller than 2^-60 is 0. Returns 2^e, 0 if all c_k are: a float, or where coefficients are 0-d tensors one of them,
        float64 on the device, of which nothing is read back."""
        device = self.u.device
        c = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in coefs])
        exponent = torch.frexp(c.abs().max()).exponent
        outside = torch.where(c.any(), torch.ldexp(torch.ones((), dtype=torch.float64, device=device), exponent), 0.0)
        inside = (c / torch.where(outside > 0, outside, 1.0)).float()
        numbers = torch.tensor(tags, dtype=torch.int64)
        for plan in self._u_plans:
            own = plan.part([k for k, place in enumerate(plan.members) if place in set(places)])
            for entry in own.entries:
                entry.dst.zero_()
            ops.run([own], Pass(self.seed, move(numbers, device), inside, None, self.kind), self.backend)
            for entry in own.entries:
                entry.dst.copy_(torch.where(entry.dst.abs() < LEAST, 0.0, entry.dst))
                round_to_12_bits_(entry.dst)
        return outside if any(isinstance(x, Tensor) for x in coefs) else float(outside)

    def _pass(self, name: str, tag: int | Tensor) -> Pass:
        kind = self.kind if name == "tag_u" else "gaussian"
        if not isinstance(tag, Tensor):
            return Pass(self.seed, [checks.check_word(name, tag)], [1.0], None, kind)
        if tag.numel() != 1 or tag.dtype != torch.int64:
            raise TypeError(f"{name} is {tag.dtype} {tuple(tag.shape)}; give an integer or a one-element int64 tensor")
        return Pass(self.seed, tag.reshape(1), self._one, None, kind)


def factors(
    seed: int,
    stream: int,
    tag_u: int,
    tag_v: int,
    rows: int,
    cols: int,
    rank: int,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(U fp32 [rows, rank], V fp32 [cols, rank]) of one matrix, a pure function of these integers; see `Factors` for the arguments."""
    made = Factors([(rows, cols)], [stream], seed=seed, rank=rank, device=device, backend=backend)
    made.fill(tag_u, tag_v)
    return made.pairs[0]
