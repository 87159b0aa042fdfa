"""What a journal says once: the run's settings, its parameters, and the digests of the weights that it started from.

Belongs here: the header and its JSON, the fingerprint of the starting weights, and comparing a model with it. Does not belong here: records
(reader.py, writer.py), what a step decides (optim/).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_kernels import checks, shards
from zo_kernels._version import __version__
from zo_kernels.journal.layout import (
    CHUNK,
    CONTRACT,
    CRC,
    FORMAT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_GROUPS,
    MAX_HEADER,
    MAX_NAME,
    MAX_RECORD,
    MAX_TERMS,
    PERTURBATIONS,
    PREAMBLE,
)
from zo_kernels.parameters import canonical_name
from zo_kernels.plan import Mask, check_mask, check_scale
from zo_kernels.quantized import named_weights

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8; no NaN or infinity, which JSON does not have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def strict_json(text: bytes) -> Any:
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
    """SHA-256 of a tensor's bytes in contiguous order, as hex digits: chunk by chunk through host memory, the same on every device. Of a sharded tensor
    (DTensor) all processes of its mesh ask for it, in the same order, and each has the digest of the whole one.

    Raises:
        TypeError: the tensor has no bytes of its own (meta, sparse).
    """
    tensor = shards.whole(tensor)
    if tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout} has no plain bytes to hash")
    h = hashlib.sha256()
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, raw.numel(), CHUNK):
        h.update(raw[start : start + CHUNK].cpu().numpy().data)
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


def check_sha256(name: str, value: Any) -> None:
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
        check_sha256(f"parameter {self.name!r:.80}: sha256", self.sha256)

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
                check_sha256(f"{where}: mask sha256", mask["sha256"])
            else:
                raise ValueError(f"{where}: the mask has the keys {sorted(mask)!r:.80}; known are keep and tag, or sha256")
        if (scale := self.scale) is not None:
            if set(scale) == {"value"}:
                if isinstance(scale["value"], bool) or not isinstance(scale["value"], (int, float)):
                    raise ValueError(f"{where}: scale value={scale['value']!r:.40} must be a number")
                checks.check_fp32(f"{where}: scale value", scale["value"])
            elif set(scale) == {"sha256", "values", "block"}:
                check_sha256(f"{where}: scale sha256", scale["sha256"])
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
    return {"zo_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}


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
        head = PREAMBLE.pack(MAGIC, FORMAT, len(text)) + text
        return head + CRC.pack(zlib.crc32(head))

    @classmethod
    def parse(cls, text: bytes) -> Header:
        """The header of a JSON text; ValueError or TypeError if it is none."""
        try:
            content = strict_json(text)
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
    header: Header,
    model_or_params: nn.Module | Iterable[tuple[str, Tensor]],
    named_buffers: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Refuse a model that is not the one the run started from. Names may differ by the prefixes of wrappers; parameters and buffers that the
    header does not list are not looked at.

    Args:
        model_or_params: the model, or its parameters by name. named_buffers: all of the model's, beside parameters; None: the caller has parameters alone,
            and the header's buffers are not looked at.

    Raises:
        ValueError: names the first parameter or buffer, in the header's order, that is missing or has another shape, dtype or content.
    """
    wrong = "the model is not the one that this run started from"
    if isinstance(model_or_params, nn.Module):
        named, named_buffers = named_weights(model_or_params), model_or_params.named_buffers(remove_duplicate=False)
    else:
        named = dict(model_or_params)
    pairs: list[tuple[str, Frozen, Tensor]] = []
    wanted = [("parameter", (*header.parameters, *header.frozen), named)]
    if named_buffers is not None:
        wanted.append(("buffer", header.buffers, dict(named_buffers)))
    for kind, entries, given in wanted:
        for entry in entries:
            try:
                pairs.append((f"{kind} {entry.name!r}", entry, find(given, entry.name)))
            except KeyError as error:
                raise ValueError(f"{wrong}: {kind} {entry.name!r} is {error.args[0]}; load {_remedy(header, entry)}") from None
    for name, entry, p in pairs:  # what costs nothing first: hashing a large model takes long
        for what, recorded, found in (("shape", entry.shape, tuple(p.shape)), ("dtype", entry.dtype, _dtype_name(p))):
            if recorded != found:
                raise ValueError(f"{wrong}: {name} has {what} {found}, the run's had {recorded}; load {_remedy(header, entry)}")
    for name, entry, p in pairs:
        if (found := digest(p)) != entry.sha256:
            raise ValueError(
                f"{wrong}: {name} has other values (SHA-256 {found[:16]}..., the run's {entry.sha256[:16]}...); load {_remedy(header, entry)}"
            )


def _remedy(header: Header, entry: Frozen) -> str:
    """What to load in the place of a model whose `entry` is another."""
    base = f"the base model {_whose(header)} as it was before training"
    if not header.frozen or not isinstance(entry, Parameter):
        return base
    return (
        f"{base}, with the adapter or head that the run trained on it as that began: from the file beside the journal whose name ends in .start, or made anew "
        "from the same random state (torch.manual_seed), in the same dtype"
    )


def _whose(header: Header) -> str:
    model = header.hyperparameters.get("model")
    return f"{model!r:.200}" if isinstance(model, str) else "of that run"
