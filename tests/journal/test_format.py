"""What is written is read, and nothing else is: round trips, sizes, every truncation, every bit, every misplaced record."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zo_kernels as zk
from tests.journal.samples import WEIGHTS, append, coefficient, header, second_reader, write
from zo_kernels import journal
from zo_kernels.journal import header as journal_header
from zo_kernels.journal import reader

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    G, T = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(journal.PERTURBATIONS))
    numbers = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    scalars = st.none() | st.booleans() | numbers | st.text('aü\n"\x00\U0001f600')
    json_values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text("abc"), v), max_leaves=8)
    head = header(
        mode, G, T, hyperparameters=draw(st.dictionaries(st.text("lr"), json_values, max_size=3)), notes=draw(json_values),
        kind=draw(st.sampled_from(["gaussian", "rademacher"])), frozen=(journal.Frozen.of("base", torch.ones(3, dtype=torch.int8)),),
        buffers=tuple(journal.Frozen.of(f"buffer{k}", torch.arange(k, dtype=torch.int32)) for k in range(draw(st.integers(0, 2)))),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("journal") / "run.zoj"
    wanted = []
    tag = 0
    with journal.create(path, head, fsync_every=draw(st.integers(0, 3))) as writer:
        for _ in range(draw(st.integers(0, 6))):
            tag += draw(st.integers(0, 2**20))
            skipped, clipped, stochastic, flushed = (draw(st.booleans()) for _ in range(4))
            failed = None if mode == "scratch" or skipped else draw(st.sampled_from((None, "plus", "minus")))
            still = skipped or failed
            coefs = [[0.0 if still else draw(fp32) for _ in range(T)] for _ in range(G)]
            decay = [1.0 if still else draw(fp32) for _ in range(G)]
            eps = None if mode == "scratch" else [draw(st.floats(2.0**-40, 1, width=32)) for _ in range(G)]
            loss, gradient = draw(st.floats(width=32)), draw(st.floats(width=32))
            writer.append(
                tag,
                coefs,
                decay=decay,
                eps=eps,
                loss=loss,
                gradient=gradient,
                skipped=skipped,
                clipped=clipped,
                stochastic=stochastic,
                flushed=flushed,
                failed=failed,
            )
            flags = (skipped, clipped, stochastic, flushed, failed == "plus", failed == "minus")
            wanted.append((tag, flags, loss, gradient, coefs, decay, eps))
            tag += 0 if failed else T
    got = journal.read(path)
    assert got.header == head
    assert got.header.fingerprint == journal.fingerprint([*WEIGHTS.items(), ("base", torch.ones(3, dtype=torch.int8))])
    assert got.tail is None and got.end == path.stat().st_size
    assert len(got) == len(wanted)
    assert got.next_tag == tag if wanted else got.next_tag == 0
    assert len(got.steps) == sum(not any(flags[4:]) for _, flags, *_ in wanted)
    for k, (tag, flags, loss, gradient, coefs, decay, eps) in enumerate(wanted):
        r = got.records[k]
        assert r["tag"] == tag
        assert tuple(bool(got.flag(name)[k]) for name in journal.FLAGS) == flags
        assert np.float32(loss).tobytes() == r["loss"].tobytes() or math.isnan(loss)
        assert np.float32(gradient).tobytes() == r["gradient"].tobytes() or math.isnan(gradient)
        assert r["groups"]["coef"].tobytes() == np.array(coefs, np.float32).tobytes()
        assert r["groups"]["decay"].tobytes() == np.array(decay, np.float32).tobytes()
        if eps is not None:
            assert r["groups"]["eps"].tobytes() == np.array(eps, np.float32).tobytes()
    assert len(second_reader(path.read_bytes())[1]) == len(wanted)


def test_sizes(tmp_path: Path) -> None:
    """At most 32 bytes a record for plain MeZO; 20,000 steps and 400 parameters under 1 MB."""
    sizes = {(mode, G): header(mode, G).record.itemsize for mode in journal.PERTURBATIONS for G in (1, 2)}
    assert sizes == {
        ("scratch", 1): 28,
        ("scratch", 2): 36,
        ("inplace", 1): 32,
        ("inplace", 2): 44,
        ("lazy", 1): 32,
        ("lazy", 2): 44,
    }
    entry = header().parameters[0]
    name = "model.decoder.layers.{}.self_attn.out_proj.weight"
    table = tuple(journal.Parameter(name.format(k), (2048, 2048), "float16", entry.sha256, stream=k) for k in range(400))
    head = journal.Header(0, table).encode()
    assert len(head) + 20_000 * 32 < 1_000_000


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """Against numbers computed here, not by the library: a changed layout must change this test and the format's version."""
    data = write(tmp_path / "run.zoj", 3, header("inplace", groups=2, terms=2))
    head, rows, end = second_reader(data)
    assert end == len(data)
    assert head["seed"] == 2**64 - 3 and head["contract"] == 1
    assert head["parameters"][0]["sha256"] == hashlib.sha256(WEIGHTS["a.weight"].numpy().tobytes()).hexdigest()
    lines = b"".join(
        json.dumps([p["name"], p["dtype"], p["shape"], p["sha256"]], separators=(",", ":")).encode() + b"\n"
        for p in sorted(head["parameters"], key=lambda p: p["name"])
    )
    assert head["fingerprint"] == hashlib.sha256(lines).hexdigest()
    c = [[coefficient(2, g, t) for t in range(2)] for g in range(2)]
    assert rows[2] == (5, 4, 0.5, -0.25, 0.75, 2.0**-10, *c[0], 0.75, 2.0**-10, *c[1])


def test_the_documented_reader_reads(tmp_path: Path) -> None:
    """The code of docs/journal.md, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "journal.md").read_text()
    (code,) = re.findall(r"```python\n(import json.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    for mode, G, T in [("scratch", 1, 1), ("lazy", 2, 3)]:
        data = write(tmp_path / f"{mode}.zoj", 4, header(mode, G, T))
        assert found["read_journal"](data + b"x" * 30) == second_reader(data)[:2]


def test_every_truncation_gives_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "run.zoj"
    data = write(path, 4, header("lazy"))
    whole = journal.loads(data)
    size = whole.header.record.itemsize
    for length in range(len(data)):
        cut = data[:length]
        if length < whole.start:
            with pytest.raises(journal.DamagedError) as refused:
                journal.loads(cut, strict=False)
            assert refused.value.offset <= length and "no step was recorded" in str(refused.value)
            continue
        n, left = divmod(length - whole.start, size)
        got = journal.loads(cut, strict=False)
        assert got.records.tobytes() == whole.records[:n].tobytes()
        if left:
            assert got.tail == journal.Tail(length - left, left, f"{left} of the {size} bytes of record {n}")
            with pytest.raises(journal.TornError, match=f"at byte {length - left}") as torn:
                journal.loads(cut)
            assert torn.value.offset == length - left
        else:
            assert got.tail is None
        path.write_bytes(cut)
        assert journal.recover(path) == got.tail
        assert path.read_bytes() == cut[: length - left]
        assert journal.recover(path) is None


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the header: refused. In a record that others follow: refused, with its offset. In the last record: cut."""
    path = tmp_path / "run.zoj"
    data = write(path, 3)
    whole = journal.loads(data)
    size = whole.header.record.itemsize
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        hit = (bit // 8 - whole.start) // size
        if hit == 2:
            got = journal.loads(bytes(damaged), strict=False)
            assert got.tail == journal.Tail(whole.end - size, size, "record 2 fails its checksum")
            assert got.records.tobytes() == whole.records[:2].tobytes()
            continue
        with pytest.raises(journal.DamagedError) as refused:
            journal.loads(bytes(damaged), strict=False)
        assert not isinstance(refused.value, journal.TornError)
        if hit >= 0:
            assert refused.value.offset == whole.start + hit * size
            assert f"recover(path, keep={hit})" in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))  # as from a worker process
    assert (str(again), again.offset) == (str(refused.value), refused.value.offset)
    # The remedy that the message names
    damaged = bytearray(data)
    damaged[whole.start + size + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(journal.DamagedError, match="fails its checksum"):
        journal.recover(path)
    with pytest.raises(journal.DamagedError, match="only its first 1 records are good"):
        journal.recover(path, keep=2)
    assert path.read_bytes() == damaged
    assert journal.recover(path, keep=1) == journal.Tail(whole.start + size, 2 * size, "all that follows 1 records")
    assert journal.read(path).records.tobytes() == whole.records[:1].tobytes()


def test_records_have_their_place(tmp_path: Path) -> None:
    """Swapped, repeated, removed, shifted, or from another run with the same settings."""
    data = write(tmp_path / "run.zoj", 6)
    other = write(tmp_path / "other.zoj", 6, header(run="f" * 32))
    whole = journal.loads(data)
    start, size = whole.start, whole.header.record.itemsize
    records = [data[start + k * size : start + (k + 1) * size] for k in range(6)]
    foreign = other[start : start + size]

    def offset_of(*parts: bytes) -> int:
        with pytest.raises(journal.DamagedError) as refused:
            journal.loads(data[:start] + b"".join(parts), strict=False)
        assert not isinstance(refused.value, journal.TornError)
        return refused.value.offset

    r = records
    for k in range(4):
        assert offset_of(*r[:k], r[k + 1], r[k], *r[k + 2 :]) == start + k * size
        assert offset_of(*r[:k], r[k], r[k], *r[k + 1 :]) == start + (k + 1) * size
        assert offset_of(*r[:k], *r[k + 1 :]) == start + k * size
        assert offset_of(*r[:k], b"\0", *r[k:]) == start + k * size
        assert offset_of(*r[:k], foreign, *r[k + 1 :]) == start + k * size
        assert offset_of(*r[:k], bytes(size), *r[k + 1 :]) == start + k * size
    assert journal.loads(data[:start] + b"".join([*r, r[5]]), strict=False).tail.reason == "record 6 fails its checksum"  # type: ignore[union-attr]
    assert other[start : start + size - 4] == records[0][:-4]  # the same content, another checksum
    assert foreign != records[0]


@pytest.mark.parametrize("zeros", [1, 27, 28, 29, 4096, 3 << 20])
def test_zeros_of_a_crashed_file_system_are_a_torn_tail(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "run.zoj"
    data = write(path, 3)
    for piece in (b"", data[-28:-1] + b"\x01"):
        torn = data + piece + bytes(zeros)
        path.write_bytes(torn)
        tail = journal.read(path, strict=False).tail
        assert tail is not None and (tail.offset, tail.length) == (len(data), len(torn) - len(data))
        assert journal.recover(path) == tail
        assert path.read_bytes() == data
    path.write_bytes(data + bytes(zeros) + b"\x01" + bytes(28))
    if zeros >= 28:
        with pytest.raises(journal.DamagedError, match="something changed the file"):
            journal.recover(path)


def test_a_sparse_terabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "run.zoj"
    write(path, 2)
    try:
        with path.open("r+b") as file:
            file.truncate(1 << 40)
    except OSError:
        pytest.skip("this file system has no sparse files of that size")
    with pytest.raises(journal.DamagedError, match="something changed the file"):
        journal.read(path, strict=False)


# ---- headers ----------------------------------------------------------------------------------------------------------


def sealed(content: Any, version: int = 1, text: bytes | None = None) -> bytes:
    """A file with this header, and a good checksum."""
    text = json.dumps(content).encode() if text is None else text
    head = struct.pack("<8sII", journal.MAGIC, version, len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


def content(**changes: Any) -> dict[str, Any]:
    data = header().encode()
    return {**json.loads(data[16:-4]), **changes}


def entries(**changes: Any) -> list[dict[str, Any]]:
    first, *rest = content()["parameters"]
    return [{k: v for k, v in {**first, **changes}.items() if v is not None}, *rest]


BAD_HEADERS = {
    "another contract": (content(contract=2), "noise contract 2"),
    "no contract": (content(contract=None), "noise contract None"),
    "kind": (content(kind="cauchy"), "kind='cauchy'"),
    "mode": (content(perturbation="x"), "perturbation='x'"),
    "seed": (content(seed=1 << 64), "seed="),
    "a float seed": (content(seed=1.0), "seed=1.0"),
    "no groups": (content(groups=0), "groups=0 must be in"),
    "many groups": (content(groups=1 << 31), "groups=2147483648 must be in"),
    "many terms": (content(terms=1 << 20), "terms=1048576 must be in"),
    "a huge record": (content(groups=1 << 12, terms=1 << 16), "records of more than"),
    "true": (content(terms=True), "terms=True"),
    "run": (content(run="x"), "run='x'"),
    "a list": ([], "not a JSON object"),
    "parameters": (content(parameters={}), "parameters is not a list"),
    "no parameters": (content(parameters=[]), "parameters is empty"),
    "an entry": (content(parameters=[1]), "not an object"),
    "two names": (content(parameters=entries() + entries()[:1]), "'a.weight' occurs twice"),
    "two streams": (content(parameters=entries(name="c") + entries()[:1]), "its stream .* is another parameter's"),
    "frozen and trained": (content(frozen=[entries()[0]]), "'a.weight' occurs twice"),
    "buffers": (content(buffers={}), "buffers is not a list"),
    "a buffer": (content(buffers=[1]), "not an object"),
    "a buffer without digest": (content(buffers=[{"name": "q", "shape": [1], "dtype": "int8"}]), "'q' has no 'sha256'"),
    "a buffer's digest": (content(buffers=[{"name": "q", "shape": [1], "dtype": "int8", "sha256": "x"}]), "must be a SHA-256"),
    "a buffer's shape": (content(buffers=[{"name": "q", "shape": [-1], "dtype": "int8", "sha256": "0" * 64}]), "shape=-1"),
    "a trained buffer": (content(buffers=[entries()[0]]), "'a.weight' occurs twice"),
    "a long name": (content(parameters=entries(name="n" * 4097)), "must be 1 to 4096 bytes"),
    "an empty name": (content(parameters=entries(name="")), "must be 1 to 4096 bytes"),
    "half a character": (content(parameters=entries(name="\ud800")), "surrogates not allowed"),
    "a huge shape": (content(parameters=entries(shape=[1 << 40, 1 << 40])), "more than 2\\^56"),
    "a negative shape": (content(parameters=entries(shape=[-1])), "shape=-1"),
    "many dimensions": (content(parameters=entries(shape=[1] * 65)), "65 dimensions"),
    "dtype": (content(parameters=entries(dtype="float64")), "dtype='float64'"),
    "group": (content(parameters=entries(group=1)), "group=1, but there are 1"),
    "digest": (content(parameters=entries(sha256="0" * 63)), "must be a SHA-256"),
    "another digest": (content(parameters=entries(sha256="0" * 64)), "fingerprint is not that"),
    "no stream": (content(parameters=entries(stream=None)), "has no 'stream'"),
    "a mask": (content(parameters=entries(mask={"exec": "1"})), "the mask has the keys"),
    "a mask that is a number": (content(parameters=entries(mask=3)), "mask is not an object"),
    "a scale": (content(parameters=entries(scale={"value": 1e39})), "scale value=1e\\+39"),
    "no kind": ({k: v for k, v in content().items() if k != "kind"}, "the header has no 'kind'"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(name: str) -> None:
    bad, message = BAD_HEADERS[name]
    with pytest.raises(journal.DamagedError, match=message) as refused:
        journal.loads(sealed(bad))
    assert refused.value.offset == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"seed":NaN}', "NaN is no JSON"),
        (b'{"seed":1e999}', "beyond float64"),
        (b'{"seed":1,"seed":2}', "a key occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed":' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe", "codec"),
        (b"", "Expecting value"),
    ],
)
def test_text_that_is_no_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(journal.DamagedError, match=message):
        journal.loads(sealed(None, text=text))


def test_what_a_reader_refuses_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_to_memory()
    for data, message, offset in [
        (b"PK\x03\x04" + bytes(100), "no journal", 0),
        (b"", "inside its header", 0),
        (struct.pack("<8sII", journal.MAGIC, 2, 10) + bytes(50), "journal format 2", 8),
        (struct.pack("<8sII", journal.MAGIC, 1, 2**32 - 1) + bytes(50), "claims 4294967295 bytes", 12),
        (struct.pack("<8sII", journal.MAGIC, 1, 1 << 20) + bytes(50), "ends after 66 of its header's", 66),
        (good.replace(b"\r\n", b"\n"), "no journal", 0),
    ]:
        with pytest.raises(journal.DamagedError, match=message) as refused:
            journal.loads(data)
        assert refused.value.offset == offset


def write_to_memory() -> bytes:
    return header().encode()


def test_unknown_keys_are_kept_and_not_obeyed() -> None:
    table = entries(colour="red")
    got = journal.loads(sealed(content(__import__="os", new={"a": [1]}, parameters=table))).header
    assert got.extra == {"__import__": "os", "new": {"a": [1]}}
    assert got.parameters[0].extra == {"colour": "red"}
    again = journal.loads(got.encode()).header
    assert again == got


def test_records_that_no_writer_writes_are_refused() -> None:
    """Good checksums, impossible content: a faulty or hostile writer."""
    head = header("inplace")
    data = head.encode()
    crc = struct.unpack("<I", data[-4:])[0]

    def refused(*rows: tuple[Any, ...]) -> str:
        file = data
        for k, row in enumerate(rows):
            body = struct.pack("<IIfffff", *row)
            file += body + struct.pack("<I", zlib.crc32(body, zlib.crc32(struct.pack("<Q", k), crc)))
        with pytest.raises(journal.DamagedError) as error:
            journal.loads(file)
        assert error.value.offset == len(data) + (len(rows) - 1) * 32
        return str(error.value)

    good = (0, 0, 0.5, 2.0, 1.0, 1e-3, 0.25)
    assert "flags that this version" in refused(good, (1, 64, 0.5, 2.0, 1.0, 1e-3, 0.25))
    assert "not finite" in refused(good, (1, 0, 0.5, 2.0, 1.0, 1e-3, math.nan))
    assert "not finite" in refused((0, 0, 0.5, 2.0, math.inf, 1e-3, 0.25))
    assert "although it was skipped" in refused(good, (1, 1, 0.5, 2.0, 1.0, 1e-3, 0.25))
    assert "although it was skipped" in refused(good, (1, 1, 0.5, 2.0, 0.5, 1e-3, 0.0))
    assert "although it failed" in refused(good, (1, 16, 0.5, 2.0, 1.0, 1e-3, 0.25))
    for flags in (16 + 32, 1 + 16):
        assert "exclude each other" in refused(good, (1, flags, 0.5, 2.0, 1.0, 1e-3, 0.0))
    assert "used before" in refused(good, good)
    failed = (1, 32, 0.5, 2.0, 1.0, 1e-3, 0.0)
    assert "used before" in refused(good, failed, failed, good)
    assert "eps that is not positive" in refused((0, 0, 0.5, 2.0, 1.0, 0.0, 0.25))


def test_tags_of_steps_do_not_overlap() -> None:
    """A step with three terms has three tags: the next begins behind them, and what begins among them would repeat a direction."""
    data = header(terms=3).encode()

    def file(second: int) -> bytes:
        made = data
        for k, tag in enumerate((4, second)):
            body = struct.pack("<IIffffff", tag, 0, 0.5, 2.0, 1.0, 0.25, 0.25, 0.25)
            made += body + struct.pack("<I", zlib.crc32(body, zlib.crc32(struct.pack("<Q", k), struct.unpack("<I", data[-4:])[0])))
        return made

    assert len(journal.loads(file(7))) == 2
    for second in (4, 5, 6):
        with pytest.raises(journal.DamagedError, match=r"record 1 .* a tag that was used before"):
            journal.loads(file(second))


def test_records_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is checked with its own place, whatever was read before it."""
    path = tmp_path / "run.zoj"
    whole = journal.loads(write(path, 11))
    monkeypatch.setattr(reader, "CHUNK", 3 * whole.header.record.itemsize)
    again = journal.read(path)
    assert again.records.tobytes() == whole.records.tobytes() and again.tail is None
    damaged = bytearray(path.read_bytes())
    damaged[whole.start + 7 * whole.header.record.itemsize] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(journal.DamagedError, match="record 7 at byte"):
        journal.read(path)


@pytest.mark.parametrize("flags", [16, 32])
def test_no_step_fails_in_scratch_mode(flags: int) -> None:
    """There a failed step has changed nothing, and a record of it would use up its place: neither written nor read."""
    data, body = header().encode(), struct.pack("<IIffff", 0, flags, 0.5, 2.0, 1.0, 0.0)
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<Q", 0), struct.unpack("<I", data[-4:])[0]))
    with pytest.raises(journal.DamagedError, match=r"record 0 .* flags that exclude each other"):
        journal.loads(data + body + struct.pack("<I", crc))


@pytest.mark.parametrize("terms", [2, 3])
def test_the_last_direction_has_the_last_tag(tmp_path: Path, terms: int) -> None:
    """A step's tags are tag .. tag + terms - 1, all of 32 bits: beyond them noise would begin again with that of the first steps."""
    last = 2**32 - terms
    head = header(terms=terms)
    with journal.create(tmp_path / "run.zoj", head) as writer:
        with pytest.raises(ValueError, match=f"tag={last + 1} .* below 2\\^32"):
            writer.append(last + 1, [[0.5] * terms])
        writer.append(last, [[0.5] * terms])
    data = (tmp_path / "run.zoj").read_bytes()
    assert journal.loads(data).next_tag == 2**32
    start = len(head.encode())
    body = struct.pack("<I", last + 1) + data[start + 4 : -4]
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<Q", 0), struct.unpack("<I", data[start - 4 : start])[0]))
    with pytest.raises(journal.DamagedError, match="tags beyond 2\\^32"):
        journal.loads(data[:start] + body + struct.pack("<I", crc))


# ---- the starting weights ---------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_all_and_only_on_that() -> None:
    base = journal.fingerprint(WEIGHTS.items())
    assert base == journal.fingerprint(reversed(list(WEIGHTS.items())))
    noncontiguous = {**WEIGHTS, "a.weight": WEIGHTS["a.weight"].t().contiguous().t()}
    assert not noncontiguous["a.weight"].is_contiguous()
    assert base == journal.fingerprint(noncontiguous.items())
    changed = {
        "value": {**WEIGHTS, "a.bias": WEIGHTS["a.bias"] + 1},
        "shape": {**WEIGHTS, "a.weight": WEIGHTS["a.weight"].view(4, 3)},
        "dtype": {**WEIGHTS, "a.bias": WEIGHTS["a.bias"].view(torch.bfloat16)},
        "name": {("x" if n == "a.bias" else n): p for n, p in WEIGHTS.items()},
        "missing": {n: p for n, p in WEIGHTS.items() if n != "a.bias"},
    }
    prints = {base, *(journal.fingerprint(w.items()) for w in changed.values())}
    assert len(prints) == 1 + len(changed)


def test_digest_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(1001)
    assert journal.digest(t) == hashlib.sha256(t.numpy().tobytes()).hexdigest()
    whole = journal.digest(t)
    monkeypatch.setattr(journal_header, "CHUNK", 7)
    assert journal.digest(t) == whole
    assert journal.digest(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    assert journal.digest(torch.tensor(1.0)) == hashlib.sha256(np.float32(1).tobytes()).hexdigest()
    with pytest.raises(TypeError, match="no plain bytes"):
        journal.digest(torch.empty(3, device="meta"))


@pytest.mark.gpu
def test_fingerprint_on_a_gpu() -> None:
    assert journal.fingerprint((n, p.cuda()) for n, p in WEIGHTS.items()) == journal.fingerprint(WEIGHTS.items())


def test_verify_base_names_the_first_difference() -> None:
    frozen = torch.arange(4, dtype=torch.int8)
    head = header(frozen=(journal.Frozen.of("quantised", frozen),), hyperparameters={"model": "facebook/opt-1.3b"})
    good = {**WEIGHTS, "quantised": frozen, "more": torch.ones(2)}
    journal.verify_base(head, good.items())
    journal.verify_base(head, ((f"module.{n}", p) for n, p in good.items()))
    for changes, message in [
        ({"a.bias": None}, "'a.bias' is missing; load the base model 'facebook/opt-1.3b'"),
        ({"a.bias": torch.zeros(4, dtype=torch.float16)}, "'a.bias' has shape \\(4,\\), the run's had \\(5,\\)"),
        ({"b.weight": torch.zeros(2, 3)}, "'b.weight' has dtype float32, the run's had bfloat16"),
        ({"a.weight": WEIGHTS["a.weight"] + 1, "a.bias": WEIGHTS["a.bias"] + 1}, "'a.weight' has other values"),
        ({"a.weight": torch.where(WEIGHTS["a.weight"] == 0, -0.0, WEIGHTS["a.weight"])}, "'a.weight' has other values"),
        ({"quantised": frozen + 1}, "'quantised' has other values"),
    ]:
        wrong = {n: p for n, p in {**good, **changes}.items() if p is not None}
        with pytest.raises(ValueError, match=message):
            journal.verify_base(head, wrong.items())
    twice = {n: p for n, p in good.items() if n != "a.bias"}
    twice |= {"module.a.bias": WEIGHTS["a.bias"], "_orig_mod.a.bias": WEIGHTS["a.bias"]}
    with pytest.raises(ValueError, match=r"'a.bias' is ambiguous"):
        journal.verify_base(head, twice.items())


def test_a_journal_without_buffers_has_no_such_field() -> None:
    """As those that were written before there was one: the same bytes, the same header."""
    assert "buffers" not in content()
    with_one = header(buffers=(journal.Frozen.of("q", torch.ones(3, dtype=torch.int8)),))
    data = json.loads(with_one.encode()[16:-4])
    assert data["buffers"] == [
        {"name": "q", "shape": [3], "dtype": "int8", "sha256": journal.digest(torch.ones(3, dtype=torch.int8))}
    ]
    assert journal.Header.parse(json.dumps(data).encode()) == with_one
    assert data["fingerprint"] == content()["fingerprint"], "of parameters and frozen weights, so that older versions read it"
    del data["buffers"]
    assert journal.Header.parse(json.dumps(data).encode()).buffers == ()


def test_verify_base_looks_at_buffers_where_it_is_given_some() -> None:
    packed = torch.arange(4, dtype=torch.int32)
    head = header(buffers=(journal.Frozen.of("layer.qweight", packed),))
    journal.verify_base(head, WEIGHTS.items())
    journal.verify_base(head, WEIGHTS.items(), [("module.layer.qweight", packed), ("cache", torch.ones(2))])
    for buffers, message in (
        ({}, "buffer 'layer.qweight' is missing"),
        ({"layer.qweight": packed + 1}, "buffer 'layer.qweight' has other values"),
        ({"layer.qweight": packed[:3]}, r"buffer 'layer.qweight' has shape \(3,\)"),
        ({"layer.qweight": packed.long()}, "buffer 'layer.qweight' has dtype int64"),
    ):
        with pytest.raises(ValueError, match=message):
            journal.verify_base(head, WEIGHTS.items(), buffers.items())


def test_masks_and_scales_are_described(tmp_path: Path) -> None:
    t, keep = torch.ones(5, 4), torch.arange(20).view(5, 4) % 3 == 0
    rows = torch.arange(5, dtype=torch.float32)
    of = journal.Parameter.of
    assert of("w", t, 1, mask=zk.RandomMask(0.25, tag=9)).mask == {"keep": 1 << 30, "tag": 9}
    assert of("w", t, 1, mask=zk.RandomMask(1.0)).mask is None
    stored = of("w", t, 1, mask=keep, scale=rows)
    assert stored.mask == {"sha256": hashlib.sha256(zk.pack_mask(keep).numpy().tobytes()).hexdigest()}
    assert stored.mask == of("w", t, 1, mask=zk.pack_mask(keep)).mask
    assert stored.scale == {"sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(), "values": 5, "block": 4}
    assert of("w", t, 1, scale=0.5).scale == {"value": 0.5}
    for p in (stored, of("w", t, 1, mask=zk.RandomMask(0.25, tag=9), scale=0.5)):
        head = journal.Header(0, (p,))
        assert journal.loads(head.encode()).header == head
    with pytest.raises(ValueError, match="mask of w has shape"):
        of("w", t, 1, mask=keep[1:])


def test_a_header_that_is_no_json_is_refused_before_anything(tmp_path: Path) -> None:
    path = tmp_path / "run.zoj"
    nested: list[Any] = []
    nested.append(nested)
    for changes, message in [
        ({"hyperparameters": {"lr": math.nan}}, "cannot be written as JSON"),
        ({"hyperparameters": {"f": print}}, "cannot be written as JSON"),
        ({"notes": nested}, "cannot be written as JSON"),
        ({"notes": "\ud800"}, "cannot be written as JSON"),
        ({"notes": "x" * (journal.MAX_HEADER + 1)}, "at most 16777216 are allowed"),
    ]:
        with pytest.raises(ValueError, match=message):
            journal.create(path, header(**changes))
        assert not path.exists()
    with pytest.raises(TypeError, match="JSON objects"):
        header(hyperparameters=[1])


def test_a_live_journal_can_be_read(tmp_path: Path) -> None:
    with journal.create(tmp_path / "run.zoj", header()) as writer:
        for k in range(5):
            append(writer, k)
            assert len(journal.read(tmp_path / "run.zoj")) == k + 1
        with pytest.raises(ValueError, match="read-only"):
            journal.read(tmp_path / "run.zoj").records["tag"][0] = 1
