"""What a backend receives: a `Plan`, the tensors of one device and dtype, and a `Pass` or `Passes`, what is done to them.

Belongs here: these records, what the arguments of a pass (masks, scales, factors, terms) become in them, and moving their numbers to a
device. Does not belong here: running them (ops.py, update.py), arithmetic (reference.py, _backends/), models (parameters.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import checks, reference

WORDS = 14  # of zo_tensor

Terms = Sequence[tuple[int, float]] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RandomMask:
    """A random sparse mask that is never stored: element i is kept with probability `keep`, by its own counter.

    `keep` is rounded to a multiple of 2^-32 and must lie in (0, 1]; `tag` (0 .. 2^32 - 1) names the draw: the same tag gives
    the same mask. See docs/numerics.md, section 4.
    """

    keep: float
    tag: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, (int, float)) and 2.0**-33 < self.keep <= 1):
            raise ValueError(f"RandomMask: keep={self.keep!r} must be a probability in (0, 1], at least 2^-32")
        checks.check_word("RandomMask: tag", self.tag)

    @property
    def threshold(self) -> int:
        """T of section 4; 0 stands for 'keep all'."""
        return 0 if (t := round(self.keep * 2**32)) >= 2**32 else t


RandomMask.__module__ = "zo_kernels.ops"  # its name in saved states: a group's mask is pickled with them

Mask = Tensor | RandomMask | None


def pack_mask(keep: Tensor) -> Tensor:
    """A bool tensor of any shape as a bit mask: uint8 [ceil(numel / 8)], element i in bit i & 7 of byte i >> 3."""
    if keep.dtype != torch.bool:
        raise TypeError(f"keep has dtype {keep.dtype}; give a bool tensor, True where the weight takes part")
    return reference.packed(keep.reshape(1, -1))[0]


@dataclass(frozen=True)
class Entry:
    """One tensor of a plan; the fields are those of `zo_tensor` in csrc/zo_kernels.h, of which a block of columns is one for each of its rows.

    With a `width` it is such a block: its element e is element offset + (e // width) * pitch + e % width of the full tensor.
    """

    src: Tensor
    dst: Tensor
    stream: int
    offset: int = 0
    mask: Tensor | None = None
    keep: int = 0
    mask_tag: int = 0
    scale: Tensor | None = None
    scale_block: int = 1
    rows: Tensor | None = None
    row_len: int = 0
    left: Tensor | None = None  # fp32 [rows of the full matrix, rank], contiguous; rank and cols are 0 without
    right: Tensor | None = None  # fp32 [cols, rank], column by column in memory: right.t() is contiguous
    rank: int = 0
    cols: int = 0
    rsqrt: bool = False  # element e takes RN(1 / RN(sqrt(scale))) instead of its scale
    width: int = (
        0  # elements of a row of a block of columns; without gathered rows, and a bit mask then begins each row with a byte
    )
    pitch: int = 0  # elements of a row of the full tensor

    def part(self, start: int, stop: int, dst: Tensor) -> Entry:
        """Elements start .. stop of this tensor, written to `dst`. With a bit mask, `start` is a multiple of 8."""
        assert not self.width, "a block of columns has no parts"
        first = self.offset + start
        skipped = first // self.scale_block - self.offset // self.scale_block
        return replace(
            self,
            src=self.src.view(-1)[start:stop],
            dst=dst,
            offset=first,
            mask=None if self.mask is None else self.mask[start // 8 :],
            scale=None if self.scale is None else self.scale[skipped:],
        )

    def retagged(self, mask_tag: int) -> Entry:
        """With another draw of its random mask, if it has one."""
        return replace(self, mask_tag=mask_tag) if self.keep else self

    def record(self) -> tuple[int, ...]:
        """The words of the C struct, as unsigned 64-bit integers."""
        return (
            self.src.data_ptr(),
            self.dst.data_ptr(),
            self.src.numel(),
            self.offset,
            0 if self.mask is None else self.mask.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(),
            self.scale_block,
            0 if self.rows is None else self.rows.data_ptr(),
            self.row_len,
            self.stream | self.keep << 32,
            self.mask_tag | self.rank << 32 | self.rsqrt << 48,
            0 if self.left is None else self.left.data_ptr(),
            0 if self.right is None else self.right.data_ptr(),
            self.cols,
        )

    def records(self) -> np.ndarray:
        """uint64 [n, 14]: `record`, or one for each row of a block of columns, whose noise is that of a short tensor with an offset of its own."""
        if not self.width:
            return np.array([self.record()], dtype=np.uint64)
        rows = np.arange(self.src.numel() // self.width, dtype=np.uint64)
        table = np.tile(np.array(self.record(), dtype=np.uint64), (len(rows), 1))
        first = np.uint64(self.offset) + rows * np.uint64(self.pitch)
        for word, t in enumerate((self.src, self.dst)):
            table[:, word] += rows * np.uint64(self.width * t.element_size())
        table[:, 2], table[:, 3] = self.width, first
        if self.mask is not None:
            table[:, 4] += rows * np.uint64((self.width + 7) // 8)
        if self.scale is not None:
            block = np.uint64(self.scale_block)
            table[:, 5] += np.uint64(4) * (first // block - np.uint64(self.offset) // block)
        return table


@dataclass
class Plan:
    """Tensors of one device and one dtype, checked, in the form in which a backend takes them: one pass, one launch.

    `cache` belongs to the backends (a table in device memory, a map of tiles), keyed by backend name. A plan stays valid while no
    tensor's storage moves (`parameters.Weights.current` tells).
    """

    entries: tuple[Entry, ...]
    device: torch.device
    dtype: torch.dtype
    members: tuple[
        int, ...
    ] = ()  # of each entry its tensor's place in the list that `make_plans` was given; () of a plan that it did not make
    table: np.ndarray = field(init=False)  # uint64 [n, 14]: the C structs, in host memory
    rows: list[int] = field(init=False)  # of the table, that each entry has
    low_rank: bool = field(init=False)  # some entry has factors in the place of noise
    counted: list[Tensor] = field(init=False)  # what is written, where torch counts writes
    cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = [e.src.numel() // e.width if e.width else 1 for e in self.entries]
        self.table = self._records()
        self.low_rank = any(e.rank for e in self.entries)
        self.counted = [e.dst for e in self.entries if not e.dst.is_inference()]

    def _records(self) -> np.ndarray:
        if any(e.width for e in self.entries):
            return np.concatenate([e.records() for e in self.entries])
        return np.array([e.record() for e in self.entries], dtype=np.uint64).reshape(-1, WORDS)

    def part(self, places: Sequence[int]) -> Plan:
        """The entries at these places of `entries` as a plan of their own; this one for all of them."""
        if len(places) == len(self.entries):
            return self
        return Plan(tuple(self.entries[k] for k in places), self.device, self.dtype, tuple(self.members[k] for k in places))

    @property
    def extended(self) -> bool:
        """Some entry has factors or an inverse-square-root scale."""
        return bool((self.table[:, 10] >> np.uint64(32)).any())

    def retag(self, mask_tag: int) -> None:
        """Another draw of the random masks, in the same tables in host memory; those in a device's are made anew."""
        self.entries = tuple(e.retagged(mask_tag) for e in self.entries)
        self.table[:] = self._records()
        for name in [name for name in self.cache if name != "cpu"]:
            del self.cache[name]

    @property
    def plain(self) -> bool:
        """No mask, no scale, no rows, no factors: the lean kernels serve."""
        limited = self.table[:, 4:6].any() or self.table[:, 7].any() or (self.table[:, 9] >> np.uint64(32)).any()
        return not (limited or self.extended)

    def admit(self, n_terms: int) -> None:
        """Refuse a pass of so many terms over low-rank entries, where each tag would need factors of its own."""
        if self.low_rank and n_terms > 1:
            raise ValueError(
                f"terms: a pass over a tensor with factors has one term, this one has {n_terms}: make a pass for each, with factors of its own"
            )

    def admit_sequence(self) -> None:
        if self.extended:
            raise ValueError(
                "a sequence of passes cannot have factors or inverse-square-root scales, which change from pass to pass: "
                "make a pass for each (perturb_)"
            )


@dataclass(frozen=True)
class Pass:
    """What is done to a plan's tensors.

    `tags`/`coefs`: two lists of numbers known on the host (already checked), or two 1-d tensors (int64, fp32) on the plan's
    device. `decay`: None, a float, or a one-element fp32 tensor on the plan's device.
    """

    seed: int
    tags: Sequence[int] | Tensor
    coefs: Sequence[float] | Tensor
    decay: float | Tensor | None = None
    kind: str = "gaussian"
    rounding: str = "nearest"

    def on(self, device: torch.device) -> Pass:
        """The same, with what is a tensor on `device`. The host waits only for numbers of another device that it reads itself."""
        values: list[Any] = [self.tags, self.coefs, self.decay]
        there = [v.device for v in values if isinstance(v, Tensor)]
        if not there or set(there) == {device}:
            return self
        tags, coefs, decay = (_sent(v, device) if isinstance(v, Tensor) else v for v in values)
        return replace(self, tags=tags, coefs=coefs, decay=decay)

    def terms_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tags int64 [K], coefs fp32 [K], decay fp32 [] or None) as tensors on `device`."""
        tags = torch.as_tensor(self.tags, dtype=torch.int64, device=device)
        coefs = torch.as_tensor(self.coefs, dtype=torch.float32, device=device)
        decay = self.decay
        return tags, coefs, None if decay is None else torch.as_tensor(decay, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Passes:
    """S passes one after another, each rounded to the weights' type before the next: what S calls with a `Pass` write, with one read
    and one write of the weights (docs/numerics.md, section 6).

    Contiguous 1-d tensors. On the host: `first` (int64 [S + 1], from 0 to K, never falling: pass s has the terms first[s] ..
    first[s + 1] - 1) and `rounding` (uint8 [S], the codes of `ROUNDINGS`). On the host or on the plan's device: `tags` (int64 [K], the
    low 32 bits count), `coefs` (float32 [K]) and `decay` (float32 [S]; 1 is none, and so is what is not finite).
    """

    seed: int
    tags: Tensor
    coefs: Tensor
    first: Tensor
    decay: Tensor
    rounding: Tensor
    kind: str = "gaussian"

    def __post_init__(self) -> None:
        """Everything that the kernels use to find their way in memory."""
        k, s = self.tags.numel(), self.rounding.numel()
        wanted = {"tags": (torch.int64, k), "coefs": (torch.float32, k), "first": (torch.int64, s + 1)}
        wanted |= {"decay": (torch.float32, s), "rounding": (torch.uint8, s)}
        for name, (dtype, n) in wanted.items():
            t = getattr(self, name)
            if t.dtype != dtype or t.shape != (n,) or not t.is_contiguous():
                raise TypeError(
                    f"Passes: {name} is {t.dtype} of shape {tuple(t.shape)}; give a contiguous {dtype} tensor of shape ({n},)"
                )
        if self.first.device.type != "cpu" or self.rounding.device.type != "cpu":
            raise TypeError("Passes: first and rounding must lie in host memory")
        if self.first[0] != 0 or self.first[-1] != k or (self.first[1:] < self.first[:-1]).any():
            raise ValueError(f"Passes: first must go from 0 to the {k} terms without falling")
        if s and self.rounding.max() >= len(checks.ROUNDINGS):
            raise ValueError(f"Passes: rounding has the value {int(self.rounding.max())}; the codes are {checks.ROUNDINGS}")

    def __len__(self) -> int:
        return self.rounding.numel()

    def __iter__(self) -> Iterator[Pass]:
        """The passes one by one."""
        names = list(checks.ROUNDINGS)
        first, rounding = self.first.tolist(), self.rounding.tolist()
        for s, code in enumerate(rounding):
            terms = slice(first[s], first[s + 1])
            yield Pass(self.seed, self.tags[terms], self.coefs[terms], self.decay[s], self.kind, names[code])

    def on(self, device: torch.device) -> Passes:
        """The same, with tags, coefficients and decays on `device`; without waiting for it."""
        if self.tags.device == self.coefs.device == self.decay.device == device:
            return self
        tags, coefs, decay = (move(t, device) for t in (self.tags, self.coefs, self.decay))
        return replace(self, tags=tags, coefs=coefs, decay=decay)


def move(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`. The host does not wait for a GPU (from pageable memory it would; torch keeps the pinned copy until it is over)."""
    if device.type == "cuda" and t.device.type == "cpu":
        if capturing(device):
            raise RuntimeError("numbers in host memory cannot be captured in a CUDA graph: run this pass or sequence outside of it")
        t = t.pin_memory()
    return _sent(t, device)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of this GPU is being captured in a CUDA graph; torch tells that of the current device's alone."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; in host memory only once it has arrived, since kernels of the CPU read it at once."""
    return t.to(device, non_blocking=device.type != "cpu")


# ---- builders ---------------------------------------------------------------------------------------------------------


def check_mask(name: str, mask: Any, t: Tensor) -> tuple[Tensor | None, int, int]:
    """(bit mask, threshold, tag) of one entry of `masks`."""
    if mask is None:
        return None, 0, 0
    if isinstance(mask, RandomMask):
        return None, mask.threshold, mask.tag
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.uint8, torch.bool):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} is {got}: give None, a RandomMask, a bool tensor of the weight's shape or pack_mask(...) of one")
    if mask.dtype == torch.bool:
        if mask.shape != t.shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, its tensor {tuple(t.shape)}")
        mask = pack_mask(mask)
    if mask.ndim != 1 or mask.numel() != (t.numel() + 7) // 8 or not mask.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; a bit mask of {t.numel()} elements has shape ({(t.numel() + 7) // 8},), contiguous"
        )
    if mask.device != t.device:
        raise ValueError(f"{name} is on {mask.device}, its tensor on {t.device}: move it there")
    return mask, 0, 0


def _extent(t: Tensor, columns: tuple[int, int] | None) -> int:
    """How many elements of the full tensor lie between the first of this one and its last, both counted."""
    if columns is None or not t.numel():
        return t.numel()
    width, pitch = columns
    return (t.numel() // width - 1) * pitch + width


def check_columns(name: str, columns: Any, t: Tensor) -> tuple[int, int] | None:
    """One entry of `columns`: None, or (width, pitch), the elements of a row of this block of columns and of the full tensor."""
    if columns is None:
        return None
    width, pitch = columns
    if not 1 <= width <= pitch or t.numel() % width:
        raise ValueError(
            f"{name}={columns!r}: rows of {width} elements of {pitch} cannot hold {t.numel()}: give 1 <= width <= pitch"
        )
    return None if width == pitch else (int(width), int(pitch))


def by_rows(mask: Tensor, width: int) -> Tensor:
    """A bit mask of a block of columns, so that each of its rows begins with a byte."""
    if width % 8 == 0:
        return mask
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).bool().view(-1)
    rows = bits[: bits.numel() // width * width].view(-1, width)
    return reference.packed(rows).view(-1)


def check_scale(
    name: str, scale: Any, t: Tensor, offset: int, columns: tuple[int, int] | None = None
) -> tuple[Tensor | None, int, bool]:
    """(values, block, whether the scale is 1 / sqrt of the value) of one entry of `scales`: None, a number, a tensor per row, (tensor, block)
    or (tensor, block, "rsqrt")."""
    if scale is None:
        return None, 1, False
    rsqrt = isinstance(scale, tuple) and len(scale) == 3
    if rsqrt:
        if not isinstance(scale[2], str) or scale[2] != "rsqrt":
            raise ValueError(f'{name}: its third item {scale[2]!r} must be "rsqrt"')
        scale = scale[:2]
    if isinstance(scale, (int, float)):
        scale = torch.full((1,), checks.check_fp32(name, scale), dtype=torch.float32, device=t.device)
    block: Any
    if isinstance(scale, Tensor):
        if scale.numel() == 1:
            block = checks.MAX_INDEX  # one block holds every element, whatever the offset
        elif t.ndim and scale.numel() == t.shape[0]:
            row = t.numel() // max(1, t.shape[0]) if columns is None else columns[1]
            block = max(1, row)  # of an empty tensor: anything
        else:
            raise ValueError(
                f"{name} has {scale.numel()} values: give 1, one per row ({t.shape[0] if t.ndim else 1}), or (values, block)"
            )
    else:
        try:
            scale, block = scale
        except (TypeError, ValueError):
            raise TypeError(
                f'{name}={scale!r} must be None, a number, a tensor, (tensor, block) or (tensor, block, "rsqrt")'
            ) from None
    if not isinstance(block, (int, np.integer)) or block < 1:
        raise ValueError(f"{name}: block={block!r} must be a positive integer")
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.device != t.device or not scale.is_contiguous():
        raise TypeError(f"{name} must be a contiguous float32 tensor on {t.device}")
    block = int(min(block, checks.MAX_INDEX))  # a larger one holds every element too, and fits the 64 bits of a kernel's argument
    need = (offset + _extent(t, columns) - 1) // block - offset // block + 1 if t.numel() else 0
    if scale.numel() < need:
        raise ValueError(f"{name} has {scale.numel()} values; {t.numel()} elements from {offset} in blocks of {block} need {need}")
    return scale.view(-1), block, rsqrt


def check_factors(name: str, factors: Any, t: Tensor, offset: int) -> tuple[Tensor | None, Tensor | None]:
    """(left, right) of one entry of `factors`: None, or two fp32 tensors [rows, rank] and [cols, rank]."""
    if factors is None:
        return None, None
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise TypeError(f"{name} is {type(factors).__name__}: give None, or (left, right)")
    for side, f in zip(("left", "right"), factors, strict=True):
        if not isinstance(f, Tensor) or f.dtype != torch.float32 or f.device != t.device or f.ndim != 2:
            got = f"{f.dtype} {tuple(f.shape)} on {f.device}" if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"{name}: {side} is {got}; give a float32 tensor of 2 dimensions on {t.device}")
        if not (f if side == "left" else f.t()).is_contiguous():
            remedy = ".contiguous()" if side == "left" else ".t().contiguous().t()"
            raise ValueError(
                f"{name}: {side} has strides {f.stride()}; left lies row by row, right column by column: give {side}{remedy}"
            )
    left, right = factors
    (rows, rank), (cols, other) = left.shape, right.shape
    if rank != other or not 1 <= rank <= checks.MAX_RANK:
        raise ValueError(f"{name}: left has rank {rank}, right {other}; give both the same, 1 .. {checks.MAX_RANK}")
    if t.numel() and (offset + t.numel() > rows * cols or (t.ndim > 1 and cols != t.numel() // t.shape[0])):
        raise ValueError(
            f"{name} are those of a {rows} x {cols} matrix; {t.numel()} elements of shape {tuple(t.shape)} from {offset} are not part of it: "
            "a tensor is the matrix [shape[0], numel / shape[0]]"
        )
    return left.detach(), right.detach()


def make_plans(
    params: Sequence[Tensor],
    streams: Sequence[int],
    *,
    out: Sequence[Tensor] | None = None,
    masks: Sequence[Mask] | None = None,
    scales: Sequence[Any] | None = None,
    offsets: Sequence[int] | None = None,
    factors: Sequence[Any] | None = None,
    columns: Sequence[tuple[int, int] | None] | None = None,
    names: Sequence[str] | None = None,
    read: Sequence[tuple[str, Tensor]] = (),
    written: Sequence[tuple[str, Tensor]] = (),
) -> list[Plan]:
    """Check a list of tensors and group it by device and dtype, in order of first appearance. See `perturb_` for the arguments; `columns`: for each
    tensor None, or (width, pitch) of a block of columns (`Entry`); `read` and `written`: by name, what else the pass reads and writes."""
    n = len(params)
    names = names or [f"params[{k}]" for k in range(n)]
    checks.check_list(params, names)
    streams = checks.check_streams(streams, n)
    masks, scales, factors = (
        checks.check_length("masks", masks, n),
        checks.check_length("scales", scales, n),
        checks.check_length("factors", factors, n),
    )
    offsets = checks.check_offsets(offsets, n)
    of_columns = checks.check_length("columns", columns, n)
    targets = list(params if out is None else checks.check_length("out", out, n))
    if out is None:
        checks.check_overlap(list(zip(names, params, strict=True)), "a pass reads and writes each weight once")
    else:
        out_names = [f"out[{k}]" for k in range(n)]
        for name, o, source, t in zip(out_names, targets, names, params, strict=True):
            checks.check_tensor(name, o)
            if o.shape != t.shape or o.dtype != t.dtype or o.device != t.device:
                raise ValueError(
                    f"{name} is {o.dtype} {tuple(o.shape)} on {o.device}; its source {source} is {t.dtype} {tuple(t.shape)} on {t.device}"
                )
        distinct = {(t.data_ptr(), t.numel()): (s, t) for s, t in zip(names, params, strict=True)}  # reading twice is fine
        checks.check_overlap([*zip(out_names, targets, strict=True), *distinct.values()], "out must lie apart from params")
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Entry, int]]] = {}
    read = list(read)
    for k, (t, o) in enumerate(zip(params, targets, strict=True)):
        block_of_columns = check_columns(f"columns[{k}]", of_columns[k], t)
        width, pitch = block_of_columns or (0, 0)
        if offsets[k] + _extent(t, block_of_columns) > checks.MAX_INDEX:
            raise ValueError(f"offsets[{k}]={offsets[k]} with {t.numel()} elements exceeds 2^56, the contract's largest index")
        if block_of_columns is not None and factors[k] is not None:
            raise ValueError(f"factors[{k}] are those of rows of whole matrices; tensor {k} is a block of columns: leave them out")
        mask, keep, mask_tag = check_mask(f"masks[{k}]", masks[k], t)
        mask = by_rows(mask, width) if width and mask is not None else mask
        scale, block, rsqrt = check_scale(f"scales[{k}]", scales[k], t, offsets[k], block_of_columns)
        left, right = check_factors(f"factors[{k}]", factors[k], t, offsets[k])
        entry = Entry(
            *(t.detach(), o.detach(), streams[k], offsets[k], mask, keep, mask_tag, scale, block),
            left=left,
            right=right,
            rank=0 if left is None else left.shape[1],
            cols=0 if right is None else right.shape[0],
            rsqrt=rsqrt,
            width=width,
            pitch=pitch,
        )
        groups.setdefault((t.device, t.dtype), []).append((entry, k))
        of_pass = {f"masks[{k}]": mask, f"scales[{k}]": scale, f"factors[{k}]: left": left, f"factors[{k}]: right": right}
        read += [(name, x) for name, x in of_pass.items() if x is not None]
    checks.check_apart([*zip(names if out is None else out_names, targets, strict=True), *written], read)
    return [
        Plan(tuple(e for e, _ in found), device, dtype, tuple(k for _, k in found)) for (device, dtype), found in groups.items()
    ]


def make_terms(terms: Any) -> tuple[list[int] | Tensor, list[float] | Tensor]:
    """(tags, coefs) of `terms`: two lists, or two tensors."""
    if isinstance(terms, (tuple, list)) and len(terms) == 2 and all(isinstance(t, Tensor) for t in terms):
        tags, coefs = terms
        if tags.ndim != 1 or tags.dtype != torch.int64:
            raise TypeError(f"terms: the tags are {tags.dtype} of shape {tuple(tags.shape)}; give a 1-d int64 tensor")
        if coefs.shape != tags.shape or coefs.dtype != torch.float32:
            raise TypeError(f"terms: the coefficients are {coefs.dtype} {tuple(coefs.shape)}; give float32 {tuple(tags.shape)}")
        return tags.contiguous(), coefs.contiguous()
    try:
        pairs = [(tag, coef) for tag, coef in terms]
    except (TypeError, ValueError):
        raise TypeError(
            f"terms={terms!r} must be a list of (tag, coefficient), or a pair of tensors (tags, coefficients)"
        ) from None
    tensors = [c for _, c in pairs if isinstance(c, Tensor)]
    if tensors:  # coefficients that a device computed: they stay there
        tags = torch.tensor(
            [checks.check_word(f"terms[{k}]: tag", tag) for k, (tag, _) in enumerate(pairs)], device=tensors[0].device
        )
        return tags, torch.stack([torch.as_tensor(c, dtype=torch.float32, device=tags.device).reshape(()) for _, c in pairs])
    return (
        [checks.check_word(f"terms[{k}]: tag", tag) for k, (tag, _) in enumerate(pairs)],
        [checks.check_fp32(f"terms[{k}]: coefficient", coef) for k, (_, coef) in enumerate(pairs)],
    )


def joined(parts: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and tensors, in order, as one 1-d tensor; runs of numbers are converted together."""
    pieces: list[Tensor] = []
    for tensors, run in itertools.groupby(parts, lambda part: isinstance(part, Tensor)):
        if tensors:
            pieces += [part.to(device, dtype, non_blocking=True).reshape(-1) for part in run]
        else:
            pieces.append(move(torch.tensor(list(run), dtype=dtype), device))
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)


def make_passes(passes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tags, coefs, first, decay, rounding) of `Passes` for the argument `passes` of `perturb_sequence_`."""
    if not isinstance(passes, Sequence) or isinstance(passes, str):
        raise TypeError(f"passes is a {type(passes).__name__}: give a list of dicts with the keys terms, decay and rounding")
    tags: list[Any] = []
    coefs: list[Any] = []
    first, decays, roundings = [0], [], []
    for s, one in enumerate(passes):
        if not isinstance(one, Mapping) or "terms" not in one or not set(one) <= {"terms", "decay", "rounding"}:
            raise TypeError(f"passes[{s}]={one!r} must be a dict with the key terms, and perhaps decay and rounding")
        try:
            some_tags, some_coefs = make_terms(one["terms"])
            decays.append(checks.check_decay("decay", one.get("decay", 1.0)))
            checks.check_choice("rounding", rounding := one.get("rounding", "nearest"), checks.ROUNDINGS)
        except (TypeError, ValueError) as error:
            raise type(error)(f"passes[{s}]: {error}") from None
        first.append(first[-1] + len(some_tags))
        roundings.append(checks.ROUNDINGS[rounding])
        for all_of_them, some in ((tags, some_tags), (coefs, some_coefs)):
            all_of_them += [some] if isinstance(some, Tensor) else some
    where = next((x.device for x in (*coefs, *decays) if isinstance(x, Tensor)), torch.device("cpu"))
    return (
        joined(tags, torch.int64, where),
        joined(coefs, torch.float32, where),
        torch.tensor(first, dtype=torch.int64),
        joined(decays, torch.float32, where),
        torch.tensor(roundings, dtype=torch.uint8),
    )


def written(plans: Sequence[Plan]) -> None:
    """Backends write through raw pointers; autograd must still see that a saved tensor changed."""
    for plan in plans:
        torch.autograd.graph.increment_version(plan.counted)
