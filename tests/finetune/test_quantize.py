"""`zo-finetune train --quantize`: an adapter on a packed base, or its scales, is trained, gone on with and replayed.

Belongs here: runs of the command line with packed bases, on the CPU. Does not belong here: what of a packed weight is in a journal (tests/test_quantized.py).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from zo_finetune import ZOTrainingArguments, load, methods
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.objectives.classification import Classification
from zo_finetune.quantize import packed_as

import zo_kernels as zk
from tests.finetune.calls import Calls
from zo_kernels import journal, quantized


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


# ---- scales alone ------------------------------------------------------------------------------------------------------


def scales_of(folder: Path) -> dict[str, Any]:
    """Of a model that transformers loads from a run's folder, by itself."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    return {name: t.detach().clone() for name, t in zk.quantized_scales(model)}


@pytest.mark.parametrize("quantize", ["nf4", "int8", "int4"])
def test_scales_are_trained_gone_on_with_and_replayed(
    tmp_path: Path, train_command: Callable[..., list[str]], model_folder: Any, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QZO: a run of five steps, another that Ctrl-C ends in the fourth and that goes on, and the journal alone have the same bits; nothing else has moved."""
    calls = Calls()
    monkeypatch.setattr(Classification, "loss", calls.of(Classification.loss))
    options = {"quantize": quantize, "method": "qzo", "peft": None, "lr": "1e-3", "dev_examples": 0, "eval_examples": 4, "steps": 5}
    run, again, model = tmp_path / "run", tmp_path / "again", str(model_folder("llama"))
    assert main(train_command(run, **options)) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["forwards"] == calls.made == 10 and 0 < result["weights"]["trainable"] < result["weights"]["total"]
    header = journal.read(run / "run.zoj").header
    assert header.hyperparameters["clip"] == methods.QZO_CLIP
    assert {p.name.rpartition(".")[2] for p in header.parameters} == {"absmax" if quantize == "nf4" else "scale"}
    calls.made, calls.stop = 0, 7
    assert main(train_command(again, **options)) == 130
    assert len(journal.read(again / "run.zoj").steps) == 3
    assert main(["resume", str(again)]) == 0
    assert main(["replay", str(run), "--model", model, "--device", "cpu", "--output", str(tmp_path / "replayed")]) == 0
    assert (journal.read(run / "run.zoj").steps["loss"] == journal.read(again / "run.zoj").steps["loss"]).all()
    found = scales_of(run / "model")
    for folder in (again, tmp_path / "replayed"):
        other = scales_of(folder / "model")
        assert found.keys() == other.keys() and all(torch.equal(found[n], other[n]) for n in found)
    base = load.load_model(Config(model=model, task="sst2", output="", quantize=quantize, method="qzo", device="cpu"))
    assert all(not torch.equal(t, found[n]) for n, t in zk.quantized_scales(base.model))
    trained = tf.AutoModelForCausalLM.from_pretrained(run / "model")
    theirs = dict(quantized.spread(trained.named_parameters(), trained))
    for name, t in quantized.spread(base.model.named_parameters(), base.model):
        assert name.endswith((".scale", ".scales")) or torch.equal(t, theirs[name]), name


@pytest.mark.parametrize("quantize", ["nf4", "int8", "int4"])
def test_a_model_that_was_saved_packed(
    tmp_path: Path, train_command: Callable[..., list[str]], model_folder: Any, quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run of scales wrote is measured as at the run's end, trained further, and neither packed in another way nor trained but for its scales."""
    options = {"quantize": quantize, "method": "qzo", "peft": None, "lr": "1e-3", "dev_examples": 0, "steps": 2}
    assert main(train_command(tmp_path / "run", **options)) == 0
    folder = str(tmp_path / "run" / "model")
    measure = {"command": "evaluate", **dict.fromkeys(("steps", "batch_size", "dev_examples", "method", "peft", "lr"))}
    for number, given in enumerate((None, quantize)):
        assert main(train_command(tmp_path / f"evaluated{number}", model=folder, **measure, quantize=given)) == 0
        after = json.loads((tmp_path / "run" / "result.json").read_text())["after"]
        measured = json.loads((tmp_path / f"evaluated{number}" / "result.json").read_text())
        # Scales that are trained keep bitsandbytes' usual layout; without, some processors multiply in bfloat16, to 2^-8.
        assert measured["metrics"]["loss"] == pytest.approx(after["loss"], rel=2**-8 if quantize == "nf4" else 1e-6)
    assert main(train_command(tmp_path / "further", model=folder, **options)) == 0
    assert (
        main(["replay", str(tmp_path / "further"), "--model", folder, "--device", "cpu", "--output", str(tmp_path / "again")]) == 0
    )
    found, again = scales_of(tmp_path / "further" / "model"), scales_of(tmp_path / "again" / "model")
    assert all(torch.equal(t, again[n]) for n, t in found.items())
    capsys.readouterr()
    other = "int8" if quantize == "nf4" else "nf4"
    assert main(train_command(tmp_path / "other", model=folder, **{**options, "quantize": other})) == 2
    assert f"is packed already, as {quantize}: leave it out, or give --quantize {quantize}" in capsys.readouterr().err
    assert main(train_command(tmp_path / "other", model=folder, steps=1)) == 2
    assert f"is packed ({quantize}), and --peft none would train what is left of it in numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, None), ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "int8"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, "torchao Float8WeightOnlyConfig"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ],
)  # fmt: skip
def test_how_a_model_was_packed(said: Any, expected: str | None) -> None:
    assert packed_as(tf.LlamaConfig(**({} if said is None else {"quantization_config": said}))) == expected


def test_scales_of_every_format_move_the_weights_alike(model_folder: Any) -> None:
    """The largest weight of a block by eps z, whichever way its scale is written."""
    for quantize in ("nf4", "int8", "int4"):
        lm = load.load_model(
            Config(model=str(model_folder("llama")), task="sst2", output="", quantize=quantize, method="qzo", device="cpu")
        )
        step = methods.METHODS["qzo"].recipe("none", {}, 1e-6, 1e-3).make(lm.model)
        before = {n: t.detach().clone() for n, t in zk.quantized_scales(lm.model)}
        codes = quantized.largest_codes(lm.model)
        with zk.perturbed(step, 0, 1):
            moved = torch.cat([(t.detach() - before[n]).flatten() * codes[n] for n, t in zk.quantized_scales(lm.model)])
        assert float(moved.square().mean().sqrt()) == pytest.approx(1e-3, rel=0.1), quantize


def test_scales_are_refused_where_there_are_none(
    tmp_path: Path, train_command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for more, reason in (
        ({}, "--method qzo trains the scales of packed weights: give --quantize nf4, int8 or int4"),
        ({"quantize": "nf4", "peft": "lora"}, "nothing else: leave --peft lora out"),
        ({"quantize": "nf4", "train_blocks": "last:1"}, "nothing else: leave --train-blocks last:1 out"),
        ({"quantize": "nf4", "anchor": "0.1"}, "nothing else: leave --anchor out"),
    ):
        assert main(train_command(run, method="qzo", **more)) == 2
        assert reason in capsys.readouterr().err
    packed = models.quantized_arguments

    def nested(*args: Any) -> dict[str, Any]:
        made = packed(*args)
        made["quantization_config"].bnb_4bit_use_double_quant = True
        return made

    monkeypatch.setattr(models, "quantized_arguments", nested)
    assert main(train_command(run, method="qzo", quantize="nf4")) == 2
    assert "--quantize nf4: model=LlamaForCausalLM has no quantisation scale in floating point" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a Trainer refuses to train these without an adapter"):
        ZOTrainingArguments(tmp_path, zo_method="qzo")
    assert not run.exists()
