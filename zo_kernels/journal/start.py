"""What a run's weights began with that no base model has: a new adapter, a new head. Their values, and their file.

The file lies beside the journal, whose header has the digest of every tensor in it. It is one of the safetensors format, with a tensor for each parameter, by
its name: eight bytes, little-endian, with the length of the header; the header, JSON; the numbers.

Belongs here: the bytes of such a file, and what of it stands for a model's own values. Does not belong here: which weights need it (who makes the adapter
knows), writing a file (writer.py), the base model's digests (header.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_kernels import checks, shards
from zo_kernels.journal.factors import LENGTH
from zo_kernels.journal.header import Header, digest, strict_json
from zo_kernels.journal.layout import MAX_HEADER, open_file
from zo_kernels.parameters import canonical_name

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def start_path(journal: str | os.PathLike[str]) -> Path:
    """Where the values lie that a journal's new weights began with."""
    return Path(f"{os.fspath(journal)}.start")


def encode(values: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file.

    Raises:
        ValueError: a tensor is of another dtype than a trained weight may have, or a part of a larger one (DTensor).
    """
    head: dict[str, Any] = {}
    parts, at = [], 0
    for name, tensor in values.items():
        if tensor.dtype not in _CODES or shards.is_part(tensor):
            raise ValueError(
                f"{name!r:.80} is a {type(tensor).__name__} of {tensor.dtype}: give whole tensors of {', '.join(DTYPES)}"
            )
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        parts.append(raw.numpy().tobytes())
        head[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return LENGTH.pack(len(text)) + text + b"".join(parts)


def decode(data: bytes) -> dict[str, Tensor]:
    """From the bytes of `encode`; ValueError, TypeError, LookupError, AttributeError, OverflowError or RecursionError if they are none."""
    if len(data) < LENGTH.size or not 2 <= (length := LENGTH.unpack_from(data)[0]) <= min(MAX_HEADER, len(data) - LENGTH.size):
        raise ValueError("its first eight bytes are not the length of a header")
    head = strict_json(data[LENGTH.size : LENGTH.size + length])
    at, found = LENGTH.size + length, {}
    for name, entry in head.items():
        dtype, shape = DTYPES[entry["dtype"]], [checks.check_word("a size", n, 40) for n in entry["shape"]]
        start, stop = (checks.check_word("an offset", n, 48) for n in entry["data_offsets"])
        size = math.prod(shape) * dtype.itemsize
        if start != at - LENGTH.size - length or stop - start != size or at + size > len(data):
            raise ValueError(f"{name!r:.80} does not lie behind the one before it")
        raw = torch.frombuffer(bytearray(data[at : at + size] or b"\0" * dtype.itemsize), dtype=dtype)
        found[name] = raw[: size // dtype.itemsize].view(shape)
        at += size
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes stand behind its last number")
    return found


def start_of(header: Header, given: str | os.PathLike[str] | None, journal: Any) -> dict[str, Tensor]:
    """The starting values that lie beside a journal, by parameter name; empty where no file is there.

    Args:
        given: the path of their file; None: beside the journal. journal: its path, if it has one.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, or another run's; says what.
    """
    path = given
    if path is None:
        if not isinstance(journal, (str, os.PathLike)):
            return {}
        path = start_path(journal)
        if not path.exists():
            return {}
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        data = file.read()
    try:
        found = decode(data)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!s} holds no starting values: {error}") from None
    recorded = {p.name: p.sha256 for p in header.parameters}
    for name, values in found.items():
        if recorded.get(name) != digest(values):
            raise ValueError(
                f"{os.fspath(path)!s} is not of this journal's run, which began with another {name!r:.80}: give the file that it wrote"
            )
    return found


def with_start(named: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by name, with the starting values of a run in the place of those that have the same name and shape; on their devices."""
    names = {canonical_name(n): n for n in named}
    found = dict(named)
    for name, values in start.items():
        mine = names.get(canonical_name(name))
        if mine is not None and named[mine].shape == values.shape and not shards.is_part(named[mine]):
            found[mine] = values.to(named[mine].device)
    return found
