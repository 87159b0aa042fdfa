"""Named tensors as bytes, in the safetensors format: eight bytes, little-endian, with the length of the header; the header, JSON; the numbers.

Belongs here: the format alone, for the files beside a journal, without a package that a bare installation does not have. Does not belong here: what such a file
is of (factors.py, start.py), writing it (writer.py), base models' files (zo_kernels/views/files.py).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zo_kernels import checks
from zo_kernels.journal.header import strict_json
from zo_kernels.journal.layout import MAX_HEADER

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")


def encode(tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of tensors of `DTYPES`, one behind the other in this order."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts, at = [], 0
    for name, tensor in tensors:
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        parts.append(raw.numpy().tobytes())
        head[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text + b"".join(parts)


def decode(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """(metadata or None, tensors by name) from the bytes of `encode`; ValueError, TypeError, LookupError, AttributeError, OverflowError or RecursionError if
    they are none. The metadata may be anything."""
    if len(data) < _LENGTH.size or not 2 <= (length := _LENGTH.unpack_from(data)[0]) <= min(MAX_HEADER, len(data) - _LENGTH.size):
        raise ValueError("its first eight bytes are not the length of a header")
    first = _LENGTH.size + length
    head = strict_json(data[_LENGTH.size : first])
    metadata = head.pop("__metadata__", None)
    at, found = first, dict[str, Tensor]()
    for name, entry in head.items():
        dtype, shape = DTYPES[entry["dtype"]], [checks.check_word("a size", n, 40) for n in entry["shape"]]
        start, stop = (checks.check_word("an offset", n, 48) for n in entry["data_offsets"])
        size = math.prod(shape) * dtype.itemsize
        if set(entry) != {"dtype", "shape", "data_offsets"} or start != at - first or stop - start != size:
            raise ValueError(f"{name!r:.80} does not lie behind the one before it")
        if at + size > len(data):
            raise ValueError("it ends before its last number")
        raw = torch.frombuffer(bytearray(data[at : at + size] or b"\0" * dtype.itemsize), dtype=dtype)
        found[name] = raw[: size // dtype.itemsize].view(shape)
        at += size
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes stand behind its last number")
    return metadata, found
