"""Adapters that begin in the space of their layers' inputs: what LoRA's matrices hold, runs that are resumed, kept and replayed, and what is refused.

Belongs here: inputs.py, and whole runs with it. Does not belong here: how factors come about (tests/optim/test_inputs.py), directions (test_methods.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import cached, files, inputs
from zo_finetune.blocks import blocks_of
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.load import load
from zo_finetune.model import LanguageModel
from zo_finetune.objectives.classification import Classification
from zo_finetune.scoring import Encoded

from tests.finetune.calls import Calls
from tests.finetune.test_resume import assert_same
from tests.kernels.cases import same_bits
from zo_kernels import InputFactors, journal

LORA = ["--peft", "lora", "--lora-rank", "4"]
RUN: dict[str, Any] = {"steps": 5, "lr": "1e-2", "eval_every": 2, "seed": 5}


@pytest.fixture
def command(train_command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    def build(*more: str, output: str = "run") -> list[str]:
        return train_command(tmp_path / output, *LORA, *more, **RUN)

    return build


def matrices(run: Path, which: str) -> dict[str, torch.Tensor]:
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name: t for name, t in saved.items() if f"lora_{which}" in name}


def factors(run: Path) -> InputFactors:
    return InputFactors.load(journal.factors_path(run / files.JOURNAL))


@pytest.mark.parametrize("init", ["eva", "whitened"])
def test_a_run_begins_with_the_components_and_trains_the_second_matrix_alone(
    init: str, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Any, capsys: Any
) -> None:
    """To the bit: interrupted and resumed, also without the file beside the journal; and replayed, with it alone."""
    own = ["--lora-init", init, "--lora-freeze-a"]
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(command(*own)) == 0
    held = {name: values for name, (side, values) in factors(run).matrices.items() if side == "right"}
    first = matrices(run, "A")
    assert len(first) == len(held) == 4  # query and value of two blocks
    for name, a in first.items():
        bare = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        assert same_bits(a, held[bare].t().contiguous()), name
    assert all(b.any() for b in matrices(run, "B").values())
    header = journal.read(run / files.JOURNAL).header
    assert {p.name.rpartition("lora_")[2][0] for p in header.parameters} == {"B"}

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", Calls(6).of(Classification.loss))
        assert main(command(*own, output="again")) == 130
    if init == "eva":
        journal.factors_path(again / files.JOURNAL).unlink()
    assert main(["resume", str(again)]) == 0
    assert factors(again) == factors(run)
    (again / "result.json").write_text((again / "result.json").read_text().replace(str(again), str(run)))
    assert_same(again, run)

    model = ["--model", str(model_folder("llama")), "--device", "cpu"]
    assert main(["replay", str(run / files.JOURNAL), *model, "--output", str(tmp_path / "out")]) == 0
    for which in "AB":
        one, other = matrices(run, which), matrices(tmp_path / "out", which)
        assert all(same_bits(one[name], other[name]) for name in one)
    journal.factors_path(run / files.JOURNAL).unlink()
    assert main(["replay", str(run), *model, "--output", str(tmp_path / "no")]) == 2
    assert "began with factors of its inputs, which lie beside its journal" in capsys.readouterr().err


def test_other_factors_beside_the_journal_are_refused(
    command: Callable[..., list[str]], tmp_path: Path, model_folder: Any, capsys: Any
) -> None:
    """The base model's table has the digest of A."""
    run = tmp_path / "run"
    assert main(command("--lora-init", "whitened", "--lora-freeze-a", "--keep", "best")) == 0
    mine = factors(run)
    journal.write_factors(run / files.JOURNAL, InputFactors({n: -v for n, (_, v) in mine.matrices.items()}))
    model = ["--model", str(model_folder("llama")), "--device", "cpu"]
    assert main(["replay", str(run), *model, "--output", str(tmp_path / "no")]) == 2
    assert "the model is not the one that this run started from" in capsys.readouterr().err
    journal.write_factors(run / files.JOURNAL, InputFactors({n: v[:, :2] for n, (_, v) in mine.matrices.items()}))
    assert main(["replay", str(run), *model, "--output", str(tmp_path / "no")]) == 2
    assert "do not fit base_model" in capsys.readouterr().err


def test_a_run_in_the_place_of_another_leaves_none_of_its_factors(command: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command("--lora-init", "eva")) == 0
    assert journal.factors_path(run / files.JOURNAL).exists()
    assert main(command("--overwrite")) == 0
    assert not journal.factors_path(run / files.JOURNAL).exists()
    assert main(command("--lora-init", "eva", "--overwrite")) == 0
    assert main([*command("--overwrite"), "--method", "adamw"]) == 0
    assert not (run / files.JOURNAL).exists() and not journal.factors_path(run / files.JOURNAL).exists()


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float32"), ("roberta", "float32"), ("llama", "bfloat16")])
def test_every_family_has_its_components(family: str, dtype: str, model_folder: Any, data_folder: Path, tmp_path: Path) -> None:
    """And begins as the base model does."""
    options: dict[str, Any] = {
        "model": str(model_folder(family)),
        "task": "sst2",
        "data": str(data_folder),
        "output": str(tmp_path / "r"),
    }
    config = Config(**options, device="cpu", dtype=dtype, peft="lora", lora_rank=4, lora_init="whitened", targets=["all-linear"])

    def begun() -> tuple[LanguageModel, InputFactors]:
        one = load(config)
        found = inputs.of_run(config, one.language_model, one.train_set)
        assert found is not None
        return one.language_model, found

    lm, found = begun()
    assert found.rank == 4
    assert {side for side, _ in found.matrices.values()} == ({"left"} if family == "gpt2" else {"right"})
    assert begun()[1] == found
    plain = load(Config(**options, device="cpu", dtype=dtype))
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        assert lm.model(input_ids=ids).logits.equal(plain.language_model.model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("matrices", ["", r"(layers?|h)\.1\.", "q_proj|c_attn|query"])
def test_a_look_begins_from_kept_states_and_is_at_what_is_trained(
    family: str, matrices: str, model_folder: Any, data_folder: Path, tmp_path: Path
) -> None:
    """The same space within rounding, the lower block and the head but for a token of each row are not run."""
    config = Config(
        model=str(model_folder(family)),
        task="sst2",
        data=str(data_folder),
        output=str(tmp_path / "r"),
        device="cpu",
        method="fzoo-inputs",
        options={"rank": "4", "matrices": matrices},
        train_blocks="1",
        train_examples=24,
        steps=50,
        cache="memory",
    )
    one = load(config)
    model = one.language_model.model
    _, blocks = blocks_of(model)
    ran, seen = [], []
    with one.scorer() as scorer:
        cached.keep(one, scorer, 0)
        inner = next(m for m in blocks[0].modules() if not list(m.children()))
        inner.register_forward_hook(lambda *_: ran.append(0))
        model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
        found = inputs.of_run(config, one.language_model, one.train_set, scorer.states)
        assert not ran and set(seen) == {1}
        plain = inputs.of_run(config, one.language_model, one.train_set)
        assert ran
    assert found is not None and plain is not None and found.matrices.keys() == plain.matrices.keys()
    assert found.matrices.keys() <= {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (side, v) in found.matrices.items():
        other = plain.matrices[name][1]
        assert side == plain.matrices[name][0] and (v @ v.T - other @ other.T).norm() < 1e-3 * (other @ other.T).norm(), name


def test_inputs_are_run_once_and_without_padding() -> None:
    examples = [Encoded(((1, 2, 3), (4, 5)), (), 0), Encoded(((4, 5), (6, 7), (8, 9)), (), 1)]
    batches = [b.tolist() for b in inputs.token_batches(examples, torch.device("cpu"), 2)]
    assert batches == [[[4, 5], [6, 7]], [[8, 9]], [[1, 2, 3]]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora-init", "eva", "--lora-rank", "65"], "the space of the inputs: rank=65 must be"),
        (["--lora-init", "eva", "--lora-rank", "33"], "rank=33: parameter 'model.layers.0.self_attn.q_proj.weight' has 32 inputs"),
        (
            ["--peft", "none", "--method", "fzoo-inputs", "--option", "matrices=q_prj"],
            "matrices=q_prj: no weight that is trained has such a name",
        ),
        (["--peft", "none", "--method", "fzoo-inputs", "--option", "matrices=("], "the space of the inputs: "),
        (["--peft", "lora", "--method", "fzoo-inputs"], "inputs: leave it out with --option matrices, or give a lower rank"),
        (["--peft", "ln", "--lora-freeze-a"], "--lora-freeze-a is of --peft lora, and --peft is ln"),
        (["--peft", "none", "--lora-init", "eva"], "--lora-init eva is of --peft lora"),
    ],
)
def test_what_is_refused(options: list[str], said: str, train_command: Any, tmp_path: Path, capsys: Any) -> None:
    base = [] if "--peft" in options else ["--peft", "lora"]
    assert main(train_command(tmp_path / "run", *base, *options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.zoj").exists()


def test_an_adapter_goes_on_with_its_first_matrix_frozen(
    command: Callable[..., list[str]], train_command: Any, tmp_path: Path
) -> None:
    """Its folder holds what it needs."""
    assert main(command("--lora-init", "whitened", "--lora-freeze-a")) == 0
    folder = str(tmp_path / "run" / "adapter")
    assert main(train_command(tmp_path / "more", "--adapter", folder, "--lora-freeze-a", **RUN)) == 0
    for which in "AB":
        before, after = matrices(tmp_path / "run", which), matrices(tmp_path / "more", which)
        assert all(same_bits(before[name], after[name]) == (which == "A") for name in before)
    assert json.loads((tmp_path / "more" / "config.json").read_text())["config"]["lora_freeze_a"] is True
