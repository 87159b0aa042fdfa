"""What a run along given factors needs besides its records: one factor of each matrix, as data with a digest, and its file.

The file lies beside the journal, whose header has the digest alone. It is one of the safetensors format (tensors.py), with a tensor `right/NAME` or
`left/NAME` for each matrix.

Belongs here: what such factors are, and their digest. Does not belong here: how they are found (optim/inputs.py), what z is made of them
(optim/factored.py), writing a file (writer.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_kernels import checks, lowrank
from zo_kernels.journal import tensors
from zo_kernels.journal.header import fingerprint
from zo_kernels.journal.layout import open_file
from zo_kernels.parameters import canonical_name

SIDES = ("right", "left")


class InputFactors:
    """One factor of each of some matrices, which a run keeps: V of z = U V^T, or of z = V U^T for a weight that is stored transposed.

    Args:
        right: by parameter name, [columns, rank] numbers: V stands on the right. left: [rows, rank]. The rank is that of all, 1 .. 64.

    Numbers are rounded to 12 significant bits, and below 2^-60 to 0, as all factors are (docs/numerics.md, section 11); names lose the prefixes of
    wrappers. `sha256` is the digest of what is left. `zk.input_factors` finds factors for a model and its data.

    Raises:
        TypeError, ValueError: names the matrix and what is wrong.
    """

    def __init__(self, right: Mapping[str, Tensor] | None = None, left: Mapping[str, Tensor] | None = None) -> None:
        self.matrices: dict[str, tuple[str, Tensor]] = {}
        for side, given in zip(SIDES, (right or {}, left or {}), strict=True):
            for name, values in given.items():
                if (bare := canonical_name(name)) in self.matrices:
                    raise ValueError(f"factors: {bare!r} occurs twice")
                self.matrices[bare] = side, _rounded(f"the {side} factor of {name!r}", values)
        ranks = {v.shape[1] for _, v in self.matrices.values()}
        if len(ranks) != 1:
            raise ValueError(f"factors: the ranks are {sorted(ranks)}; give one or more matrices, all of one rank")
        self.rank: int = ranks.pop()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors as the file names them, in its order."""
        for name in sorted(self.matrices):
            side, values = self.matrices[name]
            yield f"{side}/{name}", values

    @functools.cached_property
    def sha256(self) -> str:
        """Of names, sides, shapes and numbers, as 64 hex digits."""
        return fingerprint(self.named())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputFactors) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"InputFactors({len(self.matrices)} matrices, rank {self.rank}, {self.sha256[:16]})"

    def __deepcopy__(self, memo: Any) -> InputFactors:
        return self  # nobody writes to it

    def encode(self) -> bytes:
        """The bytes of the file."""
        return tensors.encode(self.named(), {"sha256": self.sha256})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InputFactors:
        """From a file that a run wrote beside its journal.

        Raises:
            OSError: it cannot be read. ValueError: it holds something else; says what.
        """
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
            data = file.read()
        try:
            return cls.decode(data)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)!s} holds no factors: {error}") from None

    @classmethod
    def decode(cls, data: bytes) -> InputFactors:
        """From the bytes of `encode`; ValueError, TypeError, LookupError, AttributeError, OverflowError or RecursionError if they are none."""
        metadata, read = tensors.decode(data)
        if set(metadata) != {"sha256"} or not isinstance(metadata["sha256"], str):
            raise ValueError("its metadata is no digest")
        given: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
        for key, values in read.items():
            side, _, name = key.partition("/")
            if values.dtype != torch.float32 or values.ndim != 2:
                raise ValueError(f"{key!r:.80} is no fp32 matrix")
            given[side][name] = values
        found = cls(**given)
        for name, values in {**given["right"], **given["left"]}.items():
            if not torch.equal(found.matrices[canonical_name(name)][1].view(torch.int32), values.view(torch.int32)):
                raise ValueError(f"{name!r:.80} has numbers that are no factors' of 12 bits")
        if found.sha256 != metadata["sha256"]:
            raise ValueError("its numbers do not have the digest that it names")
        return found


def _rounded(what: str, values: Any) -> Tensor:
    """[n, rank] in fp32 of 12 bits, in host memory."""
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point() or values.is_meta:
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"factors: {what} is {got}; give a floating-point tensor of 2 dimensions")
    if not values.shape[0] or not 1 <= values.shape[1] <= checks.MAX_RANK:
        raise ValueError(f"factors: {what} is {tuple(values.shape)}; give [columns, rank], the rank 1 .. {checks.MAX_RANK}")
    found = values.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not (found.abs() < 1 / lowrank.LEAST).all():
        raise ValueError(f"factors: {what} has a number that is not finite, or 2^60 and more")
    return lowrank.round_to_12_bits_(torch.where(found.abs() < lowrank.LEAST, 0.0, found))


def factors_path(journal: str | os.PathLike[str]) -> Path:
    """Where a journal's factors lie."""
    return Path(f"{os.fspath(journal)}.factors")


def factors_of(given: InputFactors | str | os.PathLike[str] | None, sha256: str, journal: Any) -> InputFactors:
    """The factors that a journal's header has this digest of.

    Args:
        given: they, or the path of their file; None: they lie beside the journal. journal: its path, if it has one.

    Raises:
        ValueError: they are not there, or are others; names the remedy.
    """
    remedy = "give factors=, the InputFactors that the run was made with or the file that lies beside its journal"
    if given is None:
        if not isinstance(journal, (str, os.PathLike)):
            raise ValueError(f"the run went along given factors (SHA-256 {sha256[:16]}...): {remedy}")
        given = factors_path(journal)
    try:
        found = given if isinstance(given, InputFactors) else InputFactors.load(given)
    except OSError as error:
        raise ValueError(f"the run's factors are not at {given!s} ({error.strerror}): {remedy}") from error
    if found.sha256 != sha256:
        raise ValueError(f"the factors have the SHA-256 {found.sha256[:16]}..., the run's {sha256[:16]}...: {remedy}")
    return found
