"""What a run's weights began with that no base model has: a new adapter, a new head. Their values, and their file.

The file lies beside the journal, whose header has the digest of every tensor in it. It is one of the safetensors format (tensors.py), with a tensor for each
parameter, by its name.

Belongs here: which tensors may be in such a file, and what of it stands for a model's own values. Does not belong here: which weights need it (who makes
the adapter knows), the format (tensors.py), writing a file (writer.py), the base model's digests (header.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_kernels import shards
from zo_kernels.journal import tensors
from zo_kernels.journal.header import Header, digest
from zo_kernels.journal.layout import open_file
from zo_kernels.parameters import canonical_name


def start_path(journal: str | os.PathLike[str]) -> Path:
    """Where the values lie that a journal's new weights began with."""
    return Path(f"{os.fspath(journal)}.start")


def encode(values: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file.

    Raises:
        ValueError: a tensor is of another dtype than a trained weight may have, or a part of a larger one (DTensor).
    """
    for name, tensor in values.items():
        if tensor.dtype not in tensors.CODES or shards.is_part(tensor):
            raise ValueError(
                f"{name!r:.80} is a {type(tensor).__name__} of {tensor.dtype}: give whole tensors of {', '.join(tensors.DTYPES)}"
            )
    return tensors.encode(values.items())


def decode(data: bytes) -> dict[str, Tensor]:
    """From the bytes of `encode`; the errors of `tensors.decode` if they are none."""
    metadata, found = tensors.decode(data)
    if metadata is not None:
        raise ValueError("it has metadata, and is another file")
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
