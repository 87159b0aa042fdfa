"""What is fuzzed: one class for each reader of what others wrote.

Belongs here: for each reader, valid inputs to start from, how to mutate one, and what must hold for any bytes at all. Does not belong
here: engines, counting, command line (run.py).

`check(data)` returns whether the reader accepted the input; any exception that leaves it is a finding.
"""

# ruff: noqa: PT017  (an assertion on an exception is how a check says what it found, with or without pytest)

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import struct
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from tests.journal.samples import append, header, second_reader
from zo_kernels import RandomMask, checks, journal, pack_mask, perturb_
from zo_kernels.journal import start as journal_start
from zo_kernels.optim import (
    Adam,
    Blocks,
    HessianDiagonal,
    InputSubspace,
    InverseRoot,
    LowRank,
    Momentum,
    OneSided,
    Projection,
    QuantileClip,
    RandomSparse,
    ThreePoint,
)  # fmt: skip
from zo_kernels.optim.method import describe, parts_of
from zo_kernels.parameters import canonical_name
from zo_kernels.plan import make_plans

INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    4095,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**56,
    2**63,
    2**64 - 1,
)


class Target(ABC):
    """A reader under test."""

    name: ClassVar[str]

    def close(self) -> None:  # noqa: B027  (most have nothing to remove)
        """Remove what it has put on the disk."""

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Inputs to start from."""

    @abstractmethod
    def check(self, data: bytes) -> bool:
        """Read `data`; whether the reader accepted it."""

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """One changed input. The default knows nothing of a structure."""
        return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One edit: a flipped bit, a byte, an integer, or a piece removed, repeated, moved, zeroed, or appended."""
    b = bytearray(data)
    at = rng.randrange(len(b) + 1)
    n = min(rng.choice((1, 2, 4, 8, 24, 28, rng.randrange(64))), len(b) - at)
    match rng.randrange(10):
        case 0 if at < len(b):
            b[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(b):
            b[at] = rng.randrange(256)
        case 2:
            value = rng.choice(INTERESTING) + rng.choice((-1, 0, 0, 1))
            b[at : at + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
        case 3:
            del b[at : at + n]
        case 4:
            b[at:at] = b[at : at + n]
        case 5:
            to = rng.randrange(len(b) + 1)
            b[to : to + n] = b[at : at + n]
        case 6:
            b[at : at + n] = bytes(n)
        case 7:
            del b[at:]
        case 8:
            b += bytes(rng.choice((1, 4, 23, 24, 48, 4096)))
        case 9:
            b += rng.randbytes(rng.randrange(1, 64))
    return bytes(b)


# ---- journal ----------------------------------------------------------------------------------------------------------


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One changed node of a JSON value, anywhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {
                    **value,
                    rng.choice(("", "extra", "mask", "scale", "sha256", "keep", "a" * 5000)): mutate_json(value[key], rng),
                }
            case _:
                return {**value, key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        k = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:k] + value[k + 1 :]
            case 1:
                return [*value, value[k]]
            case _:
                return [*value[:k], mutate_json(value[k], rng), *value[k + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1))
    if isinstance(value, str) and value and rng.random() < 0.5:
        k = rng.randrange(len(value))
        return value[:k] + rng.choice(("", "0", "f", "x", "\0", "\ud800", "é", value)) + value[k + 1 :]
    leaves = (
        None,
        True,
        False,
        0.5,
        1e308,
        -0.0,
        "",
        "x",
        "gaussian",
        "float16",
        [],
        {},
        {"keep": 1, "tag": 0},
        {"value": 1.0},
        [[]] * 40,
    )
    return rng.choice((rng.choice(INTERESTING), -rng.choice(INTERESTING), rng.choice(leaves)))


def reseal(data: bytes, records: bool) -> bytes:
    """The file with the header's length and checksum made right, and those of its records, so that a mutation gets past them."""
    try:
        length = min(struct.unpack_from("<I", data, 12)[0], max(0, len(data) - 20))
        text = data[16 : 16 + length]
        head = data[:12] + struct.pack("<I", len(text)) + text
        crc = zlib.crc32(head)
        out, rest = head + struct.pack("<I", crc), data[20 + length :]
        if records:
            content = json.loads(text)
            eps = content["perturbation"] != "scratch"
            groups, terms = int(content["groups"]), int(content["terms"])
            size = 20 + 4 * groups * (terms + 1 + eps)
            if not 20 < size <= len(rest):
                return out + rest
            sealed = b""
            for k in range(len(rest) // size):
                body = rest[k * size : (k + 1) * size - 4]
                sealed += body + struct.pack("<I", zlib.crc32(body, zlib.crc32(struct.pack("<Q", k), crc)))
            rest = sealed + rest[len(sealed) :]
        return out + rest
    except (ValueError, TypeError, KeyError, struct.error, OverflowError, RecursionError):
        return data


METHODS = [
    {"rule": describe(Momentum()), "estimator": describe(OneSided(3)), "clip": describe(QuantileClip())},
    {
        "rule": describe(Adam()),
        "direction": describe(RandomSparse()),
        "blocks": describe(Blocks(["a", "b+"])),
    },
    {"direction": describe(InputSubspace("0" * 64))},
    {"direction": describe(LowRank()), "projection": describe(Projection())},
    {
        "estimator": describe(ThreePoint()),
        "rule": describe(HessianDiagonal()),
        "direction": describe(InverseRoot()),
    },
]


class Journal(Target):
    """`journal.loads`, and every 50th input `recover`, `reopen` and `append` on a file. Beside it, a second reader that is written from the
    documentation says which records carry a good checksum: the library may refuse more, and must never give others."""

    name = "journal"

    def __init__(self) -> None:
        shm = "/dev/shm"
        self._folder = tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None)
        self._path = Path(self._folder.name) / "run.zoj"
        self._seeds: list[bytes] = []

    def close(self) -> None:
        self._folder.cleanup()

    def seeds(self) -> list[bytes]:
        if not self._seeds:
            base = header().parameters[0]
            masked = journal.Parameter.of(
                "m", torch.ones(4, 3), 5, mask=torch.ones(4, 3, dtype=torch.bool), scale=torch.arange(4, dtype=torch.float32)
            )
            heads = [header(mode, g, t) for mode in journal.PERTURBATIONS for g, t in ((1, 1), (2, 1), (1, 3))]
            heads.append(
                journal.Header(1, (masked,), kind="rademacher", frozen=(journal.Frozen.of("f", torch.ones(2)),), notes={"a": [1]})
            )
            heads.append(header(buffers=(journal.Frozen.of("q", torch.ones(3, dtype=torch.int8)),)))
            heads += [header("scratch", 1, 2, method=method) for method in METHODS]
            heads.append(journal.Header(1, (journal.Parameter.of("r", torch.ones(2), 1, mask=RandomMask(0.5), scale=2.0), base)))
            for k, head in enumerate(heads):
                with journal.create(self._path, head, fsync_every=0, replace=True) as writer:
                    for step in range(k % 5):
                        append(writer, step)
                self._seeds.append(self._path.read_bytes())
        return self._seeds

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        choice = rng.random()
        if choice < 0.35 and len(data) > 20:
            with contextlib.suppress(ValueError, RecursionError, struct.error):
                length = struct.unpack_from("<I", data, 12)[0]
                content = json.loads(data[16 : 16 + length])
                for _ in range(rng.choice((1, 1, 2))):
                    content = mutate_json(content, rng)
                text = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
                data = data[:12] + struct.pack("<I", len(text)) + text + data[16 + length :]
        elif choice < 0.45:
            other = rng.choice(self.seeds())
            cut = rng.randrange(len(data) + 1)
            data = data[:cut] + other[cut if rng.random() < 0.5 else rng.randrange(len(other) + 1) :]
        else:
            for _ in range(rng.choice((1, 1, 2, 4))):
                data = mutate_bytes(data, rng)
        if rng.random() < 0.6:
            data = reseal(data, records=rng.random() < 0.6)
        return data

    def check(self, data: bytes) -> bool:
        try:
            got = journal.loads(data, strict=False)
        except journal.DamagedError as error:
            assert 0 <= error.offset <= len(data)
            assert not isinstance(error, journal.TornError)
            got = None
        if got is not None:
            self._compare(data, got)
        if zlib.crc32(data) % 50 == 0:
            self._on_disk(data, got)
        return got is not None

    def _compare(self, data: bytes, got: journal.Journal) -> None:
        content, rows, end = second_reader(data)
        assert got.end == end
        assert got.records.tobytes() == data[got.start : end]
        assert len(got) == len(rows)
        assert (content["seed"], content["groups"], content["terms"]) == (got.header.seed, got.header.groups, got.header.terms)
        passes = [x for row in rows for x in row[4:]]  # loss and gradient are for people, and may be anything
        assert all(map(math.isfinite, passes))
        try:
            parts_of(got.header)
        except ValueError as error:
            assert "journal's method" in str(error)
        if got.tail is None:
            assert end == len(data)
            journal.loads(data)
        else:
            assert (got.tail.offset, got.tail.offset + got.tail.length) == (end, len(data))
            try:
                journal.loads(data)
            except journal.TornError as error:
                assert error.offset == end
            else:
                raise AssertionError("a strict reader took a torn tail")
        try:
            again = got.header.encode()
        except ValueError:  # half a surrogate pair in a note: JSON can spell it, UTF-8 cannot
            assert "surrogates" in repr(got.header) or "\\ud" in repr(got.header)
        else:
            assert journal.loads(again).header == got.header

    def _on_disk(self, data: bytes, got: journal.Journal | None) -> None:
        self._path.write_bytes(data)
        if got is None:
            for attempt in (journal.read, journal.recover, journal.reopen):
                try:
                    attempt(self._path)
                except journal.DamagedError:
                    continue
                raise AssertionError(f"{attempt.__name__} took what loads refuses")
            assert self._path.read_bytes() == data
            return
        writer, found = journal.reopen(self._path, fsync_every=0)
        with writer:
            assert found.records.tobytes() == got.records.tobytes()
            head = writer.header
            first = int(found.records["tag"][-1]) + head.terms if len(found) else 0
            room = first + head.terms <= 1 << 32
            if room:
                eps = None if head.perturbation == "scratch" else [1.0] * head.groups
                writer.append(first, [[0.5] * head.terms] * head.groups, eps=eps)
        assert len(journal.read(self._path)) == len(got) + room
        journal.recover(self._path, keep=len(got))
        assert self._path.read_bytes() == data[: got.end]


# ---- masks and scales -------------------------------------------------------------------------------------------------


class Factors(Target):
    """`journal.InputFactors.decode`. Beside it, the safetensors library reads what was accepted, and must find the same numbers under the same names."""

    name = "factors"

    def seeds(self) -> list[bytes]:
        one, two = torch.arange(6.0).view(3, 2) / 8, torch.ones(1, 2)
        found = [journal.InputFactors({"a.weight": one}), journal.InputFactors({"b": two, "c": one}, {"d": one, "é": two})]
        return [f.encode() for f in found]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.6 and len(data) > 8:
            with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError, RuntimeError):
                (length,) = struct.unpack_from("<Q", data)
                head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
                if rng.random() < 0.5:
                    head = mutate_json(head, rng)
                else:
                    body = mutate_bytes(body, rng)
                if rng.random() < 0.8:  # with the digest of what is there now
                    tensors = {k: e for k, e in head.items() if k != "__metadata__"}
                    values = {
                        k: torch.frombuffer(bytearray(body[slice(*e["data_offsets"])]), dtype=torch.float32)
                        for k, e in tensors.items()
                    }
                    head["__metadata__"]["sha256"] = journal.fingerprint(
                        (k, values[k].view(e["shape"])) for k, e in tensors.items()
                    )
                text = json.dumps(head).encode("utf-8", "surrogatepass")
                return struct.pack("<Q", len(text)) + text + body
        return mutate_bytes(data, rng)

    def check(self, data: bytes) -> bool:
        from safetensors.torch import load

        try:
            got = journal.InputFactors.decode(data)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return False
        held = {canonical_name(name.partition("/")[2]): t for name, t in load(data).items()}
        assert held.keys() == got.matrices.keys()
        for name, (_, values) in got.matrices.items():
            assert values.view(torch.int32).equal(held[name].view(torch.int32))
        assert journal.InputFactors.decode(got.encode()) == got
        return True


class Start(Factors):
    """`journal.start.decode`, what a run's new weights began with; the safetensors library beside it as above."""

    name = "start"

    def seeds(self) -> list[bytes]:
        one, two = torch.arange(6.0).view(3, 2) / 8, torch.ones(2, dtype=torch.bfloat16)
        return [journal_start.encode(values) for values in ({"a.weight": one}, {"b": two, "é": one.half(), "empty": one[:0]})]

    def check(self, data: bytes) -> bool:
        from safetensors.torch import load

        try:
            got = journal_start.decode(data)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            return False
        held = load(data)
        assert held.keys() == got.keys()
        for name, values in got.items():
            assert (values.shape, values.dtype) == (held[name].shape, held[name].dtype)
            assert values.view(torch.uint8).equal(held[name].view(torch.uint8)) if values.ndim else True
        again = journal_start.decode(journal_start.encode(got))
        assert journal.fingerprint(again.items()) == journal.fingerprint(got.items())
        return True


class Draw:
    """Values drawn from bytes, zeros when they are used up: the same bytes, the same values."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def integer(self, size: int = 1) -> int:
        return int.from_bytes(self._data.read(size), "little")

    def number(self) -> float:
        return struct.unpack("<d", self._data.read(8).ljust(8, b"\0"))[0]

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer() % len(options)]

    def shape(self) -> tuple[int, ...]:
        return tuple(self.integer() % 12 for _ in range(self.integer() % 4))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Of this shape and dtype with drawn content; sometimes not contiguous, or a view at an odd address."""
        n = math.prod(shape)
        filled = torch.tensor([self.integer() for _ in range(n)] if n < 64 else [self.integer()] * n, dtype=torch.int64)
        if dtype == torch.bool:
            filled = filled & 1
        t = filled.to(dtype).view(shape)
        match self.integer() % 8:
            case 0 if t.ndim == 2:
                return t.t().contiguous().t()
            case 1:
                return torch.cat([torch.zeros(1, dtype=dtype), t.reshape(-1)])[1:].view(shape)
            case 2:
                return t.expand(2, *shape)[1] if t.ndim else t
        return t


WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OTHER_DTYPES = (*WEIGHT_DTYPES, torch.uint8, torch.bool, torch.int8, torch.int64, torch.float64)
STRANGE = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**70,
    0.5,
    math.nan,
    math.inf,
    "",
    "bias",
    b"x",
    [],
    [1.0],
    (),
    (1.0,),
    {},
    {"a": 1},
    set(),
    object(),
)


class Masks(Target):
    """The masks of `perturb_` (None, `RandomMask`, bool tensors, bit masks, anything): accepted, what a kernel reads lies inside
    its tensors, and the C++ kernel and the reference agree on every bit; refused, it is a TypeError or ValueError, and nothing was written."""

    name = "masks"

    def seeds(self) -> list[bytes]:
        rng = random.Random(1)
        return [bytes([2, 3, 5, k]) + rng.randbytes(60) for k in range(8)]

    def check(self, data: bytes) -> bool:
        draw = Draw(data)
        t = torch.zeros(draw.shape(), dtype=draw.choice(WEIGHT_DTYPES))
        try:
            option = {"masks": [self.draw(draw, t)]}
        except ValueError:  # a RandomMask that refuses its arguments
            return False
        return accepts(t, option, data)

    def draw(self, draw: Draw, t: torch.Tensor) -> Any:
        match draw.integer() % 6:
            case 0:
                return RandomMask(draw.number(), draw.integer(5))
            case 1:
                return RandomMask(draw.integer(4) / 2**32, draw.integer(4))
            case 2:
                return draw.tensor(tuple(t.shape), torch.bool)
            case 3:
                return pack_mask(draw.tensor(tuple(t.shape), torch.bool))
            case 4:
                n = (t.numel() + 7) // 8 + draw.choice((0, 0, -1, 1, 8))
                return draw.tensor((max(0, n),), draw.choice((torch.uint8, torch.uint8, *OTHER_DTYPES)))
        return draw.choice((*STRANGE, draw.tensor(draw.shape(), draw.choice(OTHER_DTYPES))))


class Scales(Target):
    """The scales of `perturb_` and the offsets that they depend on, likewise."""

    name = "scales"

    def seeds(self) -> list[bytes]:
        rng = random.Random(2)
        return [bytes([2, 3, 5, k]) + rng.randbytes(60) for k in range(8)]

    def check(self, data: bytes) -> bool:
        draw = Draw(data)
        t = torch.zeros(draw.shape(), dtype=draw.choice(WEIGHT_DTYPES))
        offset = draw.choice((0, 0, 1, 7, 2**56 - t.numel(), 2**56, draw.integer(8), -1, 1.5, None))
        return accepts(t, {"scales": [self.draw(draw, t)], "offsets": [offset]}, data)

    def draw(self, draw: Draw, t: torch.Tensor) -> Any:
        match draw.integer() % 6:
            case 0:
                return draw.number()
            case 1:
                return draw.tensor((draw.choice((1, t.shape[0] if t.ndim else 1, t.numel(), draw.integer() % 9)),), torch.float32)
            case 2 | 3:
                values = draw.tensor((draw.integer() % 20,), torch.float32)
                block = draw.choice((1, 2, 3, t.numel(), draw.integer(2), draw.integer(8), 0, -1, 2.0, True, None, "1"))
                return values, block
            case 4:
                return draw.tensor(draw.shape(), draw.choice((torch.float32, *OTHER_DTYPES)))
        return draw.choice((*STRANGE, (None, 1), (1.0, 1), (torch.ones(3), 1, 1), [torch.ones(3), 3]))


def accepts(t: torch.Tensor, option: dict[str, Any], data: bytes) -> bool:
    """Whether the checks take `option`; what they made of it stays inside its tensors. Every 20th input goes through the kernels too."""
    try:
        ((entry,),) = (plan.entries for plan in make_plans([t], [2], **option))
        taken = True
    except (TypeError, ValueError) as error:
        assert str(error), "an error without a message"
        taken = False
    else:
        first, last = entry.offset, entry.offset + t.numel() - 1
        assert 0 <= first <= last + 1 <= checks.MAX_INDEX
        if entry.mask is not None:
            assert entry.mask.dtype == torch.uint8 and entry.mask.is_contiguous() and 8 * entry.mask.numel() >= t.numel()
        assert 0 <= entry.keep < 1 << 32 and 0 <= entry.mask_tag < 1 << 32
        if entry.scale is not None:
            assert entry.scale.dtype == torch.float32 and entry.scale.is_contiguous() and 0 < entry.scale_block < 1 << 63
            assert t.numel() == 0 or last // entry.scale_block - first // entry.scale_block < entry.scale.numel()
    if zlib.crc32(data) % 20 == 0:
        assert through_kernels(t, option) == taken, "perturb_ and make_plans disagree on what is valid"
    return taken


def through_kernels(t: torch.Tensor, option: dict[str, Any]) -> bool:
    """One call of `perturb_` by two backends, with guard elements on either side of the weights."""
    results, accepted = [], set()
    for backend in ("cpu", "reference"):
        whole = torch.full((t.numel() + 32,), 3.0, dtype=t.dtype)
        before = whole.clone()
        try:
            inner = whole[16 : 16 + t.numel()].view(t.shape)
            perturb_([inner], [(7, 0.5)], seed=1, streams=[2], decay=0.5, backend=backend, **option)
            accepted.add(True)
        except (TypeError, ValueError):
            assert torch.equal(whole, before), "refused, and yet it wrote"
            accepted.add(False)
        assert torch.equal(whole[:16], before[:16]) and torch.equal(whole[16 + t.numel() :], before[:16]), "wrote beside the tensor"
        results.append(whole)
    assert len(accepted) == 1, "one backend refuses what the other accepts"
    a, b = (w.view(torch.int16 if w.element_size() == 2 else torch.int32) for w in results)
    both_nan = results[0].isnan() & results[1].isnan()  # whose payload is not part of the contract
    assert bool(((a == b) | both_nan).all()), "the backends differ"
    return accepted.pop()


# ---- the application --------------------------------------------------------------------------------------------------


class Options(Target):
    """The configuration of a run, or of a comparison: the command line of `zo-finetune train` and `compare`, one argument a line, through
    `Config.check` and `Plan.check`. It ends in a checked configuration, the parser's own exit 2, or a `UserError`."""

    name = "options"

    def __init__(self) -> None:
        from zo_finetune.cli import build_parser

        self._parser = build_parser()
        (commands,) = (
            action.choices.values() for action in self._parser._actions if isinstance(action, argparse._SubParsersAction)
        )
        for parser in (self._parser, *commands):  # the same text whatever the input, and most of the time of a refusal
            for name in ("format_usage", "format_help"):
                setattr(parser, name, functools.cache(getattr(parser, name)))

    def seeds(self) -> list[bytes]:
        start = "train --model m --task sst2 --data d --output o"
        lines = [
            start,
            f"{start} --lr 1e-3 --eps 1e-3 --steps 10 --seed 3 --clip 1.5 --weight-decay 0.1 --batch-size 2",
            f"{start} --column sentence=text --column label=y --peft lora --peft-target q_proj --dtype float16",
            f"{start} --train-examples 0 --dev-examples 3 --eval-examples 4 --max-length 99 --no-save --overwrite",
            f"{start} --perturbation scratch --rounding stochastic --lr-schedule cosine --backend cpu --accumulate 2",
            f"{start} --method adam --option betas=0.8,0.9 --option state=recomputed --option history=4",
            f"{start} --method blockwise --option by=a,b --option every=2",
            "compare --model m --task sst2 --data d --output o --methods mezo,lozo:rank=4:every=2,fzoo --forwards 99 --seeds 1,2 --lr mezo=1e-3",
            "compare --model m --task sst2 --data d --output o --methods dizo:inner=3 --forwards 9 --lr-factors 1,2 --points 3 --eps dizo=1e-2",
            "demo --seed 1",
            "resume o",
            "replay o --model m --output p --upto 3 --mode fused",
        ]
        return ["\n".join(line.split()).encode() for line in lines]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(data, rng)
        words = data.split(b"\n")
        more = [w for seed in self.seeds() for w in seed.split(b"\n")]
        more += [
            b"nan",
            b"inf",
            b"-inf",
            b"-1",
            b"0",
            b"1e999",
            b"9" * 5000,
            b"=",
            b"a=",
            b"1_0",
            b"\xff",
            b"@file",
            b"--",
            b"-h",
            "٣".encode(),
        ]
        k = rng.randrange(len(words) + 1)
        match rng.randrange(3):
            case 0:
                words[k : k + 1] = [rng.choice(more)]
            case 1:
                words.insert(k, rng.choice(more))
            case 2:
                del words[k : k + 1]
        return b"\n".join(words)

    def check(self, data: bytes) -> bool:
        from zo_finetune.compare import plan_of
        from zo_finetune.config import Comparison, Config
        from zo_finetune.errors import UserError
        from zo_finetune.options import given

        arguments = [os.fsdecode(word) for word in data.split(b"\n")]
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
                found = self._parser.parse_args(arguments)
        except SystemExit as exit:
            assert exit.code in (0, 2)
            return False
        if found.command not in ("train", "compare"):
            return True
        try:
            if found.command == "compare":
                plan = plan_of(given(Comparison, found), given(Config, found))
                plan.check()
                config = plan.config(plan.contenders[0], plan.options.seeds[0])
            else:
                config = Config(**given(Config, found))
            config.check()
        except UserError as error:
            assert str(error)
            return False
        checked(config)
        return True


class Folder(Target):
    """What `zo-finetune resume` and `compare` read in a run's folder besides the journal: config.json, result.json, evaluations.jsonl, log.csv and
    scores_after.csv, in this order and with 0x1E between them. A `Config` that is checked and says what the file says, a finished run's result, or a
    `UserError`; evaluations, times and rows that the rest of the run can use."""

    name = "folder"

    def __init__(self) -> None:
        shm = "/dev/shm"
        self._folder = tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None)
        self._path = Path(self._folder.name)
        (self._path / "run.zoj").touch()

    def close(self) -> None:
        self._folder.cleanup()

    def seeds(self) -> list[bytes]:
        from zo_finetune.config import Config

        plain = Config(model="m", task="sst2", data="d", output="o")
        full = dataclasses.replace(
            plain,
            lr=1e-3,
            eps=1e-3,
            clip=2.0,
            targets=["q"],
            columns={"sentence": "s"},
            dev_examples=3,
            max_length=9,
            backend="cpu",
        )
        score: dict[str, Any] = {
            "accuracy": 0.5,
            "accuracy_stderr": 0.1,
            "loss": 0.7,
            "examples": 12,
            "predicted": {"no": 1.0},
            "auc": None,
        }
        lines = [{"before": score}, {"dev": {"step": 0, **score}}, {"dev": {"step": 2, **score}}]
        done = {"task": "sst2", "interrupted": False, "steps": 2, "before": score, "after": score}
        evaluations = "".join(json.dumps(line) + "\n" for line in lines)
        log = "step,loss,projected_gradient,lr,seconds\n1,0.5,0.1,1e-3,0.25\n2,0.5,0.1,1e-3,0.5\n"
        scores = "row,value,label,score_0,score_1\n7,1,0,-0.5,-1.25\n3,0,1,-0.5,-inf\n"
        return [
            "\x1e".join(
                (json.dumps({"directory": "/", "config": dataclasses.asdict(config)}), result, evaluations, log, scores)
            ).encode()
            for config in (plain, full)
            for result in ("", json.dumps(done), json.dumps({**done, "interrupted": True, "after": None}))
        ]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(data, rng)
        parts = data.split(b"\x1e")
        k = rng.choice((0, 0, 0, rng.randrange(len(parts))))
        if rng.random() < 0.3:
            parts[k] = mutate_bytes(parts[k], rng)
            return b"\x1e".join(parts)
        lines = parts[k].split(b"\n")  # evaluations.jsonl has a JSON value a line, the others at most one
        n = rng.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):
            lines[n] = json.dumps(mutate_json(json.loads(lines[n]), rng)).encode()
        parts[k] = b"\n".join(lines)
        return b"\x1e".join(parts)

    def check(self, data: bytes) -> bool:
        from zo_finetune import outcomes
        from zo_finetune.errors import UserError
        from zo_finetune.evaluate import describe
        from zo_finetune.intervals import measured
        from zo_finetune.run_folder import Evaluations, Log
        from zo_finetune.tasks import get_task

        names = ("config.json", "result.json", "evaluations.jsonl", "log.csv", outcomes.AFTER)
        for name, content in zip(names, data.split(b"\x1e"), strict=False):
            if content or name == "config.json":
                (self._path / name).write_bytes(content)
            else:
                (self._path / name).unlink(missing_ok=True)
        task = get_task("sst2")
        evaluations = Evaluations(self._path / "evaluations.jsonl", task)
        before, history = evaluations.recover(2)
        assert evaluations.recover(2) == (before, history) or math.nan in walk([before, history])
        assert all(type(e["step"]) is int and e["step"] < 2 for e in history)
        for e in history + [before] * (before is not None):
            assert describe(task, e)
        seconds = Log.seconds(self._path / "log.csv")
        assert all(type(k) is int and 0 <= x < math.inf for k, x in seconds.items())
        with contextlib.suppress(UserError):
            found = outcomes.read(self._path / outcomes.AFTER)
            if found is not None and found.scores is not None and found.scores.shape[1] == 2:
                once = found.rows[None] * 0.0 + 1.0
                assert all(len(measured(name, found, once)) == 1 for name in ("accuracy", "auc", "loss"))
        return self._resume()

    def _resume(self) -> bool:
        from zo_finetune import run
        from zo_finetune.config import Config
        from zo_finetune.errors import UserError

        class Loading(Exception):
            pass

        def load(config: Config, **more: Any) -> Any:
            raise Loading(config)

        with mock.patch.object(run, "load", load), contextlib.redirect_stderr(io.StringIO()):
            try:
                result = run.resume(str(self._path))
            except UserError as error:
                assert str(error)
                return False
            except Loading as loading:
                (config,) = loading.args
                said = json.loads((self._path / "config.json").read_text(encoding="utf-8"))["config"]
                placed = {"model", "data", "output", "language_texts"}  # absolute, where there is such a thing
                assert {k: v for k, v in dataclasses.asdict(config).items() if k not in placed} == {
                    k: v for k, v in said.items() if k not in placed
                }
                checked(config)
                return True
        assert result["interrupted"] is False
        assert f"{result['before']['accuracy']:.4f} {result['after']['accuracy']:.4f} {result['steps']}"  # what the command says
        return True


def walk(value: Any) -> Iterator[Any]:
    """The leaves of a JSON value, with one and the same object for every NaN."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from walk(item)
    else:
        yield math.nan if value != value else value


def checked(config: Any) -> None:
    """What a run relies on in a configuration that was accepted."""
    for name in ("lr", "eps", "clip", "weight_decay"):
        assert (value := getattr(config, name)) is None or 0 <= float(value) < math.inf
    assert config.steps > 0 and config.batch_size > 0
    assert 0 <= config.seed < 1 << 64


class Rows(Target):
    """A row of a data file, as any JSON value, through a task: an example, or a `RowError`."""

    name = "rows"

    def __init__(self) -> None:
        from zo_finetune.tasks import get_task

        self._task = get_task("sst2")

    def seeds(self) -> list[bytes]:
        rows: list[Any] = [
            {"sentence": "a film", "label": 1},
            {"sentence": "ü\n", "label": "negative"},
            {"sentence": "x", "label": 0.0},
        ]
        return [json.dumps(row).encode() for row in rows]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(data, rng)
        try:
            return json.dumps(mutate_json(json.loads(data), rng)).encode()
        except (ValueError, RecursionError):
            return rng.choice(self.seeds())

    def check(self, data: bytes) -> bool:
        from zo_finetune.tasks.base import RowError

        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(row, dict):
            row = {"sentence": row, "label": row}
        row = {name: row.get(name) for name in self._task.fields}  # examples_of gives a task its fields, whatever they hold
        accepted = set()
        for form in self._task.forms:
            try:
                example = self._task.example(row, form)
                assert 0 <= example.label < len(example.candidates)
                assert all(c.context and c.answer for c in example.candidates)
                accepted.add(True)
            except RowError as error:
                assert str(error)
                accepted.add(False)
        return True in accepted


class Tables(Target):
    """A data file: its first byte says of which format, the others are its content. (parquet is read by pyarrow, which its own project fuzzes; of
    Arrow's format and of packed files, pyarrow reads what is looked at here first.)"""

    name = "tables"
    suffixes = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".jsonl.gz", ".csv.zst")

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        self._folder.cleanup()

    def seeds(self) -> list[bytes]:
        contents = (
            '{"sentence": "fine", "label": 1}\n\n{"label": null, "sentence": "ü"}\n',
            '[{"sentence": "fine", "label": 1}, {"sentence": "dull"}]',
            '{"sentence": ["fine", "dull"], "label": [1, 0]}',
            'sentence,label\r\n"one, ""two""\nthree",1\r\nNA,0\r\n',
            'sentence\tlabel\n"an odd quote\t1\n\n"a ""word"""\t0\n',
        )
        kinds = (0, 1, 1, 2, 3)
        texts = [bytes([kind]) + content.encode() for kind, content in zip(kinds, contents, strict=True)]
        return [*texts, b"\x02" + contents[3].encode("utf-16"), *self.packed_seeds(contents)]

    @staticmethod
    def packed_seeds(contents: Sequence[str]) -> list[bytes]:
        import pyarrow
        from pyarrow import ipc

        row = {"sentence": "fine", "label": 1, "extra": [{"a": [1.5, None]}]}
        table = pyarrow.Table.from_pylist([row, {**row, "sentence": None}, row])
        coded = table.set_column(0, "sentence", table["sentence"].dictionary_encode())
        found = []
        for maker, rows, codec in ((ipc.new_stream, table, None), (ipc.new_file, table, "lz4"), (ipc.new_file, coded, None)):
            sink = pyarrow.BufferOutputStream()
            with maker(sink, rows.schema, options=ipc.IpcWriteOptions(compression=codec)) as writer:
                writer.write_table(rows)
            found.append(b"\x04" + sink.getvalue().to_pybytes())
        for kind, codec, content in ((5, "gzip", contents[0]), (6, "zstd", contents[3])):
            found.append(bytes([kind]) + pyarrow.compress(content.encode(), codec=codec, asbytes=True))
        return found

    def check(self, data: bytes) -> bool:
        from zo_finetune.errors import UserError
        from zo_finetune.tables import read_table

        path = Path(self._folder.name) / f"a{self.suffixes[data[0] % len(self.suffixes) if data else 0]}"
        path.write_bytes(data[1:])
        for keep in (None, {"sentence", "label"}):
            try:
                table = read_table(path, keep)
            except UserError as error:
                assert str(error).isprintable()
                if keep is None:
                    continue
                return False
            assert len(table) > 0 and len(table.lines) in (len(table), 0)
            assert all(len(values) == len(table.kept) for values in table.values)
            assert sorted(table.lines) == table.lines
            assert table.row(0).keys() == set(table.kept) <= set(table.column_names)
        return True


TARGETS: dict[str, type[Target]] = {
    cls.name: cls for cls in (Journal, Factors, Start, Masks, Scales, Options, Folder, Rows, Tables)
}
