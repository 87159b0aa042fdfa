"""Small journals, and a second reader, written from docs/journal.md alone: it shares no line with the library's."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import torch

from zo_kernels import journal, stream_of

WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4) / 8,
    "a.bias": torch.linspace(-1, 1, 5, dtype=torch.float16),
    "b.weight": torch.full((2, 3), 0.1, dtype=torch.bfloat16),
}


def header(mode: str = "scratch", groups: int = 1, terms: int = 1, **changes: Any) -> journal.Header:
    table = [journal.Parameter.of(n, p, stream_of(n), k % groups) for k, (n, p) in enumerate(WEIGHTS.items())]
    options: dict[str, Any] = {"run": "00112233445566778899aabbccddeeff", "versions": {"zo_kernels": "x"}, **changes}
    return journal.Header(2**64 - 3, tuple(table), perturbation=mode, groups=groups, terms=terms, **options)


def coefficient(k: int, group: int, term: int) -> float:
    """Distinct for every record, group and term, and exact in fp32."""
    return (k * 64 + group * 8 + term + 1) / 1024


def append(writer: journal.Writer, k: int) -> None:
    """Record k of the sample run."""
    head = writer.header
    G, T = head.groups, head.terms
    skipped = k % 5 == 3
    coefs = [[0.0 if skipped else coefficient(k, g, t) for t in range(T)] for g in range(G)]
    decay = None if skipped else [1 - 2.0**-k if k < 20 else 1.0] * G
    eps = None if head.perturbation == "scratch" else [2.0**-10] * G
    writer.append(k * T + k // 2, coefs, decay=decay, eps=eps, loss=k / 4, gradient=-k / 8, skipped=skipped, stochastic=k % 2 == 0)


def write(path: Path, records: int, head: journal.Header | None = None) -> bytes:
    with journal.create(path, head or header(), fsync_every=0) as writer:
        for k in range(records):
            append(writer, k)
    return path.read_bytes()


def second_reader(data: bytes) -> tuple[dict[str, Any], list[tuple[Any, ...]], int]:
    """(header, records as tuples of numbers, bytes read): the reader of docs/journal.md."""
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"\x89ZOJ\r\n\x1a\n", 1)
    start = 16 + length + 4
    head_crc = zlib.crc32(data[: 16 + length])
    assert struct.unpack_from("<I", data, 16 + length)[0] == head_crc
    head = json.loads(data[16 : 16 + length])
    per_group = head["terms"] + (1 if head["perturbation"] == "scratch" else 2)
    record = struct.Struct(f"<IIff{head['groups'] * per_group}fI")
    rows: list[tuple[Any, ...]] = []
    while start + record.size <= len(data):
        body = data[start : start + record.size]
        *row, crc = record.unpack(body)
        if zlib.crc32(body[:-4], zlib.crc32(struct.pack("<Q", len(rows)), head_crc)) != crc:
            break
        rows.append(tuple(row))
        start += record.size
    return head, rows, start
