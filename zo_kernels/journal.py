"""The record of a run: theta_T is a function of theta_0 and of the list of updates, and this file holds the list.

    preamble | header (JSON) | crc | record 0 | record 1 | ...          docs/journal.md has every byte

Belongs here: the file and its header, the one writer, the reader, recovery, and the fingerprint of the starting weights. Does not belong
here: what a step decides (optim/), and applying a record to weights.

The writer appends; it never seeks back. One `write` call a record hands it to the operating system, so a killed process loses nothing
that `append` returned from; `fsync` every N records bounds what a power failure can take. The reader trusts nothing: sizes are compared with
the file before memory is taken, every record carries a checksum chained with its place and its file, and nothing read is executed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import stat
import struct
import sys
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_kernels import checks, interrupts
from zo_kernels.parameters import canonical_name
from zo_kernels.plan import Mask, check_mask, check_scale

FORMAT = 1
CONTRACT = 1  # of the noise: docs/numerics.md
MAGIC = b"\x89ZOJ\r\n\x1a\n"  # as PNG's: a transfer that changes line ends or the eighth bit breaks it at once
PERTURBATIONS = ("scratch", "inplace", "lazy")
FLAGS = {"skipped": 1, "clipped": 2, "stochastic": 4, "flushed": 8, "failed_plus": 16, "failed_minus": 32}
_FAILED = FLAGS["failed_plus"] | FLAGS["failed_minus"]

# What a reader accepts; far above any run, far below what could exhaust a machine.
MAX_HEADER = 16 << 20  # bytes of JSON, some 60,000 parameters
MAX_GROUPS = 1 << 12
MAX_TERMS = 1 << 16
MAX_RECORD = 1 << 20  # bytes
MAX_NAME = 4096  # bytes of UTF-8
MAX_DIMENSIONS = 64
MAX_ZEROS = 64 << 20  # bytes of zeros behind the last record that count as a crash's

_PREAMBLE = struct.Struct("<8sII")  # magic, format version, bytes of JSON
_CRC = struct.Struct("<I")
_INDEX = struct.Struct("<Q")
_CHUNK = 1 << 20  # bytes read, or hashed, at a time
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedError(ValueError):
    """The file is not a journal, or not as it was written; `offset` is the byte where that shows."""

    def __init__(self, message: str, offset: int = 0) -> None:  # the default serves unpickling, which then sets it
        super().__init__(message)
        self.offset = offset


class UnbegunError(DamagedError):
    """The file ends inside its header, as a process leaves it that died creating it: no step was recorded."""


class TornError(DamagedError):
    """Only the last record is damaged, as an interrupted write leaves it: `recover` cuts it off."""


class LockedError(RuntimeError):
    """Another process, or another writer of this one, has the journal open."""


# ---- the header -------------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8; no NaN or infinity, which JSON does not have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _strict_json(text: bytes) -> Any:
    """JSON as its standard has it. Python's own reader also takes NaN, a key twice and numbers beyond float64."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def number(literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            raise ValueError(f"the number {literal[:40]} is beyond float64")
        return value

    def constant(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is no JSON")

    return json.loads(text.decode(), object_pairs_hook=unique, parse_float=number, parse_constant=constant)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in contiguous order, as hex digits: chunk by chunk through host memory, the same on every device.

    Raises:
        TypeError: the tensor has no bytes of its own (meta, sparse, sharded).
    """
    if tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout} has no plain bytes to hash")
    h = hashlib.sha256()
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, raw.numel(), _CHUNK):
        h.update(raw[start : start + _CHUNK].cpu().numpy().data)
    return h.hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _combined(rows: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """SHA-256 over the canonical JSON lines [name, dtype, shape, digest], sorted by name."""
    h = hashlib.sha256()
    for name, dtype, shape, sha256 in sorted(rows, key=lambda row: row[0].encode()):
        h.update(_canonical([name, dtype, list(shape), sha256]) + b"\n")
    return h.hexdigest()


def fingerprint(named_params: Iterable[tuple[str, Tensor]]) -> str:
    """One SHA-256 over names, dtypes, shapes and bytes, whatever the order and the devices: 64 hex digits."""
    return _combined((name, _dtype_name(p), tuple(p.shape), digest(p)) for name, p in named_params)


def _check_sha256(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{name}={value!r:.80} must be a SHA-256 of 64 hex digits")


def _check_shape(where: str, shape: Any) -> None:
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    for size in shape:
        checks.check_word(f"{where}: shape", size, 63)
    if math.prod(shape) > checks.MAX_INDEX:
        raise ValueError(f"{where}: more than 2^56 elements, the noise contract's largest index")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or len(name.encode()) > MAX_NAME:  # encode refuses lone surrogates
        raise ValueError(f"parameter name {name!r:.80} must be 1 to {MAX_NAME} bytes of text")


@dataclass(frozen=True)
class Frozen:
    """A weight that the run read and never changed, or a buffer as it was at the start: part of the base model that a replay must find."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_shape(f"parameter {self.name!r:.80}", self.shape)
        if not isinstance(self.dtype, str) or len(self.dtype) > 32:
            raise ValueError(f"parameter {self.name!r:.80}: dtype={self.dtype!r:.40} must be the name of a dtype")
        _check_sha256(f"parameter {self.name!r:.80}: sha256", self.sha256)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Frozen:
        return cls(name, tuple(tensor.shape), _dtype_name(tensor), digest(tensor))


P = TypeVar("P", bound=Frozen)


@dataclass(frozen=True)
class Parameter(Frozen):
    """A weight that the run updates, with its noise stream, its group, and what limits its noise.

    `mask`: None; ``{"keep": T, "tag": t}``, a random mask (docs/numerics.md, section 4); or ``{"sha256": ...}`` of a stored bit mask's bytes.
    `scale`: None; ``{"value": x}``; or ``{"sha256": ..., "values": n, "block": B}`` of a stored fp32 scale.
    """

    stream: int = 0
    group: int = 0
    mask: Mapping[str, Any] | None = None
    scale: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"parameter {self.name!r:.80}"
        if self.dtype not in _DTYPES:
            raise ValueError(f"{where}: dtype={self.dtype!r:.40} must be one of {', '.join(_DTYPES)}")
        checks.check_word(f"{where}: stream", self.stream)
        checks.check_word(f"{where}: group", self.group)
        if (mask := self.mask) is not None:
            if set(mask) == {"keep", "tag"}:
                checks.check_word(f"{where}: mask keep", mask["keep"])
                checks.check_word(f"{where}: mask tag", mask["tag"])
            elif set(mask) == {"sha256"}:
                _check_sha256(f"{where}: mask sha256", mask["sha256"])
            else:
                raise ValueError(f"{where}: the mask has the keys {sorted(mask)!r:.80}; known are keep and tag, or sha256")
        if (scale := self.scale) is not None:
            if set(scale) == {"value"}:
                if isinstance(scale["value"], bool) or not isinstance(scale["value"], (int, float)):
                    raise ValueError(f"{where}: scale value={scale['value']!r:.40} must be a number")
                checks.check_fp32(f"{where}: scale value", scale["value"])
            elif set(scale) == {"sha256", "values", "block"}:
                _check_sha256(f"{where}: scale sha256", scale["sha256"])
                checks.check_word(f"{where}: scale values", scale["values"], 57)
                checks.check_word(f"{where}: scale block", scale["block"], 57)
            else:
                raise ValueError(
                    f"{where}: the scale has the keys {sorted(scale)!r:.80}; known are value, or sha256, values and block"
                )

    @classmethod
    def of(  # type: ignore[override]
        cls, name: str, tensor: Tensor, stream: int, group: int = 0, mask: Mask = None, scale: Any = None
    ) -> Parameter:
        """The entry of a tensor, with `mask` and `scale` as `perturb_` takes them."""
        described_mask, described_scale = described(name, tensor, mask, scale)
        return cls(
            name,
            tuple(tensor.shape),
            _dtype_name(tensor),
            digest(tensor),
            stream=stream,
            group=group,
            mask=described_mask,
            scale=described_scale,
        )


def described(name: str, tensor: Tensor, mask: Mask, scale: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`Parameter.mask` and `Parameter.scale` of what `perturb_` takes."""
    bits, keep, tag = check_mask(f"mask of {name}", mask, tensor)
    values, block, rsqrt = check_scale(f"scale of {name}", scale, tensor, 0)
    if rsqrt:
        raise ValueError(f'scale of {name} is an "rsqrt" scale, whose values change from step to step: a journal cannot state it')
    limits = {"sha256": digest(bits)} if bits is not None else {"keep": keep, "tag": tag} if keep else None
    if values is None:
        return limits, None
    if values.numel() == 1:
        return limits, {"value": float(values)}
    return limits, {"sha256": digest(values), "values": values.numel(), "block": block}


_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)


def _versions() -> dict[str, str]:
    import zo_kernels  # here, since the package may one day import this module

    return {"zo_kernels": zo_kernels.__version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Header:
    """What holds for the whole run. Every field is checked, from a caller and from a file alike.

    Args:
        seed: of the noise, 0 .. 2^64 - 1.
        parameters: the weights that the run updates, as they were at its start.
        kind: "gaussian" or "rademacher".
        perturbation: "scratch", "inplace" or "lazy": which passes a record stands for.
        groups: parameter groups G; terms: directions T of an update, with the tags tag .. tag + T - 1.
        frozen: weights that the run reads and never changes (the base model of an adapter), if a replay shall insist on them.
        buffers: the model's persistent buffers at the start, likewise (packed weights, running statistics).
        hyperparameters, notes: any JSON, for people; a string `model` is what a refused base model's message names.
        versions: of zo_kernels, torch and python.
        run: 32 hex digits that no other run has, so that records of two runs with equal settings cannot be mixed up.
        method: of a run that is not plain SGD along directions that stay: what the T numbers of a record mean (docs/algorithms.md). None: they are the
            coefficients of the update.
        extra: keys that this version does not know; kept and not obeyed.

    Raises:
        TypeError, ValueError: a field is wrong; names it and its value.
    """

    seed: int
    parameters: tuple[Parameter, ...]
    kind: str = "gaussian"
    perturbation: str = "scratch"
    groups: int = 1
    terms: int = 1
    frozen: tuple[Frozen, ...] = ()
    buffers: tuple[Frozen, ...] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    notes: Any = ""
    versions: Mapping[str, Any] = field(default_factory=_versions)
    run: str = field(default_factory=lambda: os.urandom(16).hex())
    method: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check_word("seed", self.seed, 64)
        checks.check_choice("kind", self.kind, tuple(checks.KINDS))
        checks.check_choice("perturbation", self.perturbation, PERTURBATIONS)
        for name, most in (("groups", MAX_GROUPS), ("terms", MAX_TERMS)):
            if not 1 <= checks.check_word(name, getattr(self, name)) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be in 1 .. {most}")
        if 20 + 4 * self.groups * (self.terms + 2) > MAX_RECORD:
            raise ValueError(f"groups={self.groups} with terms={self.terms} makes records of more than {MAX_RECORD} bytes")
        if not isinstance(self.hyperparameters, Mapping) or not isinstance(self.versions, Mapping):
            raise TypeError("hyperparameters and versions must be JSON objects")
        if self.method is not None and not isinstance(self.method, Mapping):
            raise TypeError(f"method={self.method!r:.80} must be a JSON object, or absent")
        if not isinstance(self.run, str) or not re.fullmatch(r"[0-9a-f]{32}", self.run):
            raise ValueError(f"run={self.run!r:.80} must be 32 hex digits")
        if not self.parameters:
            raise ValueError("parameters is empty: a run updates at least one")
        names: set[str] = set()
        streams: set[int] = set()
        for p in (*self.parameters, *self.frozen, *self.buffers):
            if p.name in names:
                raise ValueError(f"parameter {p.name!r:.80} occurs twice")
            names.add(p.name)
        for p in self.parameters:
            if p.stream in streams:
                raise ValueError(
                    f"parameter {p.name!r:.80}: its stream {p.stream} is another parameter's: their noise would be the same"
                )
            if p.group >= self.groups:
                raise ValueError(f"parameter {p.name!r:.80}: group={p.group}, but there are {self.groups} groups")
            streams.add(p.stream)

    @property
    def fingerprint(self) -> str:
        """`fingerprint` of the weights at the start, the frozen ones that are listed included."""
        return _combined((p.name, p.dtype, p.shape, p.sha256) for p in (*self.parameters, *self.frozen))

    @property
    def record(self) -> np.dtype[Any]:
        """A record: tag, flags, loss, gradient, per group (decay, eps unless scratch, coef [T]), crc; packed, little-endian."""
        eps = [] if self.perturbation == "scratch" else [("eps", "<f4")]
        group = np.dtype([("decay", "<f4"), *eps, ("coef", "<f4", (self.terms,))])
        summary = [("loss", "<f4"), ("gradient", "<f4")]
        return np.dtype([("tag", "<u4"), ("flags", "<u4"), *summary, ("groups", group, (self.groups,)), ("crc", "<u4")])

    def encode(self) -> bytes:
        """Preamble, JSON and checksum: the file up to its first record."""
        plain = ("seed", "kind", "perturbation", "groups", "terms", "hyperparameters", "notes", "versions", "run")
        content: dict[str, Any] = {**self.extra, **{name: getattr(self, name) for name in plain}}
        if self.method is not None:
            content["method"] = self.method
        if self.buffers:
            content["buffers"] = [_entry(p) for p in self.buffers]
        content["contract"], content["fingerprint"] = CONTRACT, self.fingerprint
        content["parameters"], content["frozen"] = [_entry(p) for p in self.parameters], [_entry(p) for p in self.frozen]
        try:
            text = _canonical(content)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"hyperparameters or notes cannot be written as JSON: {error}") from None
        if len(text) > MAX_HEADER:
            raise ValueError(
                f"the header has {len(text)} bytes, at most {MAX_HEADER} are allowed: shorten hyperparameters or notes"
            )
        head = _PREAMBLE.pack(MAGIC, FORMAT, len(text)) + text
        return head + _CRC.pack(zlib.crc32(head))

    @classmethod
    def parse(cls, text: bytes) -> Header:
        """The header of a JSON text; ValueError or TypeError if it is none."""
        try:
            content = _strict_json(text)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        if not isinstance(content, dict):
            raise TypeError("the header is not a JSON object")
        content = dict(content)
        if (contract := content.pop("contract", None)) != CONTRACT or isinstance(contract, bool):
            raise ValueError(f"noise contract {contract!r:.40}; this version of zo_kernels computes contract {CONTRACT}")
        recorded = content.pop("fingerprint", None)
        known = {f.name for f in fields(cls)} - {"extra", "method", "buffers"}
        method, buffers = content.pop("method", None), _read_list("buffers", content.pop("buffers", []))
        if missing := sorted(known - set(content)):
            raise ValueError(f"the header has no {missing[0]!r}")
        mine = {name: content.pop(name) for name in known}
        mine["parameters"] = tuple(_read_entry(Parameter, e) for e in _read_list("parameters", mine["parameters"]))
        mine["frozen"] = tuple(_read_entry(Frozen, e) for e in _read_list("frozen", mine["frozen"]))
        mine["buffers"] = tuple(_read_entry(Frozen, e) for e in buffers)
        header = cls(**mine, method=method, extra=content)
        if header.fingerprint != recorded:
            raise ValueError("the fingerprint is not that of the parameters listed")
        return header


def _entry(p: Frozen) -> dict[str, Any]:
    mine = {f.name: getattr(p, f.name) for f in fields(p) if f.name != "extra"}
    return {**p.extra, **{k: v for k, v in mine.items() if v is not None}, "shape": list(p.shape)}


def _read_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is not a list")
    return value


def _read_entry(cls: type[P], entry: Any) -> P:
    if not isinstance(entry, dict):
        raise TypeError("an entry of the parameter table is not an object")
    known = {f.name for f in fields(cls)} - {"extra"}
    if missing := [name for name in known - {"mask", "scale"} if name not in entry]:
        raise ValueError(f"parameter {entry.get('name')!r:.80} has no {min(missing)!r}")
    mine = {name: entry[name] for name in known if name in entry}
    for name in {"mask", "scale"} & set(mine):
        if not isinstance(mine[name], dict):
            raise TypeError(f"parameter {entry['name']!r:.80}: {name} is not an object")
    mine["shape"] = tuple(_read_list("shape", mine["shape"]))
    return cls(**mine, extra={k: v for k, v in entry.items() if k not in known})


def find(named: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of a recorded name; a name may differ by the prefixes of wrappers.

    Raises:
        KeyError: there is none, or more than one; says which.
    """
    if name in named:
        return named[name]
    candidates = [p for n, p in named.items() if canonical_name(n) == canonical_name(name)]
    if len(candidates) != 1:
        raise KeyError(
            "missing" if not candidates else f"ambiguous ({len(candidates)} have that name without their wrappers' prefixes)"
        )
    return candidates[0]


def verify_base(
    header: Header, named_params: Iterable[tuple[str, Tensor]], named_buffers: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Refuse a model that is not the one the run started from. Names may differ by the prefixes of wrappers; parameters and buffers that the
    header does not list are not looked at.

    Args:
        named_buffers: all of the model's; None: the caller has parameters alone, and the header's buffers are not looked at.

    Raises:
        ValueError: names the first parameter or buffer, in the header's order, that is missing or has another shape, dtype or content.
    """
    wrong = "the model is not the one that this run started from"
    pairs: list[tuple[str, Frozen, Tensor]] = []
    wanted = [("parameter", (*header.parameters, *header.frozen), dict(named_params))]
    if named_buffers is not None:
        wanted.append(("buffer", header.buffers, dict(named_buffers)))
    for kind, entries, given in wanted:
        for entry in entries:
            try:
                pairs.append((f"{kind} {entry.name!r}", entry, find(given, entry.name)))
            except KeyError as error:
                raise ValueError(
                    f"{wrong}: {kind} {entry.name!r} is {error.args[0]}; load the base model {_whose(header)}"
                ) from None
    for name, entry, p in pairs:  # what costs nothing first: hashing a large model takes long
        for what, recorded, found in (("shape", entry.shape, tuple(p.shape)), ("dtype", entry.dtype, _dtype_name(p))):
            if recorded != found:
                raise ValueError(
                    f"{wrong}: {name} has {what} {found}, the run's had {recorded}; load the base model {_whose(header)}"
                )
    for name, entry, p in pairs:
        if (found := digest(p)) != entry.sha256:
            raise ValueError(
                f"{wrong}: {name} has other values (SHA-256 {found[:16]}..., the run's {entry.sha256[:16]}...); "
                f"load the base model {_whose(header)} as it was before training"
            )


def _whose(header: Header) -> str:
    model = header.hyperparameters.get("model")
    return f"{model!r:.200}" if isinstance(model, str) else "of that run"


# ---- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """Bytes behind the last whole record, as an interrupted write or a crashed file system leaves them."""

    offset: int
    length: int
    reason: str


@dataclass(frozen=True)
class Journal:
    """A journal as read. `records` is a read-only structured array of `header.record` without changes: ``records["groups"]["coef"]`` has
    the shape [records, G, T]. `start` is the byte of record 0."""

    header: Header
    records: np.ndarray
    start: int
    crc: int
    tail: Tail | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def end(self) -> int:
        """The byte behind the last whole record."""
        return self.start + len(self) * self.header.record.itemsize

    def flag(self, name: str) -> np.ndarray:
        """bool [records]: one of `FLAGS`."""
        return (self.records["flags"] & FLAGS[name]) != 0

    @property
    def steps(self) -> np.ndarray:
        """The records of steps: all but those of steps that failed, which the run did not count."""
        return self.records[(self.records["flags"] & _FAILED) == 0]

    @property
    def next_tag(self) -> int:
        """The first tag that no step has used."""
        return _next_tag(self.header, self.records)


@dataclass(frozen=True)
class _Source:
    """Random access to bytes of a known number; fewer bytes than asked for mean that there are no more."""

    name: str
    size: int
    at: Callable[[int, int], bytes]  # (offset, count)


def _of_descriptor(fd: int, name: str) -> _Source:
    def at(offset: int, count: int) -> bytes:
        parts = []
        while count and (part := os.pread(fd, min(count, _CHUNK), offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    return _Source(name, os.fstat(fd).st_size, at)


def _checksum(payload: bytes, index: int, header_crc: int) -> int:
    """Of a record: chained with its place and its file, so that none can be swapped, repeated or moved."""
    return zlib.crc32(payload, zlib.crc32(_INDEX.pack(index), header_crc))


def _good(chunk: bytes, size: int, first: int, header_crc: int) -> int:
    """How many records at the start of `chunk` carry their checksum."""
    payload = size - _CRC.size
    for k in range(len(chunk) // size):
        at = k * size
        if _CRC.unpack_from(chunk, at + payload)[0] != _checksum(chunk[at : at + payload], first + k, header_crc):
            return k
    return len(chunk) // size


def _read_header(source: _Source) -> tuple[Header, int, int]:
    """(header, byte of record 0, the header's checksum)."""

    def refuse(offset: int, what: str, kind: type[DamagedError] = DamagedError) -> NoReturn:
        raise kind(f"{source.name}: {what}", offset)

    head = source.at(0, _PREAMBLE.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        refuse(0, "no journal: its first bytes are not a journal's")
    if len(head) < _PREAMBLE.size:
        refuse(
            len(head),
            f"ends after {len(head)} bytes, inside its header: no step was recorded; delete it, or create with replace=True",
            UnbegunError,
        )
    _, version, length = _PREAMBLE.unpack(head)
    if version != FORMAT:
        refuse(8, f"journal format {version}; this version of zo_kernels reads format {FORMAT}: use the version that wrote it")
    if length > MAX_HEADER:
        refuse(12, f"the header claims {length} bytes, at most {MAX_HEADER} are allowed: the file is damaged; take a copy")
    start = _PREAMBLE.size + length + _CRC.size
    if start > source.size:
        refuse(
            source.size,
            f"ends after {source.size} of its header's {start} bytes: no step was recorded; delete it, or create with replace=True",
            UnbegunError,
        )
    text, stored = source.at(_PREAMBLE.size, length), source.at(_PREAMBLE.size + length, _CRC.size)
    if len(text) + len(stored) != length + _CRC.size:
        refuse(_PREAMBLE.size, "the file became shorter while it was read")
    crc = zlib.crc32(head + text)
    if _CRC.unpack(stored)[0] != crc:
        refuse(_PREAMBLE.size, "the header fails its checksum: without it no record can be trusted; take a copy of the file")
    try:
        return Header.parse(text), start, crc
    except (TypeError, ValueError, RecursionError) as error:
        refuse(_PREAMBLE.size, f"the header is not one that zo_kernels writes: {error}")


def _impossible(header: Header, records: np.ndarray) -> tuple[int, str] | None:
    """The first record whose content no writer would have accepted, and why."""
    if not len(records):
        return None
    tags, flags, groups = records["tag"].astype(np.int64), records["flags"], records["groups"]
    skipped, failed = (flags & FLAGS["skipped"]) != 0, (flags & _FAILED) != 0
    used = tags + np.where(failed, 0, header.terms)  # a failed step is tried again with the same directions
    numbers = [groups[name].reshape(len(records), header.groups, -1) for name in groups.dtype.names or ()]
    coef = groups["coef"].reshape(len(records), -1)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        checks = [
            ("flags that this version of zo_kernels does not know", (flags & ~np.uint32(sum(FLAGS.values()))) != 0),
            ("a coefficient, decay or eps that is not finite", ~np.all([np.isfinite(n).all((1, 2)) for n in numbers], axis=0)),
            ("an update although it was skipped", skipped & ((coef != 0).any(1) | (groups["decay"] != 1).any(1))),
            ("an update although it failed", failed & ((coef != 0).any(1) | (groups["decay"] != 1).any(1))),
            (
                "flags that exclude each other",
                failed & ((flags & _FAILED == _FAILED) | skipped | (header.perturbation == "scratch")),
            ),
            ("tags beyond 2^32", tags + header.terms > 1 << 32),
            ("a tag that was used before", tags < np.concatenate(([0], used[:-1]))),
        ]
        if "eps" in (groups.dtype.names or ()):
            checks.append(("an eps that is not positive", ~(groups["eps"] > 0).all(1)))
    found = [(int(wrong.argmax()), why) for why, wrong in checks if wrong.any()]
    return min(found) if found else None


def _next_tag(header: Header, records: np.ndarray) -> int:
    """The first tag that no step among the records has used."""
    if not len(records):
        return 0
    return int(records["tag"][-1]) + (0 if records["flags"][-1] & _FAILED else header.terms)


def _read(source: _Source, most: int | None = None) -> Journal:
    """All whole records, or the first `most`, whatever follows those."""
    header, start, crc = _read_header(source)
    dtype = header.record
    size, chunks, n, at = dtype.itemsize, [], 0, start
    per_chunk = max(1, _CHUNK // size)
    while most is None or n < most:
        wanted = per_chunk if most is None else min(per_chunk, most - n)
        chunk = source.at(at, min(wanted * size, source.size - at))
        good = _good(chunk, size, n, crc)
        chunks.append(chunk[: good * size])
        n, at = n + good, at + good * size
        if good < wanted:
            break
    records = np.frombuffer(b"".join(chunks), dtype)  # of bytes, so read-only
    if found := _impossible(header, records):
        index, why = found
        raise DamagedError(
            f"{source.name}: record {index} at byte {start + index * size} has a good checksum and {why}; "
            f"take a copy of the file, or recover(path, keep={index}) to cut the record off with all that follow",
            start + index * size,
        )
    tail = None
    if most is None and at < source.size:
        tail = _tail(source, at, size, n)
    return Journal(header, records, start, crc, tail)


def _tail(source: _Source, at: int, size: int, index: int) -> Tail:
    """What follows the last good record. One write makes one record, so an interrupted one leaves at most a record's bytes, perhaps with
    zeros behind it from the file system. Anything else was damaged after it had been written, and is not cut unasked."""
    length = source.size - at
    beyond, end = at + size, min(source.size, at + size + MAX_ZEROS)
    while beyond < end and (chunk := source.at(beyond, min(_CHUNK, end - beyond))) and not any(chunk):
        beyond += len(chunk)
    if beyond < source.size:
        raise DamagedError(
            f"{source.name}: record {index} at byte {at} fails its checksum and {source.size - at - size} bytes follow it, "
            f"which no interrupted write leaves: something changed the file. Take a copy of it, or recover(path, keep={index}) to cut there",
            at,
        )
    if length < size:
        reason = f"{length} of the {size} bytes of record {index}"
    elif any(source.at(at, size)):
        reason = f"record {index} fails its checksum"
    else:
        reason = f"{length} zero bytes"
    return Tail(at, length, reason)


def _strict(journal: Journal, name: str) -> Journal:
    if (tail := journal.tail) is not None:
        raise TornError(
            f"{name}: torn behind its {len(journal)} whole records, at byte {tail.offset}: {tail.reason}; "
            "recover(path) cuts that off, read(path, strict=False) ignores it",
            tail.offset,
        )
    return journal


def loads(data: bytes, *, strict: bool = True, name: str = "journal") -> Journal:
    """`read` of bytes in memory."""
    source = _Source(name, len(data), lambda offset, count: data[offset : offset + count])
    journal = _read(source)
    return _strict(journal, name) if strict else journal


def read(path: str | os.PathLike[str], *, strict: bool = True) -> Journal:
    """The journal at `path`, every record checked. A run may be writing to it.

    Args:
        strict: refuse a torn tail; otherwise the result has the whole records and says in `tail` what follows them.

    Raises:
        TornError: the last record is incomplete or damaged and nothing follows it; `offset` says where.
        DamagedError: anything else is not as it was written; `offset` says where, the message what to do.
        OSError: the file cannot be read.
    """
    fd = _open(path, os.O_RDONLY)
    try:
        journal = _read(_of_descriptor(fd, str(path)))
    finally:
        os.close(fd)
    return _strict(journal, str(path)) if strict else journal


def recover(path: str | os.PathLike[str], *, keep: int | None = None) -> Tail | None:
    """Cut off a torn tail and make that durable; returns what was cut, None if there was nothing.

    Args:
        keep: cut behind so many records, whatever follows them: the remedy for damage that is not a torn tail.

    Raises:
        DamagedError: the damage is not a torn tail, or not behind the first `keep` records; nothing was changed.
        LockedError: a run is writing to it.
    """
    fd = _open(path, os.O_RDWR)
    try:
        _lock(fd, path)
        source = _of_descriptor(fd, str(path))
        if keep is None:
            tail = _read(source).tail
        else:
            journal = _read(source, checks.check_word("keep", keep, 63))
            if len(journal) < keep:
                raise DamagedError(f"{path}: keep={keep}, but only its first {len(journal)} records are good", journal.end)
            length = source.size - journal.end
            tail = Tail(journal.end, length, f"all that follows {keep} records") if length else None
        if tail:
            os.ftruncate(fd, tail.offset)
            os.fsync(fd)
        return tail
    finally:
        os.close(fd)


# ---- writing ----------------------------------------------------------------------------------------------------------


def _open(path: str | os.PathLike[str], flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)  # NONBLOCK: a named pipe must not be waited for
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "a journal is a regular file, this is none", str(path))
    return fd


def _holder(fd: int) -> str:
    """' by process N' if the kernel tells who holds the lock."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = os.fstat(fd)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0:
                return f" by process {words[4]}" + (", this one" if int(words[4]) == os.getpid() else "")
    return ""


def _lock(fd: int, path: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            f"{path} is in use{_holder(fd)}: one run writes to a journal; wait for it, stop it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        warnings.warn(f"{path}: its file system has no locks, so a second run in this folder goes unnoticed", stacklevel=4)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork() -> None:
    """A child (a DataLoader's worker) lets go at once: it shares its parent's lock, and would keep it beyond the parent's death."""
    for writer in list(_writers):
        writer._abandon("was forked: the process that opened it writes, and this one is its child")


os.register_at_fork(after_in_child=_after_fork)


class Writer:
    """Appends records. Made by `create` and `reopen`; a context manager; never copied or pickled.

    After an append has failed, all others are refused until `reopen`: a record without its predecessors would be no record of the run.

    Attributes:
        header: as written. path: of the file. records: number of whole records in the file.
    """

    def __init__(
        self, fd: int, path: str, header: Header, crc: int, start: int, records: int, next_tag: int, fsync_every: int
    ) -> None:
        self.header, self.path, self.records, self._fd = header, path, records, fd
        self._crc, self._start, self._next_tag, self._unsynced = crc, start, next_tag, 0
        self._size, self._pid, self._refusal = header.record.itemsize, os.getpid(), ""
        self.fsync_every = fsync_every
        per_group = header.terms + (1 if header.perturbation == "scratch" else 2)
        self._pack = struct.Struct(f"<IIff{header.groups * per_group}f").pack
        _writers.add(self)

    def append(
        self,
        tag: int,
        coefs: Sequence[Sequence[float]],
        *,
        decay: Sequence[float] | None = None,
        eps: Sequence[float] | None = None,
        loss: float = math.nan,
        gradient: float = math.nan,
        skipped: bool = False,
        clipped: bool = False,
        stochastic: bool = False,
        flushed: bool = False,
        failed: str | None = None,
    ) -> None:
        """Record one update. When this returns, the record survives the end of the process.

        Args:
            tag: of the first direction; above all tags of the steps recorded before.
            coefs: the update's coefficients [G][T], rounded to fp32; all 0 in a skipped or failed step.
            decay: factor of the weights [G], default 1.
            eps: perturbation scale [G]; needed unless the run is in scratch mode, where it is left out.
            loss, gradient: for people and logs; any number, NaN included.
            skipped, clipped, stochastic, flushed: the flags of docs/journal.md.
            failed: "plus" or "minus": a step in place whose forward at theta + eps z, or theta - eps z, failed; it does not use up its tag.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was written and the writer goes on.
            OSError: the record could not be written, or not be made durable (disk full, file removed); the file was cut back to the
                last whole record where possible, and this writer refuses to go on.
            RuntimeError: this writer was closed, has failed before, or belongs to the parent process.
        """
        if self._refusal or os.getpid() != self._pid:
            raise RuntimeError(f"{self.path}: the journal {self._refusal or 'was forked'}; reopen it")
        tag = checks.check_word("tag", tag)
        flags = (skipped, clipped, stochastic, flushed, failed == "plus", failed == "minus")
        record = self._record(tag, coefs, decay, eps, loss, gradient, failed, flags)
        end = self._start + self.records * self._size
        # Until this append is known to be whole, an interrupt (Ctrl-C) between any two lines leaves the writer refusing.
        self._refusal = f"was interrupted while it wrote record {self.records}"
        mine = False  # bytes behind `end`
        try:
            status = os.fstat(self._fd)
            if status.st_nlink == 0:
                raise OSError(errno.ENOENT, "the file was removed")
            if status.st_size != end:
                raise OSError(errno.EIO, f"the file has {status.st_size} bytes: something else wrote to it, or cut it")
            mine = True
            written = os.write(self._fd, record)
            if written != len(record):
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes were taken: no space left?")
            self._unsynced += 1
            if self.fsync_every and self._unsynced >= self.fsync_every:
                os.fsync(self._fd)
                self._unsynced = 0
        except OSError as error:
            self._fail(error, end, mine)
        self.records += 1
        self._next_tag = tag + (self.header.terms if failed is None else 0)
        self._refusal = ""

    def _record(
        self,
        tag: int,
        coefs: Sequence[Sequence[float]],
        decay: Sequence[float] | None,
        eps: Sequence[float] | None,
        loss: float,
        gradient: float,
        failed: str | None,
        flags: Sequence[bool],
    ) -> bytes:
        header, G = self.header, self.header.groups
        if tag < self._next_tag or tag + header.terms > 1 << 32:
            raise ValueError(f"tag={tag} must be at least {self._next_tag}, the first that no record has used, and below 2^32")
        decay = [1.0] * G if decay is None else decay
        if (eps is None) != (header.perturbation == "scratch"):
            raise ValueError(
                f"eps={eps!r}: a run in {header.perturbation} mode records {'no eps' if eps else 'the eps of each group'}"
            )
        if not len(coefs) == len(decay) == G or (eps is not None and len(eps) != G) or any(len(c) != header.terms for c in coefs):
            raise ValueError(f"coefs, decay and eps must have {G} entries, one a group, and each of coefs {header.terms}")
        numbers: list[float] = []
        for k in range(G):
            numbers += [decay[k], *([] if eps is None else [eps[k]]), *coefs[k]]
        if eps is not None and not all(e > 2.0**-150 for e in eps):
            raise ValueError(f"eps={list(eps)} must be positive in fp32")
        if (flags[0] or failed) and (any(c != 0 for group in coefs for c in group) or any(d != 1 for d in decay)):
            what = "skipped=True" if flags[0] else f"failed={failed!r}"
            raise ValueError(f"{what}, but a coefficient is not 0 or a decay is not 1: such a step updates nothing")
        if failed is not None and (failed not in ("plus", "minus") or flags[0] or eps is None):
            raise ValueError(f"failed={failed!r} must be None, or 'plus' or 'minus' in a run in place, and not with skipped=True")
        word = sum(bit for bit, flag in zip(FLAGS.values(), flags, strict=True) if flag)
        loss, gradient = (math.copysign(math.inf, x) if abs(x) > 3.4028235e38 else x for x in (loss, gradient))
        try:
            payload = self._pack(tag, word, loss, gradient, *numbers)
        except (OverflowError, struct.error):
            payload = b""
        if not payload or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"decay, eps and coefs {numbers!r:.200} must be finite in fp32: record a step whose g is not as skipped"
            )
        return payload + _CRC.pack(_checksum(payload, self.records, self._crc))

    def _fail(self, error: OSError, end: int, cut: bool) -> NoReturn:
        """Take the record back, so that the file agrees with the exception, and refuse to go on."""
        state = ""
        if cut:
            try:
                os.ftruncate(self._fd, end)
                state = f"the file was cut back to its {self.records} whole records; "
            except OSError:
                state = f"what was written of it stays behind the {self.records} whole records, and reopening looks at it; "
        self._refusal = f"failed at record {self.records} ({error.strerror})"
        raise OSError(
            error.errno,
            f"journal record {self.records} at byte {end} could not be written: {error.strerror}; {state}"
            "the step is not recorded. Mend the cause, then reopen the journal",
            self.path,
        ) from error

    def sync(self) -> None:
        """Make every record durable now: `fsync`."""
        if self._refusal or os.getpid() != self._pid:
            raise RuntimeError(f"{self.path}: the journal {self._refusal or 'was forked'}; reopen it")
        try:
            os.fsync(self._fd)
        except OSError as error:  # the kernel has dropped the pages' state: asking again would say yes without having written
            self._refusal = f"could not be made durable ({error.strerror})"
            raise OSError(
                error.errno, f"up to {self._unsynced} records may not be on the disk: {error.strerror}", self.path
            ) from error
        self._unsynced = 0

    def close(self) -> None:
        """Make every record durable and release the lock. Closing twice, or a writer that failed, only closes."""
        with interrupts.uninterrupted():
            try:
                if not self._refusal and os.getpid() == self._pid:
                    self.sync()
            finally:
                self._abandon("is closed")

    def _abandon(self, why: str) -> None:
        """Close the descriptor, which releases the lock unless a parent still has it, and nothing else."""
        fd, self._fd = self._fd, -1
        self._refusal = self._refusal or why
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def refusal(self) -> str:
        """Why the next append would be refused; '' if it would not."""
        if not self._refusal and os.getpid() != self._pid:
            return "was forked"
        return self._refusal

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound now: at the interpreter's end `os` is gone
        if (fd := getattr(self, "_fd", -1)) >= 0:
            self._fd = -1
            close(fd)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a journal's Writer cannot be copied or pickled: two of them would write the same record twice; "
            "close it, and reopen the journal where it is needed"
        )


def _check_policy(fsync_every: Any) -> None:
    if isinstance(fsync_every, bool) or not isinstance(fsync_every, int) or fsync_every < 0:
        raise ValueError(f"fsync_every={fsync_every!r} must be a number of records, 0 for 'only on close'")


def _sync_folder(folder: str) -> None:
    """Make a new file's name durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that keeps names durable by itself, or not at all
            raise
    finally:
        os.close(fd)


def create(path: str | os.PathLike[str], header: Header, *, fsync_every: int = 100, replace: bool = False) -> Writer:
    """Start a journal; when this returns, file, header and directory entry are durable.

    Args:
        fsync_every: records between two `fsync`; 1: each, 0: only on close. A killed process loses no record in any case; a power failure
            up to so many.
        replace: overwrite what is there (unless it is locked); otherwise an existing file is refused.

    Raises:
        FileExistsError: there is something at `path`.
        LockedError: `replace`, and a run is writing to it.
        OSError: the folder is missing, read-only or full; nothing is left behind.
        ValueError: the header cannot be written.
    """
    _check_policy(fsync_every)
    head = header.encode()
    path = os.fspath(path)
    existing = os.path.lexists(path)
    if existing and not replace:
        raise FileExistsError(errno.EEXIST, "a journal is there: reopen it to go on, or give another folder, or replace=True", path)
    with interrupts.uninterrupted():  # a descriptor has one owner, and a handler's OSError is not the file's
        try:
            fd = _open(path, os.O_RDWR | os.O_APPEND | (0 if existing else os.O_CREAT | os.O_EXCL))
        except OSError as error:
            raise OSError(
                error.errno, f"the journal cannot be created: {error.strerror}; give a folder that can be written", path
            ) from error
        try:
            _lock(fd, path)
            os.ftruncate(fd, 0)
            if (written := os.write(fd, head)) != len(head):
                raise OSError(
                    errno.ENOSPC, f"the journal's header could not be written: {written} of {len(head)} bytes were taken", path
                )
            os.fsync(fd)
            _sync_folder(os.path.dirname(path) or ".")
            return Writer(fd, path, header, _CRC.unpack(head[-4:])[0], len(head), 0, 0, fsync_every)
        except BaseException:
            if not existing:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
            raise


def reopen(path: str | os.PathLike[str], *, fsync_every: int = 100, after_steps: bool = False) -> tuple[Writer, Journal]:
    """Go on with a journal: lock it, read it, cut off a torn tail (which the result's `tail` tells), and append behind it.

    Args:
        fsync_every: as in `create`.
        after_steps: cut off failed attempts behind the last step too: the weights that they rounded are gone when a run is resumed from its
            base, and without them it ends with the bits of a run that was never interrupted.

    Raises:
        DamagedError: the damage is not a torn tail; nothing was changed.
        LockedError: another process is writing to it.
        OSError: it cannot be opened for writing.
    """
    _check_policy(fsync_every)
    path = os.fspath(path)
    with interrupts.uninterrupted():  # a descriptor has one owner, and a handler's OSError is not the file's
        try:
            fd = _open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise OSError(error.errno, f"the journal cannot be reopened: {error.strerror}", path) from error
        try:
            _lock(fd, path)
            journal = _read(_of_descriptor(fd, path))
            if after_steps and len(journal.steps) < len(journal):
                counted = np.flatnonzero((journal.records["flags"] & _FAILED) == 0)
                journal = replace(journal, records=journal.records[: int(counted[-1]) + 1 if len(counted) else 0])
            if journal.end < os.fstat(fd).st_size:
                os.ftruncate(fd, journal.end)
                os.fsync(fd)
            return Writer(
                fd, path, journal.header, journal.crc, journal.start, len(journal), journal.next_tag, fsync_every
            ), journal
        except BaseException:
            os.close(fd)
            raise


if sys.byteorder != "little":  # records and digests are little-endian, and so are the kernels
    raise ImportError("zo_kernels.journal needs a little-endian machine")
