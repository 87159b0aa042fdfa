"""Every method from the command line: a run and its record, resumed to the same bits, options and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import files, methods, values
from zo_finetune.cli import main
from zo_finetune.errors import UserError
from zo_finetune.objectives.classification import Classification

import zo_kernels as zk
from tests.finetune.calls import Calls
from tests.finetune.test_resume import assert_same
from tests.kernels.cases import same_bits
from zo_kernels import journal

# What exercises a method in a few steps, where its defaults would not.
SOONER = {
    "mezo": [[], ["scale_free=true", "queries=2"]],
    "momentum": [["state_dtype=bfloat16"], ["state=recomputed", "history=2"]],
    "zo-adam": [["betas=0.8,0.9"], ["state=recomputed", "history=2"]],
    "sgd": [["momentum=0.5"]],
    "adamw": [["betas=0.8,0.9"]],
    "dizo": [["every=2", "inner=2"], ["every=2", "inner=2", "learn=backpropagation"]],
    "lozo": [["every=2"], ["every=2", "momentum=0.9"]],
    "random-sparse": [["every=2"]],
    "layer-scale": [["every=2"], ["by=gradient"]],
    "hizoo": [["alpha=1e-3"]],
    "fzoo": [["queries=3"]],
    "mezo-inputs": [["rank=2", "queries=2"], ["rank=2", "power=0.5", "others=dense", "matrices=q_proj"]],
    "fzoo-inputs": [["rank=2", "queries=3"]],
}
RATES = {
    "fzoo": ("1e-6", "1e-3"),
    "fzoo-inputs": ("1e-6", "1e-3"),
    **{name: ("1e-3", None) for name, m in methods.METHODS.items() if m.first_order},
}
EVERY = [
    (m.name, options) for m in methods.METHODS.values() if not m.packed for options in SOONER.get(m.name, [[]])
]  # the others: test_quantize.py


@pytest.fixture
def command(train_command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    def build(name: str, *more: str, options: list[str] | None = None, output: str = "run", steps: int = 2) -> list[str]:
        lr, eps = RATES.get(name, ("1e-3", "1e-3"))
        own = [part for option in options or [] for part in ("--option", option)]
        sizes = {"steps": steps, "dev_examples": 0, "eval_examples": 4}
        return train_command(tmp_path / output, *own, *more, method=name, lr=lr, eps=eps, seed=5, **sizes)

    return build


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[" ".join([name, *options]) for name, options in EVERY])
def test_the_price_of_a_method_is_what_the_library_says(name: str, options: list[str]) -> None:
    """Known here before there is a model, there once there is an optimizer."""
    recipe = methods.METHODS[name].recipe("none", dict(o.split("=") for o in options))
    torch.manual_seed(0)
    layer = {"q_proj": torch.nn.Linear(4, 4), "v_proj": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(layer), torch.nn.Linear(4, 4)])})
    optimizer = recipe.make(model)
    assert sum(optimizer.forwards(k) for k in range(5)) == recipe.method.forwards(recipe.options, 5)


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[" ".join([name, *options]) for name, options in EVERY])
def test_a_method_end_to_end(
    name: str, options: list[str], command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A run and its record; the forward passes are those that were made; an interrupted run goes on to the same bits."""
    method, steps = methods.METHODS[name], 5
    calls = Calls()
    monkeypatch.setattr(Classification, "loss", calls.of(Classification.loss))
    assert main(command(name, options=options, steps=steps)) == 0
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == steps and result["skipped_steps"] == 0
    per_step = {"forward-grad": 1, "hybrid": 2}.get(name, 2 if method.first_order else 0)  # tangents, and backward passes
    backward = 2 * 2 if "learn=backpropagation" in options else 0  # of a projection's two inner steps, after every second step
    extra = steps * per_step + steps // 2 * backward
    assert result["forwards"] == calls.made + extra == method.forwards(result["hyperparameters"]["options"], steps)
    given = dict(option.split("=") for option in options)
    assert result["hyperparameters"]["method"] == name
    assert json.loads((run / "config.json").read_text())["config"]["options"] == given
    assert given.keys() <= result["hyperparameters"]["options"].keys()
    if method.no_journal:
        assert not (run / files.JOURNAL).exists()
        said = capsys.readouterr().err
        assert f"--method {name} writes no journal and cannot be resumed: {method.no_journal}" in said
        assert main(["resume", str(run)]) == 2
        assert f"a run of --method {name} cannot be resumed: {method.no_journal}" in capsys.readouterr().err
        return
    records = journal.read(run / files.JOURNAL)
    assert len(records.steps) == steps and records.header.hyperparameters["config"]["method"] == name
    # Ctrl-C in step 4. A pass that carries tangents is counted twice, and so is a backward pass, which is no call.
    before = method.forwards(result["hyperparameters"]["options"], 3) - (3 if name == "forward-grad" else backward)
    again, calls.made, calls.stop = tmp_path / "again", 0, before + 1
    assert main(command(name, options=options, steps=steps, output="again")) == 130
    assert len(journal.read(again / files.JOURNAL).steps) == 3
    assert main(["resume", str(again)]) == 0
    (again / "result.json").write_text((again / "result.json").read_text().replace(str(again), str(run)))
    assert_same(again, run)


def test_a_methods_run_is_replayed(
    command: Callable[..., list[str]], tmp_path: Path, model_folder: Callable[[str], Path], capsys: Any
) -> None:
    """From the journal and the base model alone, one whose records are not coefficients of terms."""
    assert main(command("dizo", options=["every=2", "inner=1"], steps=3)) == 0
    model = ["--model", str(model_folder("llama")), "--device", "cpu"]
    assert main(["replay", str(tmp_path / "run"), *model, "--output", str(tmp_path / "out")]) == 0
    saved, replayed = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("run", "out"))
    assert all(same_bits(saved[name], replayed[name]) for name in saved)
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "run"), *model, "--output", str(tmp_path / "no"), "--mode", "fused"]) == 2
    assert "take 'sequential'" in capsys.readouterr().err


def test_hybrid_trains_the_chosen_parameters_by_backpropagation(
    command: Callable[..., list[str]], tmp_path: Path, model_folder: Callable[[str], Path], capsys: Any
) -> None:
    """With lr = 0 the others stay as they were. A run without a journal takes an earlier one's away."""
    base = load_file(model_folder("llama") / "model.safetensors")
    assert main(command("mezo")) == 0
    for wanted, chosen in (("last-layer", "model.layers.1."), (r"norm\.weight$", "norm.weight")):
        own = [f"first_order_params={wanted}", "first_order_lr=0.01"]
        assert main(command("hybrid", "--lr", "0", "--overwrite", options=own)) == 0
        saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert {name for name in base if not torch.equal(base[name], saved[name])} == {name for name in base if chosen in name}
        assert not (tmp_path / "run" / files.JOURNAL).exists()
    for wanted, reason in (("nowhere", "matches no trained parameter"), ("(", "no regular expression")):
        assert main(command("hybrid", options=[f"first_order_params={wanted}"], output="no")) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("nonsense", [], "--method 'nonsense' must be one of mezo, sign"),
        (
            "mezo",
            ["--option", "rank=2"],
            "--option rank=2: --method mezo has no option 'rank': it has queries, one_sided, scale_free",
        ),
        ("conservative", ["--option", "queries=2"], "has no option 'queries': it has scale_free"),
        ("hybrid", ["--option", "first_order=lion"], "--option first_order=lion: must be one of sgd, adam, adamw"),
        ("mezo", ["--option", "queries=1.5"], "--option queries=1.5: give a whole number"),
        ("mezo", ["--option", "one_sided=1"], "--option one_sided=1: give true or false"),
        ("zo-adam", ["--option", "betas=0.9"], "--option betas=0.9: give 2 values with commas between them"),
        ("hizoo", ["--option", "alpha=nan"], "--option alpha=nan: give a finite number"),
        ("blockwise", ["--option", "by=[1]"], "give names with commas between them, or a JSON list"),
        ("mezo", ["--option", "queries=0"], "queries=0: give the number of directions"),
        ("zo-adam", ["--perturbation", "lazy"], "lazy=True merges a step's update"),
        ("lozo", ["--cuda-graph"], "cuda_graph=True with a method whose steps differ"),
        ("forward-grad", ["--perturbation", "inplace"], "estimator=ForwardGradient() differentiates the model"),
        ("mezo-inputs", ["--option", "rank=65"], "the space of the inputs: rank=65 must be"),
        ("mezo-inputs", ["--option", "matrices=nowhere"], "the space of the inputs: matrices=nowhere: no weight that is trained"),
        ("fzoo-inputs", ["--option", "rank=4", "--option", "others=gone"], "others='gone' must be one of"),
        ("fzoo-inputs", ["--peft", "lora", "--lora-init", "eva"], "--lora-init eva with --method fzoo-inputs: both take factors"),
        ("dizo", ["--option", "layers=nowhere"], "projection: no parameter matches ['nowhere']"),
    ],
)
def test_what_a_method_refuses(
    name: str, more: list[str], reason: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    """In one line, and before anything is written."""
    assert main(command(name, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zo-finetune: error: ") and reason in error
    assert not (tmp_path / "run").exists()


def test_options_are_read_by_their_type() -> None:
    def read(name: str, **given: str) -> dict[str, Any]:
        return methods.METHODS[name].options(given)

    assert read("mezo", queries="4", one_sided="True") == {"queries": 4, "one_sided": True, "scale_free": False}
    assert read("zo-adam", betas="0.8,0.99")["betas"] == (0.8, 0.99)
    assert read("blockwise") == {"by": "layer", "order": "cyclic", "every": 1, "scale_free": False}
    assert read("blockwise", by="attn,mlp,.")["by"] == ["attn", "mlp", "."]
    assert read("blockwise", by='["a{1,2}", "."]')["by"] == ["a{1,2}", "."]
    assert read("hizoo")["alpha"] == 1e-8
    assert methods.METHODS["hizoo"].options({}, "lora")["alpha"] == 1e-6  # the preset's, not the constructor's
    for method in methods.METHODS.values():  # what is written is read back
        defaults = {name: default for name, (_, default) in method.parameters().items()}
        again = method.options({name: values.written(value) for name, value in defaults.items()})
        assert {n: list(v) if isinstance(v, (list, tuple)) else v for n, v in again.items()} == {
            n: list(v) if isinstance(v, (list, tuple)) else v for n, v in defaults.items()
        }


def test_every_method_of_the_library_has_a_name_and_its_numbers_a_source(capsys: Any) -> None:
    reached = {m.constructor for m in methods.METHODS.values()} | {"HybridZO"}  # by a function here
    assert {m.__name__ for m in zk.optim.METHODS} <= reached
    with pytest.raises(SystemExit) as end:
        main(["train", "--list-methods"])
    assert end.value.code == 0
    listed = capsys.readouterr().out
    for method in methods.METHODS.values():
        assert f"{method.name}: {method.summary}" in listed
        for peft in methods.PEFTS:
            preset = method.preset(peft)
            assert preset.lr > 0 and (preset.eps is None if method.first_order else preset.eps > 0)
            assert preset.source.startswith("ours: ") or "arXiv" in preset.source or "README" in preset.source
            eps = "" if method.first_order else f", eps {preset.eps:g}"
            assert f"--peft {peft}: lr {preset.lr:g}{eps}" in listed and preset.source in listed
            method.options({}, peft)  # the preset's own options are the method's


@pytest.mark.parametrize(
    ("name", "given", "steps"), [("mezo", {}, 50), ("mezo", {"queries": "4"}, 12), ("fzoo", {}, 11), ("conservative", {}, 20)]
)
def test_forward_passes_pay_for_steps(name: str, given: dict[str, str], steps: int) -> None:
    method = methods.METHODS[name]
    options = method.options(given)
    assert method.steps(options, 100) == steps
    assert method.forwards(options, steps) <= 100 < method.forwards(options, steps + 1)


def test_dizos_projections_are_paid_for() -> None:
    method = methods.METHODS["dizo"]
    options = method.options({"every": "10", "inner": "3"})
    assert method.forwards(options, 9) == 18
    assert method.forwards(options, 10) == method.forwards(options, 11) - 2 == 20 + 6  # at the end of the tenth
    assert method.forwards({**options, "learn": "backpropagation"}, 10) == 20 + 9  # a forward, and a backward that counts as two
    for forwards in range(2, 200):
        steps = method.steps(options, forwards)
        assert method.forwards(options, steps) <= forwards < method.forwards(options, steps + 1)


def test_a_scale_free_method_takes_its_own_learning_rate() -> None:
    """Of the movement, where there is a measured one; what has no scale has no such option; and the step that is made divides."""
    model = torch.nn.Linear(3, 2)
    free = [m for m in methods.METHODS.values() if methods.FREE in m.parameters()]
    assert {m.name for m in methods.METHODS.values()} - {m.name for m in free} == {
        "sign", "hizoo", "fzoo", "fzoo-inputs", "sgd", "adam", "adamw",
    }  # fmt: skip
    for method in free:
        assert method.recipe("none", {methods.FREE: "true"}).lr == methods.MOVEMENTS["none"].lr
        assert method.recipe("none", {}).lr == method.preset("none").lr == method.recipe("none", {methods.FREE: "false"}).lr
        assert method.recipe("lora", {methods.FREE: "true"}, lr=0.5).lr == 0.5
        with pytest.raises(
            UserError, match="with --peft lora: lr is how far a step moves a weight then, and there is no measured one: give --lr"
        ):
            method.recipe("lora", {methods.FREE: "true"})
    for text, found in (("true", {"name": "scale-free", "beta": 0.99}), ("false", None)):
        made = methods.METHODS["momentum"].recipe("none", {methods.FREE: text}).make(model)
        assert made.method()["scale_free" if found else "rule"] == (found or made.method()["rule"])
        assert ("scale_free" in made.method()) == bool(found)
