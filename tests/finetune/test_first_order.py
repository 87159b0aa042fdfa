"""First-order fine-tuning: the bits of a plain loop of torch, what is skipped, refused and counted.

Belongs here: sgd, adam and adamw. Does not belong here: what every method has (test_methods.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.data import Batches
from zo_finetune.errors import UserError
from zo_finetune.first_order import FirstOrder
from zo_finetune.load import load
from zo_finetune.objectives import OBJECTIVES
from zo_finetune.run_folder import saved_config
from zo_finetune.train import make_optimizer, rate

from tests.kernels.cases import same_bits

Command = Callable[..., list[str]]


@pytest.fixture
def command(train_command: Command, tmp_path: Path) -> Command:
    def build(name: str, *more: str, output: str = "run", **options: Any) -> list[str]:
        return train_command(tmp_path / output, *more, method=name, dev_examples=0, eval_examples=4, seed=5, **options)

    return build


def plain_loop(config: Config, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[nn.Module, list[float]]:
    """The same run, written down: the model after it, and the norms of its gradients."""
    loaded = load(config)
    model, objective, norms = loaded.language_model.model, OBJECTIVES[loaded.task.objective], []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    base = optimizer.param_groups[0]["lr"]
    batches = Batches(loaded.train_set, config.batch_size * config.accumulate, config.seed)
    with loaded.scorer() as scorer:
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = base * rate(config, step)
            optimizer.zero_grad()
            for k in range(config.accumulate):
                batch = objective.batch(scorer, batches[step][k :: config.accumulate])
                (objective.loss(scorer, batch) / config.accumulate).backward()
            norms.append(float(nn.utils.clip_grad_norm_(trained, config.clip or float("inf"))))
            optimizer.step()
    return model, norms


@pytest.mark.parametrize(
    ("name", "more", "make"),
    [
        ("sgd", {"option": "momentum=0.5", "weight_decay": 0.1}, lambda ps: torch.optim.SGD(ps, 1e-2, momentum=0.5, weight_decay=0.1)),
        ("adam", {"accumulate": 2, "clip": 0.5, "lr_schedule": "cosine"}, lambda ps: torch.optim.Adam(ps, 1e-2)),
        ("adamw", {"peft": "lora", "weight_decay": 0.1}, lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1)),
    ],
)  # fmt: skip
def test_a_run_has_the_bits_of_a_plain_loop(name: str, more: dict[str, Any], make: Any, command: Command, tmp_path: Path) -> None:
    assert main(command(name, lr="1e-2", steps=3, **more)) == 0
    run = tmp_path / "run"
    model, norms = plain_loop(saved_config(run), make)
    saved = load_file(next(run.glob("*/*.safetensors")))
    if "peft" in more:
        want = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    else:
        want = {n: p for n, p in model.named_parameters() if n in saved}
    assert want.keys() == saved.keys() and all(same_bits(saved[n], p.detach()) for n, p in want.items())
    log = [line.split(",") for line in (run / "log.csv").read_text().splitlines()[1:]]
    assert [float(row[2]) for row in log] == norms  # before the clip
    result = json.loads((run / "result.json").read_text())
    trained = result["weights"]["trainable"]
    assert result["forwards"] == 9 and result["hyperparameters"]["eps"] is None
    assert result["gradient_bytes"] == 4 * trained
    numbers = 4 * sum(p.requires_grad for p in model.parameters()) if name != "sgd" else 0  # Adam's counts of steps
    assert result["state_bytes"] == (4 if name == "sgd" else 8) * trained + numbers


@pytest.mark.parametrize("peft", ["lora", "ln", "prefix", "prompt"])
def test_adapters_alone_are_trained(
    peft: str, train_command: Command, data_folder: Path, model_folder: Any, tmp_path: Path
) -> None:
    config = Config(
        model=str(model_folder("llama")),
        task="sst2",
        data=str(data_folder),
        output=str(tmp_path),
        peft=peft,
        method="adam",
        device="cpu",
    )
    loaded = load(config)
    before = {n: p.detach().clone() for n, p in loaded.language_model.model.named_parameters()}
    optimizer, objective = make_optimizer(loaded.language_model, config), OBJECTIVES[loaded.task.objective]
    with loaded.scorer() as scorer:
        batch = objective.batch(scorer, loaded.train_set[:4])
        for _ in range(2):  # LoRA's A moves once B is not 0
            optimizer.step(lambda batch: objective.loss(scorer, batch), [batch])
    for name, p in loaded.language_model.model.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name
    assert optimizer.skipped == 0 and 0 < optimizer.projected_gradient < torch.inf


class Line(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_whose_gradient_is_not_finite_is_skipped(bad: float) -> None:
    model = Line()
    optimizer = FirstOrder(model, "adam", 0.1)
    optimizer.step(model, [torch.ones(2)])
    weights, state = model.w.detach().clone(), optimizer.state_bytes()
    moments = [t.clone() for t in optimizer.state[model.w].values()]
    optimizer.step(model, [torch.ones(2), torch.tensor([1.0, bad])])
    # a finite loss with a gradient that is not
    optimizer.step(lambda x: (model.w - model.w.detach()).abs().sum().sqrt(), [torch.ones(2)])
    assert (optimizer.steps, optimizer.skipped, optimizer.state_bytes()) == (3, 2, state)
    assert torch.equal(model.w, weights) and model.w.grad is None
    assert all(torch.equal(a, b) for a, b in zip(moments, optimizer.state[model.w].values(), strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_step_leaves_everything(error: type[BaseException]) -> None:
    model = Line()
    optimizer = FirstOrder(model, "adamw", 0.1, weight_decay=0.1)
    optimizer.step(model, [torch.ones(2)])
    weights = model.w.detach().clone()

    def closure(x: Tensor) -> Tensor:
        if x[0] == 2:
            raise error
        return model(x)

    with pytest.raises(error):
        optimizer.step(closure, [torch.ones(2), 2 * torch.ones(2)])
    assert torch.equal(model.w, weights) and model.w.grad is None and (optimizer.steps, optimizer.skipped) == (1, 0)
    with pytest.raises(UserError, match="the objective has no gradient"):
        optimizer.step(lambda x: torch.zeros(()), [torch.ones(2)])
    assert torch.equal(model.w, weights) and optimizer.steps == 1


def test_sixteen_bits(command: Command, tmp_path: Path, capsys: Any) -> None:
    """Never silently: fp16 is refused, bf16 is trained with a word."""
    assert main(command("adam", dtype="float16")) == 2
    assert "--dtype float16: gradients of fp16 weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    model = Line(torch.bfloat16)
    with pytest.warns(UserWarning, match="less than about 1/512 of a weight is lost"):
        optimizer = FirstOrder(model, "sgd", 0.1)
    optimizer.step(model, [torch.ones(2)])
    assert model.w.dtype == torch.bfloat16 and optimizer.projected_gradient.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--eps", "1e-3"], "--eps 0.001"),
        (["--perturbation", "inplace"], "--perturbation inplace"),
        (["--rounding", "stochastic"], "--rounding stochastic"),
        (["--cuda-graph"], "--cuda-graph True"),
        (["--backend", "cpu"], "--backend cpu"),
    ],
)
def test_what_nothing_would_read_is_refused(given: list[str], said: str, command: Command, tmp_path: Path, capsys: Any) -> None:
    assert main(command("adam", *given)) == 2
    assert f"{said} is of methods that perturb weights, and --method adam does not: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compared_at_equal_cost(train_command: Command, tmp_path: Path, capsys: Any) -> None:
    """Options of the methods that perturb weights are shared with those alone; three forwards a step."""
    out = tmp_path / "out"
    more = {"command": "compare", "steps": None, "dev_examples": 0, "points": 0, "seeds": "0", "forwards": 12, "device": "cpu"}
    assert main(train_command(out, methods="mezo,adam", perturbation="inplace", **more)) == 0
    steps = {row["method"]: row["steps"] for row in json.loads((out / "compare.json").read_text())["runs"]}
    assert steps == {"mezo": 6, "adam": 4}
    kinds = {name: saved_config(next((out / "runs" / name).iterdir())).perturbation for name in steps}
    assert kinds == {"mezo": "inplace", "adam": "auto"}
    assert main(train_command(tmp_path / "no", methods="sgd,adam", perturbation="inplace", **more)) == 2
    assert "--perturbation inplace is of methods that perturb weights, and --method sgd does not" in capsys.readouterr().err
