"""Runs that are pulled back toward their start, and where that lies.

Belongs here: `--anchor`. Does not belong here: what a pull computes (tests/optim/test_anchor.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zo_finetune.cli import main
from zo_finetune.objectives.classification import Classification
from zo_finetune.start import start_of

from tests.finetune.calls import Calls
from tests.finetune.test_resume import assert_same
from tests.kernels.cases import same_bits
from zo_kernels import journal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_file_has_is_not_copied(dtype: torch.dtype, model_folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=dtype)
    model.model.norm.weight.requires_grad_(False)
    changed = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        changed[0, 0] += 1
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    kept = load_file(model_folder("llama") / "model.safetensors")
    for source, own in ((str(model_folder("llama")), {"model.layers.0.self_attn.q_proj.weight"}), ("hub/name", set(trained))):
        found = start_of(model, source)
        assert found.keys() == trained.keys()
        assert all(same_bits(t.to(dtype), trained[n]) for n, t in found.items())
        assert all(found[n].data_ptr() != p.data_ptr() for n, p in trained.items())
        if dtype == torch.bfloat16:  # the file's type tells which are of it
            assert {n for n, t in found.items() if t.dtype == dtype} == own and kept["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_pulled_run_ends_nearer_and_is_resumed_and_replayed(
    peft: str,
    train_command: Callable[..., list[str]],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def command(name: str, *more: str) -> list[str]:
        return train_command(tmp_path / name, *more, steps=4, lr="1e-2", peft=peft, eval_every=0, dtype="bfloat16")

    assert main(command("run", "--anchor", "0.5:2")) == 0
    assert main(command("free")) == 0
    part, file = ("model", "model.safetensors") if peft == "none" else ("adapter", "adapter_model.safetensors")
    saved, free = (load_file(tmp_path / name / part / file) for name in ("run", "free"))
    assert (journal.read(tmp_path / "run" / "run.zoj").header.method or {})["anchor"] == {"name": "anchor", "lam": 0.5, "every": 2}
    if peft == "none":
        base = load_file(model_folder("llama") / file)
        far, near = (sum(float((w[n].float() - base[n].float()).square().sum()) for n in base) for w in (free, saved))
        assert 0 < near < far
    model = ["--model", str(model_folder("llama")), "--device", "cpu"]
    assert main(["replay", str(tmp_path / "run"), *model, "--output", str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / part / file)
    assert all(same_bits(saved[n], again[n]) for n in saved)

    monkeypatch.setattr(Classification, "loss", Calls(6).of(Classification.loss))
    assert main(command("cut", "--anchor", "0.5:2")) == 130
    assert len(journal.read(tmp_path / "cut" / "run.zoj").steps) == 2
    assert main(["resume", str(tmp_path / "cut")]) == 0
    text = (tmp_path / "cut" / "result.json").read_text().replace(str(tmp_path / "cut"), str(tmp_path / "run"))
    (tmp_path / "cut" / "result.json").write_text(text)
    assert_same(tmp_path / "cut", tmp_path / "run")
    assert json.loads(text)["hyperparameters"]["anchor"] == "0.5:2"


@pytest.mark.parametrize("given", ["0", "1e-50", "1.5", "0.5:0", "0.5:", "half", "0.5:1:2", "nan"])
def test_what_is_no_pull(given: str, train_command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    assert main(train_command(tmp_path / "run", "--anchor", given)) == 2
    assert f"--anchor '{given}': give LAM[:EVERY]" in capsys.readouterr().err


def test_first_order_methods_have_none(train_command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    assert main(train_command(tmp_path / "run", "--anchor", "0.1", method="adamw")) == 2
    assert "--anchor 0.1 is of methods that perturb weights, and --method adamw does not" in capsys.readouterr().err
