"""Adapters: their options, where they begin, and runs that go on from an adapter's folder.

Belongs here: adapters.py and what the command line makes of it. Does not belong here: that every kind trains (test_models.py, test_first_order.py).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.errors import UserError
from zo_finetune.objectives.classification import Classification

from tests.finetune.calls import Calls
from tests.finetune.test_resume import assert_same
from tests.kernels.cases import same_bits

KINDS = ("lora", "ln", "prefix", "prompt")
Folder = Callable[[str], Path]


def load(folder: Path, **options: Any) -> models.LanguageModel:
    torch.manual_seed(3)
    return models.load(str(folder), device="cpu", **options)


def trained(model: models.LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: models.LanguageModel) -> torch.Tensor:
    return model.model(input_ids=torch.arange(12).reshape(2, 6)).logits


def test_defaults_are_what_they_were(model_folder: Folder) -> None:
    """MeZO's, to the bit, given or not."""
    explicit = {"lora": {"lora_rank": 8, "lora_alpha": 16.0, "lora_init": "default"}, "ln": {}}
    for peft in KINDS:
        plain = load(model_folder("llama"), peft=peft)
        given = load(model_folder("llama"), peft=peft, **explicit.get(peft, {"prefix_length": 5}))
        a, b = trained(plain), trained(given)
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
        config = plain.model.peft_config["default"]
        if peft == "lora":
            assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, {"q_proj", "v_proj"})
        if plain.virtual_tokens:
            assert plain.virtual_tokens == config.num_virtual_tokens == 5 and plain.max_length == 64 - 5


@pytest.mark.parametrize("given", [{"adapter": "folder"}, {"lora_rank": 4}, {"targets": ["q_proj"]}])
def test_what_is_said_of_an_adapter_is_not_passed_over(given: dict[str, Any], model_folder: Folder) -> None:
    with pytest.raises(UserError, match="is of an adapter, and --peft is none: say which kind"):
        load(model_folder("llama"), **given)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loras_options(family: str, model_folder: Folder) -> None:
    base, folder = load(model_folder(family)), model_folder(family)
    for init in ("default", "gaussian"):
        options: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 10.0, "lora_init": init, "targets": ["all-linear"]}
        model = load(folder, peft="lora", **options)
        assert torch.equal(logits(model), logits(base))  # it begins as the base model does
        first = torch.cat([p.flatten() for name, p in trained(model).items() if "lora_A" in name])
        assert len(first) > 0 and all(p.shape[0] == 4 for name, p in trained(model).items() if "lora_A" in name)
        # Normal with deviation 1 / r, or uniform within the square root of 1 / inputs
        assert (first.std() > 0.2 and first.abs().max() > 0.5) if init == "gaussian" else first.abs().max() <= 16**-0.5
        names = {name.split(".lora_A")[0].rpartition(".")[2] for name in trained(model) if "lora_A" in name}
        linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert names == (linear if family == "llama" else {"c_attn", "c_proj", "c_fc"})
        scalings = {m.scaling["default"] for m in model.model.modules() if hasattr(m, "lora_A")}
        assert scalings == {10 / 4}


@pytest.mark.parametrize("peft", ["prefix", "prompt"])
def test_soft_prompts_of_any_length(peft: str, model_folder: Folder) -> None:
    """Longer than the text that they begin with, too; what they take is not left for the input."""
    model = load(model_folder("llama"), peft=peft, prefix_length=30)
    assert model.virtual_tokens == 30 and model.max_length == 34
    assert all(torch.isfinite(p).all() and p.shape[0] == 30 for p in trained(model).values())
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(UserError, match="--prefix-length 64 leaves no room in a context of 64 tokens"):
        load(model_folder("llama"), peft=peft, prefix_length=64)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--lora-rank", "4"], "--lora-rank 4 is of --peft lora, and --peft is none"),
        (["--peft", "ln", "--lora-alpha", "4"], "--lora-alpha 4.0 is of --peft lora, and --peft is ln"),
        (["--peft", "prefix", "--lora-init", "gaussian"], "--lora-init gaussian is of --peft lora, and --peft is prefix"),
        (["--peft", "lora", "--prefix-length", "4"], "--prefix-length 4 is of --peft prefix or prompt, and --peft is lora"),
        (["--peft", "lora", "--lora-init", "pissa"], "'pissa' must be one of default, gaussian"),
        (["--peft", "ln", "--peft-target", "all-linear"], "--peft-target all-linear stands alone"),
        (["--peft", "lora", "--lora-rank", "0"], "--lora-rank 0 must be greater than 0"),
        (["--adapter", "/nowhere"], "--adapter /nowhere has no adapter_config.json"),
    ],
)
def test_what_is_refused(given: list[str], said: str, train_command: Any, tmp_path: Path, capsys: Any) -> None:
    with contextlib.suppress(SystemExit):  # of the parser
        assert main(train_command(tmp_path / "run", *given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_holds_the_adapter_that_goes_on(model_folder: Folder, tmp_path: Path) -> None:
    """Each kind: the same tensors, the same outputs, whatever the random state."""
    for peft in KINDS:
        model = load(model_folder("llama"), peft=peft, **({"prefix_length": 3} if peft in ("prefix", "prompt") else {}))
        with torch.no_grad():
            for p in trained(model).values():
                p += 0.05 * torch.randn_like(p)
        folder = model.save(tmp_path / peft)
        again = models.load(str(model_folder("llama")), device="cpu", peft=peft, adapter=str(folder))
        a, b = trained(model), trained(again)
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
        assert torch.equal(logits(model), logits(again)) and again.virtual_tokens == model.virtual_tokens and not again.notes


def test_another_base_of_the_same_name_is_told(model_folder: Folder, tmp_path: Path) -> None:
    """What runs save is called "model" every time; one that is gone from where it was is the same, moved."""
    one, other = (Path(shutil.copytree(model_folder("llama"), tmp_path / name / "model")) for name in ("one", "other"))
    folder = load(one, peft="lora").save(tmp_path)
    assert load(other, peft="lora", adapter=str(folder)).notes == [f"the adapter was made for {one}, and goes on with {other}"]
    assert load(one, peft="lora", adapter=str(folder)).notes == []
    one.rename(tmp_path / "gone")
    assert load(other, peft="lora", adapter=str(folder)).notes == []


@pytest.fixture
def first(train_command: Any, tmp_path: Path) -> Path:
    """The adapter of a run of LoRA with rank 2."""
    assert main(train_command(tmp_path / "first", peft="lora", lora_rank=2, lr="1e-2", dev_examples=0)) == 0
    return tmp_path / "first" / "adapter"


def test_a_run_goes_on_from_an_adapter(
    first: Path, train_command: Any, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It begins where the other ended; killed, it resumes to the same bits; its journal, the base and the first adapter make its weights again."""
    options = {"adapter": first, "lr": "1e-2", "dev_examples": 0, "seed": 7}
    assert main(train_command(tmp_path / "run", **options)) == 0
    ended, went_on = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "run"))
    assert went_on["hyperparameters"]["peft"] == "lora" and went_on["weights"] == ended["weights"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    monkeypatch.setattr(Classification, "loss", Calls(4).of(Classification.loss))
    again = tmp_path / "again"
    assert main(train_command(again, **options)) == 130
    assert main(["resume", str(again)]) == 0
    (again / "result.json").write_text((again / "result.json").read_text().replace(str(again), str(tmp_path / "run")))
    assert_same(again, tmp_path / "run")
    base = ["--model", str(model_folder("llama")), "--device", "cpu"]
    moved = shutil.copytree(first, tmp_path / "moved")
    for more in ([], ["--adapter", str(moved)]):
        out = tmp_path / f"out{len(more)}"
        assert main(["replay", str(tmp_path / "run"), *base, *more, "--output", str(out)]) == 0
        saved, replayed = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (tmp_path / "run", out))
        assert all(same_bits(saved[name], replayed[name]) for name in saved)
    weights = load_file(moved / "adapter_model.safetensors")
    save_file({name: 2 * t for name, t in weights.items()}, moved / "adapter_model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "run"), *base, "--adapter", str(moved), "--output", str(tmp_path / "no")]) == 2
    assert "zo-finetune: error: " in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "first"), *base, "--adapter", str(moved), "--output", str(tmp_path / "no")]) == 2
    assert "the run started from none" in capsys.readouterr().err
    shutil.rmtree(again / "adapter")
    (again / "result.json").unlink()
    shutil.copy(moved / "adapter_model.safetensors", first / "adapter_model.safetensors")
    assert main(["resume", str(again)]) == 2  # another adapter than it began with
    assert "zo-finetune: error: " in capsys.readouterr().err


def test_an_adapter_that_does_not_fit(first: Path, train_command: Any, tmp_path: Path, capsys: Any) -> None:
    def refused(*more: str, said: str, model: str = "llama") -> None:
        assert main(train_command(tmp_path / "no", "--adapter", str(first), *more, model=model)) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()

    capsys.readouterr()
    refused("--peft", "prefix", said="--peft prefix: --adapter")
    refused("--lora-rank", "4", said="--lora-rank 4 is of a new adapter, and --adapter")
    refused(model="gpt2", said="does not fit GPT2LMHeadModel")
    refused(model="opt", said="does not fit OPTForCausalLM")
    config = json.loads((first / "adapter_config.json").read_text())
    for changed, said in (
        ({"init_lora_weights": "pissa"}, "by which peft changes the base's weights"),
        ({"peft_type": "IA3"}, "is of peft's kind 'IA3'"),
        ({"r": 4}, "does not fit LlamaForCausalLM"),
        ({"r": 1 << 40}, "it must be 1 to 65,536"),
        ({"target_modules": ["q_proj"]}, "does not fit LlamaForCausalLM: 4 tensors differ"),
    ):
        (first / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        refused(said=said)
    (first / "adapter_config.json").write_text(json.dumps(config))
    weights = (first / "adapter_model.safetensors").read_bytes()
    (first / "adapter_model.safetensors").write_bytes(weights[:-8])
    refused(said="is damaged or was not written to its end")
    (first / "adapter_model.safetensors").unlink()
    refused(said="adapter_model.safetensors is not there")
    assert main(train_command(tmp_path / "no", "--adapter", str(first.parent))) == 2
    assert f"it has {first}" in capsys.readouterr().err
