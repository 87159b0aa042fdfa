"""`zo-finetune train --quantize`: an adapter on a packed base is trained, gone on with and replayed.

Belongs here: runs of the command line with packed bases, on the CPU. Does not belong here: what of a packed weight is in a journal (tests/test_quantized.py).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from zo_finetune.cli import main

from zo_kernels import journal


@pytest.mark.parametrize("quantize", ["nf4", "int8", "int4"])
def test_a_run_on_a_packed_base(tmp_path: Path, train_command: Callable[..., list[str]], model_folder: Any, quantize: str) -> None:
    run = tmp_path / "run"
    assert main(train_command(run, quantize=quantize, peft="lora", steps=4)) == 0
    made = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(float(t.abs().sum()) > 0 for n, t in made.items() if "lora_B" in n)
    frozen = {p.name for p in journal.read(run / "run.zoj").header.frozen}
    assert any(n.endswith("q_proj.base_layer.weight.format") for n in frozen)
    assert json.loads((run / "config.json").read_text())["config"]["quantize"] == quantize
    model = str(model_folder("llama"))
    assert main(["replay", str(run), "--model", model, "--device", "cpu", "--output", str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert all((again[n] == t).all() for n, t in made.items())
    if quantize == "int8":  # what it was measured with at the end, measured again
        options = {"quantize": quantize, "adapter": str(run / "adapter"), **dict.fromkeys(("steps", "batch_size", "dev_examples"))}
        assert main(train_command(tmp_path / "evaluated", command="evaluate", **options)) == 0
        after = json.loads((run / "result.json").read_text())["after"]
        measured = json.loads((tmp_path / "evaluated" / "result.json").read_text())
        assert measured["metrics"]["loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_packed_weights_carry_adapters_alone(
    tmp_path: Path, train_command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(train_command(tmp_path / "run", quantize="nf4")) == 2
    assert "--quantize nf4 packs the weights, and --peft none would train them" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    assert main(train_command(tmp_path / "run", quantize="int8", peft="lora")) == 2
    assert "--quantize int8 needs torchao: pip install 'zo_kernels[quantized]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
