"""Weights in files: safetensors that are read and never written, a file without a name for what is written back, and a new one of what came of them.

Belongs here: where a tensor's bytes lie in a file, and how they come into memory. Does not belong here: when they come (away.py).

Bytes are read into memory that is there already, and no file is mapped: pages of a mapped file would count as the process's own, and stay with it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

KINDS = {  # of what is written, those that are aligned to more bytes first
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {kind: dtype for dtype, kind in KINDS.items() if dtype.is_floating_point}  # of what is read
MOST = 100_000_000  # bytes of a file's header, as safetensors' own library has it
CHUNK = 1 << 22  # bytes that are converted at a time, or go to a device


class Kept(Protocol):
    """One parameter's values where they lie while its block is away: `read` writes them, as they are, into bytes of host memory."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, into: Tensor, start: int) -> None:
        """Fill these bytes (uint8, host memory) from byte `start` on."""
        ...


class File:
    """An open file; it is closed when nobody has it any more. `given`: nobody may write to it meanwhile."""

    def __init__(self, descriptor: int, name: str, given: bool = True) -> None:
        self.descriptor, self.name, self.given = descriptor, name, given
        weakref.finalize(self, os.close, descriptor)
        self.stands = self._stands()

    def _stands(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def read(self, into: Tensor, at: int) -> None:
        """Raises OSError: it ends before, or was written to."""
        view, done = into.numpy().data, 0
        while done < len(view):
            got = os.preadv(self.descriptor, [view[done:]], at + done)
            if got == 0:
                raise OSError(f"{self.name} ends at byte {at + done}: it was cut short while its weights were in use")
            done += got
        if self.given and self._stands() != self.stands:
            raise OSError(
                f"{self.name} was written to while its weights were in use: they are no longer those that the run began with; put back the file as "
                "it was and begin again, from the journal if there is one"
            )


@dataclass(frozen=True)
class Stretch:
    """`nbytes` of a file from `start` on, a tensor of this shape."""

    file: File
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, into: Tensor, start: int) -> None:
        self.file.read(into, self.start + start)


@dataclass(frozen=True)
class Held:
    """In host memory: uint8."""

    memory: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def read(self, into: Tensor, start: int) -> None:
        into.copy_(self.memory[start : start + into.numel()])


class Working:
    """A file without a name, of a fixed size: it is gone with the process, however that ends."""

    def __init__(self, size: int, folder: str | os.PathLike[str] | None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self.file = File(os.dup(file.fileno()), "the file of what was written back", given=False)
        os.posix_fallocate(self.file.descriptor, 0, max(1, size))  # a full disk is found now, and not when a block is half written

    def read(self, into: Tensor, at: int) -> None:
        self.file.read(into, at)

    def write(self, values: Tensor, at: int) -> None:
        view, done = values.numpy().data, 0
        while done < len(view):
            done += os.pwrite(self.file.descriptor, view[done:], at + done)


def tensors_of(path: str | os.PathLike[str]) -> dict[str, Stretch]:
    """The tensors of a safetensors file, or of all of a folder, by name, but for those of other dtypes than a weight may have. Headers are read, nothing else.

    Raises:
        OSError: it cannot be read. ValueError: it is no such file, or a name is in two of a folder's; says which.
    """
    found: dict[str, Stretch] = {}
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            "no such file or folder (of a model of the hub: its folder, as huggingface_hub.snapshot_download gives it)",
            str(path),
        )
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"{folder} holds no safetensors files: give a folder of a model that has its weights in that format")
    for one in files:
        descriptor = os.open(one, os.O_RDONLY | os.O_CLOEXEC)
        file = File(descriptor, str(one))
        try:
            there = _header(file, os.fstat(descriptor).st_size)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{one} is no safetensors file: {error}") from None
        if twice := sorted(found.keys() & there.keys()):
            raise ValueError(f"{folder}: {twice[0]!r:.80} is in {one.name} and in another of its files")
        found |= there
    return found


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """A safetensors file of these, byte for byte as transformers writes it from memory. It takes its place when it is whole, so that one that is read may be
    its own successor.

    Args:
        tensors: their shapes and dtypes by name. read: the values of one, good until the next is asked for.
    """
    rank = list(KINDS)
    names = sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name))
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        t = tensors[name]
        size = t.numel() * t.element_size()
        head[name] = {"dtype": KINDS[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = Path(f"{os.fspath(path)}.part")
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                file.write(read(name).detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _header(file: File, size: int) -> dict[str, Stretch]:
    length = torch.empty(8, dtype=torch.uint8)
    file.read(length, 0)
    (n,) = struct.unpack("<Q", length.numpy().tobytes())
    if not 2 <= n <= min(MOST, size - 8):
        raise ValueError("its first eight bytes are not the length of a header")
    text = torch.empty(n, dtype=torch.uint8)
    file.read(text, 8)
    head: Mapping[str, Any] = json.loads(text.numpy().tobytes().decode())
    found = {}
    for name, entry in head.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name!r:.80} has a size or an offset that is none")
        if stop - start != math.prod(shape) * dtype.itemsize or 8 + n + stop > size:
            raise ValueError(f"{name!r:.80} does not lie where its header says")
        found[name] = Stretch(file, 8 + n + start, stop - start, dtype, tuple(shape))
    return found
