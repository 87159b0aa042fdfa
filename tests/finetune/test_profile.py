"""`zo-finetune profile`: bytes that can be known beforehand, rows that fail alone, what is refused.

Belongs here: profile.py, measure.py and shapes.py. Does not belong here: what the library keeps (tests/optim/test_memory.py).
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from zo_finetune import measure, profile, shapes
from zo_finetune.cli import main
from zo_finetune.config import Profile

from zo_kernels.views.memory import default_scratch_bytes

SMALL = {
    "model_type": "gpt2",
    "vocab_size": 600,
    "n_embd": 128,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FEW = 1 << 16  # bytes for numbers, tables and handles, of 5 MB of weights
MASKED = {
    "model_type": "roberta", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, "small": SMALL, "masked": MASKED})


def row(label: str, shape: str = "small", **more: Any) -> dict[str, Any]:
    given = Profile(shape=shape, output="", device="cpu", batch_size=1, length=8, steps=1, **more)
    found = measure.measure(profile.request_of(profile.Row.of(label), given))
    assert not found["reason"] and found["skipped_steps"] == 0, found["reason"]
    return found


def above(found: dict[str, Any]) -> int:
    """The peak over what is there before an optimizer is: model and batch."""
    return int(found["peak_bytes"] - found["model_bytes"])


def test_mezo_takes_what_inference_takes_and_a_buffer() -> None:
    """In place nothing more, in scratch mode the buffer, which is bounded; first-order fine-tuning gradient and states of all weights beside them."""
    inference = row("inference")
    weights = 4 * inference["weights"]
    assert weights > 4 << 20 and above(inference) < weights / 20
    again = row("inference")
    assert (above(again), again["weights"]) == (above(inference), inference["weights"])  # counted, not sampled
    inplace, scratch = row("mezo", perturbation="inplace"), row("mezo", perturbation="scratch")
    assert inplace["buffer_bytes"] <= FEW and above(inplace) <= above(inference) + FEW
    assert FEW < scratch["buffer_bytes"] <= default_scratch_bytes([]) + FEW
    assert above(scratch) <= above(inference) + scratch["buffer_bytes"] + FEW
    sgd, adam, lora = row("sgd"), row("adam"), row("adam@lora")
    assert sgd["gradient_bytes"] == adam["gradient_bytes"] == weights
    assert sgd["state_bytes"] == 0 and 2 * weights < adam["state_bytes"] <= 2 * weights + FEW
    assert above(sgd) >= weights and above(adam) >= 3 * weights
    assert lora["trained_weights"] < inference["weights"] / 10 and above(lora) < weights / 2
    assert row("momentum")["state_bytes"] == weights


def test_masked_shapes_have_rows_too() -> None:
    assert row("mezo", "masked")["weights"] == row("inference", "masked")["weights"]


def test_every_shape_can_be_made() -> None:
    """The published sizes of some."""
    known = {"opt-125m": 125_239_296, "opt-350m": 331_196_416, "gpt2": 124_439_808, "llama-2-7b": 6_738_415_616}
    for name, weights in known.items():
        assert sum(p.numel() for p in measure.bare_model(shapes.get(name))[0].parameters()) == weights
    assert shapes.context(shapes.get("opt-125m")) == 2048 and shapes.context(shapes.get("roberta-large")) == 512


def test_a_profile(tmp_path: Path, capsys: Any) -> None:
    """Each row in a process of its own; one that fails is a row with its reason."""
    labels = ["inference", "mezo:queries=2", "adam@lora", "hybrid:first_order_params=nowhere"]
    command = ["profile", "--shape", "small", "--methods", ",".join(labels), "--batch-size", "2", "--length", "8", "--steps", "1"]
    out = tmp_path / "out"
    assert main([*command, "--device", "cpu", "--output", str(out)]) == 0
    said = capsys.readouterr()
    table = said.out
    assert said.err.startswith("small: 4 rows, each measured in a process of its own, the first of them inference\n")
    assert re.search(r"; 2 rows of 8 tokens; .*, [0-9]+ threads?\. MiB; seconds: the median of 1 step\.\n", table)
    assert table.strip() == (out / "table.md").read_text().strip() and "| mezo:queries=2 | " in table
    with (out / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == labels and [bool(r["reason"]) for r in rows] == [False, False, False, True]
    assert "matches no trained parameter" in rows[3]["reason"] and rows[1]["forwards"] == "4.0" and rows[2]["peft"] == "lora"
    assert all(int(r["peak_bytes"]) >= int(r["model_bytes"]) and float(r["seconds_per_step"]) > 0 for r in rows[:3])
    content = json.loads((out / "result.json").read_text())
    assert content["options"]["length"] == 8 and content["machine"]["torch_threads"] and not content["interrupted"]
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main([*command, "--device", "cpu", "--output", str(out), "--methods", "sgd@nothing"]) == 2
    )  # and may be made again in its folder


def test_rows_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Profile(shape="opt-66b", output="", device="cpu")
    request = profile.request_of(profile.Row.of("adam"), given)
    assert "it needs at least 48" in measure.measure(request)["reason"]  # 65.7e9 weights and their gradients, fp32: 489 GiB
    monkeypatch.setattr(measure, "measure", lambda request: os.kill(os.getpid(), signal.SIGKILL))
    assert measure.alone(request) == {"reason": "out of memory: the system ended its process"}

    def broken(request: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setattr(measure, "measure", broken)
    assert measure.alone(request)["reason"].startswith("failed")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "needs a --model or a --shape, and not both"),
        (["--shape", "small", "--model", "m"], "needs a --model or a --shape, and not both"),
        (["--shape", "gpt-2"], "--shape 'gpt-2' must be one of gpt2, gpt2-medium"),
        (["--shape", "small", "--length", "65"], "--length 65: --shape small has room for 64 tokens"),
        (["--shape", "small", "--form", "masked"], "--form masked: --shape small is not"),
        (["--shape", "small", "--methods", "mezo@qlora"], "--methods mezo@qlora: 'qlora' must be one of none, lora"),
        (["--shape", "small", "--methods", "mezzo"], "--method 'mezzo' must be one of"),
        (["--shape", "small", "--methods", "mezo:rank=2"], "has no option 'rank'"),
        (["--shape", "small", "--methods", "inference:a=1"], "inference has no options"),
        (["--shape", "small", "--methods", "mezo,mezo"], "give none twice"),
        (["--shape", "small", "--methods", "adam@prefix"], "--shape has no tokenizer: give a --model"),
    ],
)
def test_what_is_refused(given: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    """In one line, before a process is started."""
    assert main(["profile", *given, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_other_files_are_not_replaced(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "result.json").write_text("{}")
    assert main(["profile", "--shape", "small", "--output", str(tmp_path)]) == 2
    assert "its result.json would be replaced, and no profile wrote that" in capsys.readouterr().err
