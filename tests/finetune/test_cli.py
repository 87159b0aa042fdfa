"""The command end to end, in this process, on tiny models: what it writes, what loads back, what it refuses."""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import cli
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.config import COMMANDS, Config
from zo_finetune.evaluate import evaluate
from zo_finetune.load import load
from zo_finetune.metrics.auc import auc
from zo_finetune.metrics.base import standard_error
from zo_finetune.objectives.classification import Classification

from tests.finetune.conftest import SHARED, make_rows, write_jsonl

ModelFolder = Callable[[str], Path]


@pytest.fixture
def command(train_command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    def build(*more: str, output: Path | str = tmp_path / "run", **options: Any) -> list[str]:
        return train_command(output, *more, **options)

    return build


def result_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "result.json").read_text())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_and_its_record(
    drawn: None, command: Callable[..., list[str]], tmp_path: Path, model_folder: ModelFolder, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = command("--lr", "1e-3", "--eval-every", "2", "--seed", "5")
    assert main(arguments) == 0
    result, said = result_of(tmp_path), capsys.readouterr()
    numbers = (f"{result[when]['accuracy']:.4f} ± {result[when]['accuracy_stderr']:.4f}" for when in ("before", "after"))
    assert said.out == (
        f"accuracy {' -> '.join(numbers)} on 12 examples (majority {result['majority']:.4f}) in 3 steps; the weights are in {result['saved']}; "
        f"see {tmp_path / 'run'}/result.json and curve.png\n"
    )
    assert " weights, all trained by mezo, " in said.err
    for moment in ("before", "after"):
        e = result[moment]
        assert e["examples"] == 12
        assert 0 <= e["accuracy"] <= 1
        assert e["accuracy_stderr"] == math.sqrt(e["accuracy"] * (1 - e["accuracy"]) / 12)
        assert sum(e["predicted"].values()) == pytest.approx(1)
        assert e["majority"] == result["majority"] >= 0.5
    assert [h["step"] for h in result["history"]] == [0, 2, 3]
    assert {h["examples"] for h in result["history"]} == {8}
    assert result["steps"] == 3
    assert result["skipped_steps"] == 0
    assert not result["interrupted"]
    assert result["seconds_per_step"] > 0
    assert result["peak_memory_bytes"] > 10**6
    assert result["command"] == ["zo-finetune", *arguments]
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["hyperparameters"] | {"lr": 1e-3, "eps": 1e-3, "batch_size": 4, "seed": 5} == result["hyperparameters"]
    assert result["weights"]["trainable"] == result["weights"]["total"]
    with (tmp_path / "run" / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["step"] for row in log] == ["1", "2", "3"]
    assert all(math.isfinite(float(row[k])) for row in log for k in ("loss", "projected_gradient", "lr", "seconds"))
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")

    old = weights(AutoModelForCausalLM.from_pretrained(model_folder("llama")))
    new = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(" It was great").input_ids


def test_a_run_is_repeatable_and_accumulation_splits_the_batch(command: Callable[..., list[str]], tmp_path: Path) -> None:
    def losses(*more: str, name: str) -> list[float]:
        assert main(command("--lr", "1e-3", "--no-save", "--eval-every", "0", *more, output=tmp_path / name)) == 0
        with (tmp_path / name / "log.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    whole = losses(name="a")
    assert losses(name="b") == whole
    assert losses("--seed", "1", name="c") != whole
    # two micro-batches of two are the same four examples: equal up to the order of fp32 sums
    assert losses("--batch-size", "2", "--accumulate", "2", name="d") == pytest.approx(whole, abs=1e-4)


def test_it_learns(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Enough steps on an easy task lower the loss on examples that were not trained on."""
    more = (
        "--steps",
        "150",
        "--batch-size",
        "16",
        "--lr",
        "2e-3",
        "--clip",
        "5",
        "--lr-schedule",
        "linear",
        "--eval-examples",
        "0",
    )
    assert main(command(*more, "--eval-every", "0", "--no-save")) == 0
    result = result_of(tmp_path)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("peft", ["lora", "ln", "prefix", "prompt"])
def test_adapters_train_and_load_back(
    peft: str, command: Callable[..., list[str]], tmp_path: Path, model_folder: ModelFolder
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    assert main(command("--peft", peft, "--lr", "1e-2")) == 0
    result = result_of(tmp_path)
    assert 0 < result["weights"]["trainable"] < result["weights"]["total"] / 2
    assert not (tmp_path / "run" / "model").exists()
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: "Unsupported layer type LlamaRMSNorm"
        plain = base(input_ids=ids).logits[:, -1]
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(input_ids=ids).logits[:, -1]
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()(input_ids=ids).logits[:, -1]
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(adapted, alone)


@pytest.mark.parametrize("peft", ["none", "lora", "ln", "prompt"])
def test_masked_models(peft: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command("--peft", peft, model="roberta")) == 0
    assert result_of(tmp_path)["hyperparameters"]["form"] == "masked"


@pytest.mark.parametrize("peft", ["none", "lora", "ln", "prefix", "prompt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights(peft: str, dtype: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command("--peft", peft, "--dtype", dtype, "--eval-every", "0", "--no-save")) == 0
    result = result_of(tmp_path)
    assert result["weights"]["dtype"] == f"torch.{dtype}"
    assert math.isfinite(result["after"]["loss"])


@pytest.mark.parametrize("perturbation", ["inplace", "scratch", "lazy"])
def test_perturbation_and_weight_decay_reach_the_step(perturbation: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    more = (
        "--perturbation",
        perturbation,
        "--weight-decay",
        "0.1",
        "--rounding",
        "nearest",
        "--backend",
        "reference",
        "--lr-schedule",
        "cosine",
    )
    assert main(command(*more)) == 0
    assert result_of(tmp_path)["hyperparameters"]["perturbation"] == perturbation


def test_cuda_graphs_of_a_run(command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recording that stands in for CUDA: batches are padded to a few widths, and a graph serves each; padding changes sums of
    attention in their last bits only."""
    from tests.optim import emulated_graph

    def losses(*more: str, name: str) -> list[float]:
        assert main(command("--lr", "1e-3", "--steps", "8", "--no-save", "--eval-every", "0", *more, output=tmp_path / name)) == 0
        with (tmp_path / name / "log.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    whole = losses(name="a")
    emulated_graph.install(monkeypatch)
    assert losses("--cuda-graph", name="b") == pytest.approx(whole, abs=1e-4)
    assert sum(g.replays for g in emulated_graph.Emulated.made) == 8


def test_ln_targets(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    assert main(command("--peft", "ln", "--peft-target", "post_attention_layernorm")) == 0
    assert result_of(tmp_path)["weights"]["trainable"] == 2 * 32
    assert main(command("--peft", "ln", "--peft-target", "q_proj", "--overwrite")) == 2
    assert "--peft-target 'q_proj' is no normalisation module" in capsys.readouterr().err


def test_the_schedule_ends_at_zero(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command("--lr", "1e-3", "--lr-schedule", "linear", "--steps", "4")) == 0
    with (tmp_path / "run" / "log.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_an_interrupt_saves_what_there_is(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loss, calls = Classification.loss, []

    def interrupted_in_step_three(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:  # the second forward of the third step: the weights are perturbed, if ever they are
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(Classification, "loss", interrupted_in_step_three)
    assert main(command("--steps", "9")) == 130
    lines = capsys.readouterr().err.splitlines()
    assert any(line == "interrupted after 2 of 9 steps; saving the weights, unless Ctrl-C comes again" for line in lines)
    assert lines[-1] == f"interrupted after 2 of 9 steps; go on with: zo-finetune resume {tmp_path / 'run'}"
    result = result_of(tmp_path)
    assert result["interrupted"]
    assert result["steps"] == 2
    assert result["after"] is None
    assert (tmp_path / "run" / "curve.png").is_file()
    log = (tmp_path / "run" / "log.csv").read_text()
    assert len(log.splitlines()) == 3

    monkeypatch.setattr(Classification, "loss", loss)
    assert main(command("--steps", "2", output=tmp_path / "two")) == 0
    for name in ("run", "two"):
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "two")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[1])  # the unfinished step left nothing behind


def test_an_earlier_run_is_kept_unless_told(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert main(command("--peft", "ln")) == 0
    (run / "notes.txt").write_text("mine")
    assert main(command()) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (run / "adapter").is_dir()
    (run / "adapter" / "mine.txt").write_text("mine")
    assert main(command("--overwrite")) == 2
    assert "did not write adapter/mine.txt: move that" in capsys.readouterr().err
    (run / "adapter" / "mine.txt").unlink()
    assert main(command("--overwrite")) == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "adapter").exists()  # an earlier run's, and not this one's
    assert (run / "model").is_dir()


def test_a_batch_of_more_than_there_is_takes_all_and_says_so(
    command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    assert main(command("--batch-size", "500", steps=1)) == 0
    written = result_of(tmp_path)["hyperparameters"]
    assert f"--batch-size 500: there are {written['batch_size']} examples to train on" in capsys.readouterr().err
    assert 0 < written["batch_size"] < 500


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"task": "sst3"}, (), "--task 'sst3' is unknown; known tasks are: boolq, cb, copa, cr"),
        ({"model": "./absent/model"}, (), "--model ./absent/model is not a model folder"),
        ({"model": "nobody/nothing"}, (), "--model nobody/nothing could not be loaded"),
        ({"data": "./absent.jsonl"}, (), "--data ./absent.jsonl does not exist"),
        ({}, ("--steps", "0"), "--steps 0 must be greater than 0"),
        ({}, ("--lr", "-1"), "--lr -1.0 must be at least 0"),
        ({}, ("--eps", "nan"), "--eps nan must be finite"),
        ({}, ("--lr", "inf"), "--lr inf must be finite"),
        ({}, ("--lr", "1e39"), "--lr 1e+39 must be 1.18e-38 to 3.4e+38"),
        ({}, ("--eps", "1e-50"), "--eps 1e-50 must be 1.18e-38 to"),
        ({}, ("--steps", "3000000000"), "--steps 3000000000 must be below 2^31"),
        ({}, ("--batch-size", "-3"), "--batch-size -3 must be greater than 0"),
        ({}, ("--batch-size", "30", "--accumulate", "2"), "--batch-size 30 with --accumulate 2: a step would take 60 examples"),
        ({"data": ""}, (), "--data '' is no path"),
        ({"model": "a\udce9/b"}, (), "--model 'a\\udce9/b' is not valid UTF-8"),
        ({"output": ""}, (), "--output '' is no path"),
        ({"output": "/"}, (), "--output / is not empty"),
        ({"output": "/dev/null/x"}, (), "--output /dev/null/x cannot be made: /dev/null is a file"),
        ({"output": "~nobody-of-that-name/x"}, (), "there is no such user's home"),
        ({"output": "x" * 300}, (), "cannot be used: [Errno 36] File name too long"),
        ({"model": "./\x1b[31mred"}, (), "--model ./\\x1b[31mred is not a model folder"),
        ({}, ("--method", "dizo", "--peft", "ln"), "--method dizo: "),
        ({}, ("--method", "momentun"), "did you mean 'momentum'?"),
        (
            {},
            ("--method", "lozo", "--option", "rnak=2"),
            "--option rnak=2: --method lozo has no option 'rnak': it has rank, every, momentum, scale_free; did you mean 'rank'?",
        ),
        ({}, ("--device", "abacus"), "--device 'abacus' is not a device"),
        ({}, ("--gguf-file", "x.gguf"), "--gguf-file 'x.gguf' is not in"),
        ({}, ("--form", "masked"), "could not be loaded"),
        ({}, ("--peft", "lora", "--peft-target", "nowhere"), "--peft lora does not fit"),
        (
            {},
            ("--peft", "lora", "--peft-target", "q_proj", "--peft-target", "v_porj"),
            "--peft-target 'v_porj' is no module of LlamaForCausalLM that --peft lora adapts: it adapts",
        ),
        ({}, ("--peft", "lora", "--peft-target", "q_proj", "--peft-target", "v_porj"), "did you mean 'v_proj'?"),
        ({}, ("--peft-target", "q_proj"), "--peft-target 'q_proj' names what --peft lora or ln adapts, and --peft is none"),
        ({}, ("--peft", "prefix", "--peft-target", "q_proj"), "and --peft is prefix"),
        ({}, ("--data-config", "sst2"), "--data-config 'sst2' is of data sets on the hub"),
        ({}, ("--dev-examples", "0", "--eval-every", "1"), "--eval-every 1 evaluates on the dev examples, and --dev-examples is 0"),
        ({}, ("--option", "queries=2", "--option", "queries=4"), "--option queries is given twice: keep one"),
        ({}, ("--column", "label=a", "--column", "label=b"), "--column label is given twice: keep one"),
        ({"model": "roberta"}, ("--peft", "prefix"), "--peft prefix needs a causal model"),
        ({}, ("--backend", "cuda"), "backend='cuda'"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(
    changes: dict[str, Any], more: tuple[str, ...], message: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    if more[:1] == ("--backend",) and torch.cuda.is_available():
        pytest.skip("the backend may be available here")
    arguments = command(*more, **changes)
    capsys.readouterr()  # what making the models said
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("zo-finetune: error: ")
    assert message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["1_0", "\uff11", "1e-\u0663", "0x1", ""])
def test_numbers_are_plain(text: str, command: Callable[..., list[str]]) -> None:
    """`float` takes underscores and the digits of every script."""
    with pytest.raises(SystemExit) as end:
        main(command(f"--lr={text}"))
    assert end.value.code == 2


def test_a_bad_label_is_found_before_the_run_begins(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    rows = make_rows(40, 2)
    rows[24]["label"] = 7
    assert main(command(data=write_jsonl(tmp_path / "rows.jsonl", rows))) == 2
    assert "rows.jsonl, row 25: field 'label' is 7; the labels of sst2 are 0 (negative), 1 (positive)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_trainable_weights(command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    load = models.load

    def frozen(*args: Any, **kwargs: Any) -> Any:
        lm = load(*args, **kwargs)
        lm.model.requires_grad_(False)
        return lm

    monkeypatch.setattr(models, "load", frozen)
    assert main(command()) == 2
    assert "has no trainable weights" in capsys.readouterr().err


def test_wrong_options_end_with_usage(capsys: Any) -> None:
    for arguments in ([], ["train"], ["train", "--column", "x"], ["fly"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "usage: zo-finetune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], f"'trian' must be one of {', '.join(COMMANDS)}; did you mean 'train'?"),
        (["train", "--modle", "m"], "there is no --modle; did you mean '--model'?"),
        (["demo", "--sede", "1"], "zo-finetune demo: error: --sede 1: unknown; there is no --sede; did you mean '--seed'?"),
        (["demo", "--seed", "1e9"], "argument --seed: '1e9' is no whole number"),
        (["demo", "--seed", "1_0"], "argument --seed: '1_0' is no whole number"),
        (["train", "--lr", "fast"], "argument --lr: 'fast' is no number"),
        (
            ["train", "--peft", "lroa"],
            "argument --peft: 'lroa' must be one of none, lora, ln, prefix, prompt; did you mean 'lora'?",
        ),
        (["demo", "\x1b[2J"], "zo-finetune demo: error: \\x1b[2J: unknown"),
    ],
)
def test_what_was_perhaps_meant(arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error, usage = capsys.readouterr().err.splitlines()
    assert said in error
    assert usage.startswith("usage: zo-finetune")


def test_versions_are_told(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert f"torch {version('torch')}" in capsys.readouterr().out


def test_a_missing_extra_is_named(command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cli, "NEEDED", ("torch", "no_such_package"))
    assert main(command()) == 2
    assert capsys.readouterr().err == (
        "zo-finetune: error: no_such_package is not installed: pip install 'zo_kernels[finetune]', or in a checkout pip install '.[finetune]'\n"
    )


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "zo_finetune", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: zo-finetune")


def test_auc_and_standard_error() -> None:
    margins, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, -1.0]), torch.tensor([0, 1, 0, 1, 0])
    assert auc(torch.tensor([0.1, 0.4, torch.nan, 0.8, -1.0]), labels) == (None, None)  # a NaN has no rank
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in (0.4, 0.8) for b in (0.1, 0.4, -1.0)]
    # by hand (DeLong 1988): the share that each of 0.4, 0.8 is above, and that each of 0.1, 0.4, -1 is below
    error = (statistics.variance([2.5 / 3, 1.0]) / 2 + statistics.variance([1.0, 0.75, 1.0]) / 3) ** 0.5
    assert auc(margins, labels) == pytest.approx((sum(pairs) / len(pairs), error))
    assert auc(margins.float() + 5, labels) == pytest.approx(auc(margins, labels))
    assert auc(margins, torch.ones(5)) == (None, None) and auc(margins, torch.tensor([0, 0, 0, 1, 0])) == (1.0, None)
    assert standard_error(torch.tensor([0.0, 1.0] * 50)) == 0.05


@pytest.mark.skipif(
    not (SHARED / "models" / "stories15m").is_dir(), reason="needs ../shared/models/stories15m and ../shared/data/sst2"
)
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_pretrained_model_on_sst2(peft: str) -> None:
    """TinyStories' 15 M parameters know something of sentiment: 0.63 on SST-2 without training (0.5 is chance)."""
    folders = {"model": str(SHARED / "models" / "stories15m"), "data": str(SHARED / "data" / "sst2")}
    loaded = load(Config(**folders, task="sst2", output="", peft=peft, device="cpu", eval_examples=200, dev_examples=0))
    with loaded.scorer() as scorer:
        result = evaluate(loaded.task, scorer, loaded.eval_set, 32)
    assert abs(result["accuracy"] - 0.630) < 4 * result["accuracy_stderr"]
    assert abs(result["auc"] - 0.701) < 0.12


def test_data_is_checked_before_weights_are_read(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    def load(*args: Any, **how: Any) -> Any:
        raise AssertionError("weights are read first")

    monkeypatch.setattr(models, "load", load)
    path = tmp_path / "bad.csv"
    path.write_text("sentence,label\nfine,1\ndull\n")
    assert main(command(data=path)) == 2
    assert "line 3 has 1 fields" in capsys.readouterr().err


def test_what_was_read_is_said_before_training(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    rows = [*make_rows(40, 1), {"sentence": "so " * 80, "label": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    assert main(command("--no-save", "--steps", "1", "--train-examples", "0", data=path)) == 0
    said = capsys.readouterr().err
    assert "a.jsonl 42 rows; train: " in said
    assert "1 rows were left out of the sample" in said
    assert "1 of 41 texts are longer than 64 tokens: their beginnings are left out" in said
    assert said.index("a.jsonl 42 rows") < said.index("before: accuracy")
