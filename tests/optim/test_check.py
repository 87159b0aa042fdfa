"""The user is told: `zk.check` on mistakes and on sound set-ups, what a step says by itself, and what is refused before anything is changed."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import zo_kernels as zk
from tests.optim import emulated_graph, models
from zo_kernels import journal
from zo_kernels.optim import evaluate, findings
from zo_kernels.optim.refresh import trained

IDS = models.tokens()
cross_entropy = nn.functional.cross_entropy


class Case(NamedTuple):
    step: zk.ZOStep
    closure: Callable[..., Any]
    batches: Any = None


def lora(*, more: bool = False) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(models.make("llama"), config)  # type: ignore[arg-type]
    if more:
        model.add_adapter("other", config)
    return model.eval()


def masked(dtype: torch.dtype, eps: float = 1e-3, **more: Any) -> tuple[nn.Module, zk.ZOStep]:
    model = models.make("roberta", dtype)
    return model, zk.MeZOStep(model, lr=0.0, eps=eps, **more)


def told(run: Callable[[], Any]) -> list[str]:
    """What the user reads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, zk.ZOWarning)]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal losses are told of after fewer steps than elsewhere: what is seen is a count."""
    monkeypatch.setattr(findings, "EQUAL", 20)
    monkeypatch.setattr(findings, "MEMBERS", 10)


def steps(optimizer: zk.ZOStep, closure: Callable[..., Any], n: int, batches: Any = None) -> list[str]:
    return told(lambda: [optimizer.step(closure, batches) for _ in range(n)])


# ---- mistakes ---------------------------------------------------------------------------------------------------------


def own_loss_in_16_bits() -> Case:
    model, optimizer = masked(torch.bfloat16)
    return Case(optimizer, lambda: model(input_ids=IDS, labels=IDS).loss)


def own_loss_made_float_too_late() -> Case:
    model, optimizer = masked(torch.bfloat16)
    return Case(optimizer, lambda ids: model(input_ids=ids, labels=ids).loss.float(), [IDS, IDS[1:]])


def a_generator_object() -> Case:
    model, rng = models.make("llama"), np.random.default_rng(0)
    return Case(zk.MeZOStep(model, lr=0.0), lambda: models.loss_of(model, IDS[rng.integers(0, 3, 2)]))


def an_iterator() -> Case:
    model, batches = models.make("llama"), iter([models.tokens(seed=k) for k in range(20)])
    return Case(zk.MeZOStep(model, lr=0.0), lambda: models.loss_of(model, next(batches)))


def dropout_of_its_own() -> Case:
    model, generator = models.make("llama"), torch.Generator()

    def closure() -> Tensor:
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        return model.lm_head(hidden * torch.empty_like(hidden).bernoulli_(0.9, generator=generator)).square().mean()

    return Case(zk.MeZOStep(model, lr=0.0), closure)


def batch_norm_in_train_mode() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(16, 8)
    return Case(zk.MeZOStep(model, lr=0.0), lambda: model(x).square().mean())


def another_model() -> Case:
    other = models.make("llama", seed=1)
    return Case(zk.MeZOStep(models.make("llama"), lr=1e-2), lambda: models.loss_of(other, IDS))


def another_adapter() -> Case:
    model = lora(more=True)
    optimizer = zk.MeZOStep(model, lr=1e-2)
    model.set_adapter("other")
    return Case(optimizer, lambda: models.loss_of(model, IDS))


def an_adapter_switched_off() -> Case:
    model = lora()

    def closure() -> Tensor:
        with model.disable_adapter():
            return models.loss_of(model, IDS)

    return Case(zk.MeZOStep(model, lr=1e-2), closure)


def a_merged_adapter() -> Case:
    model = lora()
    optimizer = zk.MeZOStep(model, lr=1e-2)
    merged = model.merge_and_unload()
    return Case(optimizer, lambda: models.loss_of(merged, IDS))


def a_replaced_head() -> Case:
    model: Any = models.make("llama")
    optimizer = zk.MeZOStep(model, lr=1e-2)
    model.lm_head = nn.Linear(32, models.VOCABULARY, bias=False)
    return Case(optimizer, lambda: models.loss_of(model, IDS))


def a_replaced_head_that_was_tied() -> Case:
    model: Any = models.make("llama-tied")
    optimizer = zk.MeZOStep(model, lr=1e-2)
    model.lm_head = nn.Linear(32, models.VOCABULARY, bias=False)
    return Case(optimizer, lambda: models.loss_of(model, IDS))


def norms_in_16_bits() -> Case:
    model = models.make("llama", torch.bfloat16)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    return Case(zk.MeZOStep(model, lr=0.0), lambda: models.loss_of(model, IDS))


def too_small_an_eps() -> Case:
    model = models.make("llama")
    return Case(zk.MeZOStep(model, lr=0.0, eps=1e-11), lambda: models.loss_of(model, IDS))


def a_loss_that_is_not_finite() -> Case:
    model = models.make("llama")
    nothing = torch.full((11,), -100)
    return Case(zk.MeZOStep(model, lr=0.0), lambda: cross_entropy(model(input_ids=IDS).logits[0], nothing))


def a_constant() -> Case:
    return Case(zk.MeZOStep(models.make("llama"), lr=0.0), lambda: 0.37)


def logits_of_before() -> Case:
    model = models.make("llama")
    logits = model(input_ids=IDS).logits.detach()
    return Case(zk.MeZOStep(model, lr=0.0), lambda: cross_entropy(logits.flatten(0, 1), IDS.flatten()))


def accuracy(maximize: bool = True) -> Case:
    model, ids = models.make("llama"), models.tokens(batch=16, length=30)
    return Case(
        zk.MeZOStep(model, lr=1e-4, eps=1e-2, maximize=maximize),
        lambda: float((model(input_ids=ids).logits.argmax(-1) == ids).float().mean()),
    )


def an_accuracy_that_steps_lower() -> Case:
    return accuracy(maximize=False)


MISTAKES = [
    (own_loss_in_16_bits, "grain", "mistake"), (own_loss_made_float_too_late, "grain", "mistake"), (a_generator_object, "repeat", "mistake"),
    (an_iterator, "repeat", "mistake"), (dropout_of_its_own, "repeat", "mistake"), (batch_norm_in_train_mode, "buffers", "warning"),
    (another_model, "reads", "mistake"), (another_adapter, "model", "mistake"), (an_adapter_switched_off, "reads", "mistake"),
    (a_merged_adapter, "model", "mistake"), (a_replaced_head, "model", "mistake"), (a_replaced_head_that_was_tied, "model", "warning"),
    (norms_in_16_bits, "weights", "mistake"), (too_small_an_eps, "weights", "mistake"), (a_loss_that_is_not_finite, "loss", "mistake"),
    (a_constant, "reads", "mistake"), (logits_of_before, "reads", "mistake"), (an_accuracy_that_steps_lower, "aim", "warning"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "name", "status"), MISTAKES, ids=[b.__name__ for b, *_ in MISTAKES])
def test_check_finds(build: Callable[[], Case], name: str, status: str) -> None:
    case = build()
    report = zk.check(*case)
    assert not report.ok
    found = report[name]
    assert found.status == status, report
    assert name == "model" or found.remedy
    assert f"{status.upper():<8} {name}" in str(report)
    if name in ("repeat", "buffers"):  # nothing else is wrong with these
        assert [f.name for f in (*report.mistakes, *report.warnings)] == [name], report


@pytest.mark.parametrize("name", ["reads", "repeat", "grain"])
def test_check_in_place_finds_the_same(name: str) -> None:
    """A list of tensors: one that reads nothing, one that does not repeat, one in 16 bits."""
    model, rng = models.make("llama"), np.random.default_rng(0)
    closures: dict[str, Callable[[], Any]] = {
        "reads": lambda: 1.5,
        "repeat": lambda: models.loss_of(model, IDS[rng.integers(0, 3, 2)]),
        "grain": lambda: models.loss_of(model, IDS).bfloat16().float(),
    }
    report = zk.check(zk.MeZOStep(list(model.named_parameters()), lr=0.0), closures[name])
    assert [f.name for f in report.mistakes if f.name != "difference"] == [name], report


def test_check_names_the_tensors() -> None:
    model = lora(more=True)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    model.base_model.set_adapter("default")
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    report = zk.check(zk.MeZOStep(model, lr=0.0), lambda: models.loss_of(model, IDS))
    assert report["reads"].status == "warning"
    assert len(report["reads"].tensors) == 4 and all("other" in n for n in report["reads"].tensors)
    case = norms_in_16_bits()
    assert set(zk.check(*case)["weights"].tensors) == set(trained(case.step.param_groups))


# ---- sound set-ups ----------------------------------------------------------------------------------------------------


def family(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    model = models.make(name, dtype)
    return Case(zk.MeZOStep(model, lr=1e-4, **more), lambda: models.loss_of(model, IDS))


def t5() -> Case:
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=models.VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()
    return Case(zk.MeZOStep(model, lr=1e-4), lambda: model(input_ids=IDS, labels=IDS).loss)


def accumulation() -> Case:
    model = models.make("opt")
    return Case(zk.MeZOStep(model, lr=1e-4), lambda ids: models.loss_of(model, ids), [IDS, IDS[1:], IDS[:1]])


def dropout() -> Case:
    torch.manual_seed(0)
    config = tf.OPTConfig(**models.SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.1)
    model = tf.OPTForCausalLM(config).train()
    return Case(zk.MeZOStep(model, lr=1e-4), lambda: models.loss_of(model, IDS))


def scripted() -> Case:
    """No attribute of its modules can stand in for a weight, and no function mode sees its reads."""
    torch.manual_seed(0)
    model, x = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))), torch.randn(16, 8)
    return Case(zk.MeZOStep(model, lr=1e-4, perturbation="inplace"), lambda: model(x).square().mean())


class Nothing(nn.Module):
    """With a parameter of no elements, as a vocabulary's last part of no words is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.some, self.none, self.x = nn.Linear(8, 1), nn.Parameter(torch.zeros(0, 3)), torch.randn(16, 8)

    def forward(self) -> Tensor:
        return self.some(self.x).square().mean() + self.none.sum()


SOUND: dict[str, Callable[[], Case]] = {
    "causal": lambda: family("llama-tied"),
    "masked": lambda: family("roberta"),
    "t5": t5,
    "lora": lambda: family("lora"),
    "prefix": lambda: family("prefix"),
    "16 bits": lambda: family("llama", torch.float16),
    "accumulation": accumulation,
    "accuracy": accuracy,
    "dropout": dropout,
    "in place": lambda: family("gpt2", perturbation="inplace", lazy=True),
    "buffer": lambda: family("llama", scratch_bytes=4096),
    "forward gradient": lambda: Case(zk.ForwardGrad(model := models.make("llama"), lr=1e-4), lambda: models.loss_of(model, IDS)),
    "low rank": lambda: Case(zk.LOZO(model := models.make("llama"), lr=1e-4), lambda: models.loss_of(model, IDS)),
    "blocks": lambda: Case(zk.BlockwiseZO(model := models.make("llama"), lr=1e-4), lambda: models.loss_of(model, IDS)),
    "sparse": lambda: Case(zk.SparseMeZO(model := models.make("llama"), lr=1e-4), lambda: models.loss_of(model, IDS)),
    "conservative": lambda: Case(zk.ZOConservative(model := models.make("llama"), lr=1e-4), lambda: models.loss_of(model, IDS)),
    "scripted": scripted,
    "no elements": lambda: Case(zk.MeZOStep(model := Nothing(), lr=1e-4), model),
    "hessian": lambda: Case(zk.HiZOO(model := models.make("llama"), lr=1e-6), lambda: models.loss_of(model, IDS)),
}


@pytest.mark.parametrize("name", SOUND)
def test_check_and_steps_are_silent_on(name: str) -> None:
    case = SOUND[name]()
    report = zk.check(*case)
    assert report.ok, report
    assert not steps(case.step, case.closure, 5, case.batches)
    assert zk.check(*case).ok


def test_check_and_steps_are_silent_on_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_graph.install(monkeypatch)
    model = models.make("llama")
    optimizer = zk.MeZOStep(model, lr=1e-4, cuda_graph=True)

    def closure(ids: Tensor) -> Tensor:
        return models.loss_of(model, ids)

    assert zk.check(optimizer, closure, [IDS]).ok
    assert not steps(optimizer, closure, 6, [IDS])
    assert [made.replays for made in emulated_graph.Emulated.made] == [6]
    assert zk.check(optimizer, closure, [IDS]).ok


# ---- nothing is changed -----------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Buffers that forwards write to and replace, dropout, and draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.a(x)), 0.1) * (1 + np.random.rand() + random.random())
        self.last = x.detach().mean(0)
        return self.b(x).square().mean()


def everything(model: nn.Module, optimizer: zk.ZOStep) -> list[Any]:
    """But for the buffers of a model that the optimizer does not know."""
    run = copy.deepcopy(optimizer._run)
    return [
        {n: t.clone() for n, t in (*model.named_parameters(), *(model.named_buffers() if optimizer._model is not None else ()))},
        torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(),
        run.tag, run.skipped, list(run.past), run.rule.tensors, [p.grad for p in model.parameters()],
    ]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


MODES: dict[str, Callable[[nn.Module], zk.ZOStep]] = {
    "scratch": lambda m: zk.MeZOStep(m, 1e-3, 1e-2),
    "inplace": lambda m: zk.MeZOStep(m, 1e-3, 1e-2, perturbation="inplace"),
    "lazy": lambda m: zk.MeZOStep(m, 1e-3, 1e-2, perturbation="inplace", lazy=True),
    "list": lambda m: zk.MeZOStep(list(m.named_parameters()), 1e-3, 1e-2, perturbation="inplace"),
    "adam": lambda m: zk.ZOAdam(m, 1e-3, 1e-2),
    "sparse": lambda m: zk.SparseMeZO(m, 1e-3, 1e-2),
    "low rank": lambda m: zk.LOZO(m, 1e-3, 1e-2),
    "projection": lambda m: zk.DiZO(m, 1e-3, 1e-2, every=2, inner=2, layers=["a.weight"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_check_changes_nothing(mode: str, dtype: torch.dtype) -> None:
    def run(checked: bool) -> list[Any]:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        model = Restless().to(dtype)
        x = torch.randn(16, 8).to(dtype)
        optimizer = MODES[mode](model)

        def closure() -> Tensor:
            return model(x).float()

        for k in range(4):
            if checked:
                before = everything(model, optimizer)
                report = zk.check(optimizer, closure)
                assert ("buffers" in report) == (optimizer._model is not None)
                if optimizer._model is not None:
                    assert report["buffers"].tensors == (
                        "last",
                        "norm.num_batches_tracked",
                        "norm.running_mean",
                        "norm.running_var",
                    )
                assert same(before, everything(model, optimizer)), k
            optimizer.step(closure)
        optimizer.flush()
        return everything(model, optimizer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(run(False), run(True))


def test_check_of_a_recorded_run(tmp_path: Path) -> None:
    model = models.make("llama")
    optimizer = zk.MeZOStep(model, 1e-3, journal=tmp_path / "r.zoj")
    optimizer.step(lambda: models.loss_of(model, IDS))
    zk.check(optimizer, lambda: models.loss_of(model, IDS))
    optimizer.step(lambda: models.loss_of(model, IDS))
    optimizer.close_journal()
    past = journal.read(tmp_path / "r.zoj")
    assert len(past) == 2
    zk.replay(again := models.make("llama"), past)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


class Wrong(Exception):
    pass


@pytest.mark.parametrize("mode", ["scratch", "inplace", "lazy"])
@pytest.mark.parametrize("at", range(9))
def test_a_check_that_fails_changes_nothing(mode: str, at: int) -> None:
    torch.manual_seed(0)
    model = Restless()
    x = torch.randn(16, 8)
    optimizer = MODES[mode](model)
    optimizer.step(lambda: model(x))
    before = everything(model, optimizer)
    calls = iter(range(100))

    def closure() -> Tensor:
        loss = model(x)
        if next(calls) == at:
            raise Wrong
        return loss  # type: ignore[no-any-return]

    with pytest.raises(Wrong):
        zk.check(optimizer, closure)
    assert same(before, everything(model, optimizer))
    optimizer.step(lambda: model(x))


def test_check_refuses_what_a_step_refuses() -> None:
    model = models.make("llama")
    optimizer = zk.MeZOStep(model, lr=1e-3)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="closure returned None"):
        zk.check(optimizer, lambda: None)
    with pytest.raises(TypeError, match="closure=3"):
        zk.check(optimizer, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batches is a dict"):
        zk.check(optimizer, lambda b: 0.0, {"ids": IDS})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"step\(\) of an optimizer whose step is under way"):
        zk.check(optimizer, lambda: optimizer.step(lambda: models.loss_of(model, IDS)))
    with pytest.raises(RuntimeError, match="written to"):
        zk.check(optimizer, lambda: next(model.parameters()).add_(1).sum())

    @torch.enable_grad()
    def closure() -> Tensor:
        loss = models.loss_of(model, IDS)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="backward"):
        zk.check(optimizer, closure)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert zk.check(optimizer, lambda: models.loss_of(model, IDS)).ok


# ---- what a step says by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [own_loss_in_16_bits, own_loss_made_float_too_late])
@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_a_step_tells_of_a_loss_in_16_bits_once(build: Callable[[], Case], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = zk.MeZOStep
    monkeypatch.setattr(zk, "MeZOStep", lambda *a, **k: make(*a, perturbation=mode, **k))
    case = build()
    words = steps(case.step, case.closure, 6, case.batches)
    assert len(words) == 1
    assert "16 bits (bfloat16" in words[0] and "multiple of 15.6" in words[0] and "float32" in words[0]


def test_a_warning_points_at_the_step(recwarn: pytest.WarningsRecorder) -> None:
    optimizer = zk.MeZOStep(models.make("llama"), lr=0.0)
    optimizer.step(lambda: 0.3)
    (found,) = [w for w in recwarn if w.category is zk.ZOWarning]
    assert found.filename == __file__


def test_a_step_is_silent_on_a_float32_loss_of_16_bit_logits() -> None:
    model, optimizer = masked(torch.bfloat16)
    assert not steps(optimizer, lambda: cross_entropy(model(input_ids=IDS).logits.float().flatten(0, 1), IDS.flatten()), 6)


def test_a_step_tells_of_norms_in_16_bits() -> None:
    case = norms_in_16_bits()
    words = steps(case.step, case.closure, 6)
    assert len(words) == 1
    assert "norm" in words[0] and "bfloat16" in words[0] and "requires_grad_(False)" in words[0]
    case.step.param_groups[0]["eps"] = 0.05
    assert zk.check(*case)["weights"].status == "ok"


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize("build", [another_model, an_adapter_switched_off, a_constant, logits_of_before])
@pytest.mark.usefixtures("soon")
def test_a_step_tells_that_nothing_is_read(build: Callable[[], Case], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = zk.MeZOStep
    monkeypatch.setattr(zk, "MeZOStep", lambda *a, **k: make(*a, perturbation=mode, **k))
    case = build()
    words = steps(case.step, case.closure, 2 * findings.EQUAL)
    assert len(words) == 1
    assert "no effect" in words[0]


@pytest.mark.parametrize("reads", [True, False])
def test_a_scripted_module_in_scratch_mode_is_told_of_when_it_is_not_read(reads: bool) -> None:
    case = scripted()
    optimizer = zk.MeZOStep(case.step._model, lr=1e-4, perturbation="scratch")
    words = steps(optimizer, case.closure if reads else lambda: 1.0, 5)
    assert ["in ways that their modules' attributes do not show" in words[0], len(words)] == [True, 2 - reads]
    assert reads or "no effect" in words[1]


def test_a_step_tells_that_another_adapter_is_active() -> None:
    (frozen, unowned) = steps(*another_adapter()[:2], 6)
    assert "all parameters of this optimizer are frozen" in frozen
    assert "4 trainable parameters of the model are not in this optimizer" in unowned and "other" in unowned


@pytest.mark.parametrize("build", [a_merged_adapter, a_replaced_head])
def test_a_step_refuses_a_model_that_lost_parameters(build: Callable[[], Case]) -> None:
    case = build()
    weights = [p.detach().clone() for p in trained(case.step.param_groups).values()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no longer in the model"):
            case.step.step(case.closure)
    assert all(map(torch.equal, weights, trained(case.step.param_groups).values()))


def test_a_step_tells_of_parameters_that_came_later() -> None:
    case = a_replaced_head_that_was_tied()
    (words,) = steps(case.step, case.closure, 3)
    assert "1 trainable parameters of the model are not in this optimizer" in words and "lm_head.weight" in words
    model = models.make("llama")
    model.get_submodule("lm_head").requires_grad_(False)
    optimizer = zk.MeZOStep(model, lr=0.0)
    assert not steps(optimizer, lambda: models.loss_of(model, IDS), 2)
    model.get_submodule("lm_head").requires_grad_(True)
    model.get_submodule("model.norm").requires_grad_(False)  # the view is made anew
    assert "lm_head.weight" in steps(optimizer, lambda: models.loss_of(model, IDS), 1)[0]


@pytest.mark.usefixtures("soon")
def test_a_run_tells_of_parameters_that_are_unfrozen_in_it() -> None:
    """Gradual unfreezing: what was frozen when the optimizer was made is none of its parameters."""
    model = models.make("llama")
    model.get_submodule("lm_head").requires_grad_(False)
    optimizer = zk.MeZOStep(model, lr=0.0)
    assert not steps(optimizer, lambda: models.loss_of(model, IDS), findings.FIRST + 1)
    model.get_submodule("lm_head").requires_grad_(True)
    (words,) = steps(optimizer, lambda: models.loss_of(model, IDS), findings.MEMBERS)
    assert "1 trainable parameters of the model are not in this optimizer" in words and "lm_head.weight" in words


def test_a_step_of_chosen_parameters_is_silent_about_the_others() -> None:
    model = models.make("llama")
    chosen = [(n, p) for n, p in model.named_parameters() if "norm" in n]
    other = torch.optim.SGD([p for n, p in model.named_parameters() if "norm" not in n], lr=0.0)
    for optimizer in (zk.MeZOStep(chosen, 0.0, model=model), zk.HybridZO(model, 0.0, first_order=other)):
        assert not steps(optimizer, lambda: models.loss_of(model, IDS), 3)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize("estimator", [zk.TwoSided(), zk.Shaped(3), zk.Shaped(2, "z-scored")], ids=str)
def test_equal_rewards_are_told_after_many(estimator: Any, mode: str) -> None:
    """A count over few examples is the same at all points for a while."""
    model = models.make("llama", torch.bfloat16 if mode == "scratch" else torch.float32)
    optimizer = zk.ZOStep(model, 0.0, estimator=estimator, perturbation=mode)

    def closure() -> float:
        return float((model(input_ids=IDS[:1, :2]).logits.argmax(-1) == -1).sum() / 3 + 1 / 3)

    assert not steps(optimizer, closure, findings.EQUAL - 1)
    (words,) = steps(optimizer, closure, 3)
    assert "g was 0" in words and "accuracy" in words and "zk.check" in words
    assert not steps(optimizer, closure, findings.EQUAL)
    assert optimizer.skipped == 0
    optimizer = zk.ZOStep(model, 0.0, perturbation=mode)  # one step with a slope, and the count begins anew
    assert not steps(optimizer, closure, findings.EQUAL - 1)
    assert not steps(optimizer, lambda: models.loss_of(model, IDS), 1)
    assert not steps(optimizer, closure, findings.EQUAL - 1)


@pytest.mark.usefixtures("soon")
def test_skipped_steps_in_a_row_are_told() -> None:
    model = models.make("llama")
    good, bad = (lambda: models.loss_of(model, IDS)), (lambda: models.loss_of(model, IDS) * float("nan"))
    optimizer = zk.MeZOStep(model, lr=0.0)
    assert not steps(optimizer, bad, findings.FIRST - 1)
    assert "4 steps in a row were skipped" in steps(optimizer, bad, 1)[0]
    optimizer = zk.MeZOStep(model, lr=0.0)
    assert not steps(optimizer, good, 1)
    for _ in range(3):
        assert not steps(optimizer, bad, findings.SKIPPED - 1)
        assert not steps(optimizer, good, 1)
    assert "10 steps in a row were skipped" in steps(optimizer, bad, findings.SKIPPED)[0]
    assert not steps(optimizer, bad, 20)
    equal = zk.FZOO(model, lr=0.0)  # 0 / 0 is no number, and no loss that is not finite
    assert "g was 0" in steps(equal, lambda: float(models.loss_of(model, IDS) > 0), findings.EQUAL)[0]


def test_later_steps_on_a_device_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the numbers stay tensors; reading one is `_local_scalar_dense`."""
    monkeypatch.setattr(evaluate, "on_host", lambda device: False)
    model = models.make("llama")
    optimizer = zk.MeZOStep(model, lr=1e-3)

    class Counts(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.waits += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    waits = []
    for _ in range(8):
        with Counts() as counts:
            optimizer.step(lambda: models.loss_of(model, IDS))
        waits.append(counts.waits)
    passes = waits[-1]  # of the backend, which is the CPU's here
    assert waits[findings.FIRST :] == [passes] * 4
    assert all(w > passes for w in waits[: findings.FIRST])
    assert "no effect" in steps(zk.MeZOStep(model, lr=0.0), lambda: torch.tensor(0.3), 1)[0]
    monkeypatch.setattr(findings, "RARELY", 8)
    optimizer = zk.MeZOStep(model, lr=0.0)
    assert not steps(optimizer, lambda: models.loss_of(model, IDS), 7)
    nothing = model(input_ids=IDS).logits.flatten()[0] * 0
    assert not steps(optimizer, lambda: nothing, findings.EQUAL)
    assert "g was 0" in steps(optimizer, lambda: nothing, 1)[0]


def test_a_copied_optimizer_says_nothing_twice() -> None:
    case = own_loss_in_16_bits()
    assert len(steps(case.step, case.closure, 2)) == 1
    _, again = copy.deepcopy((case.step._model, case.step))
    assert not steps(again, case.closure, 2)


# ---- what the findings rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.7, 0.13, 2.0, 6e4, 1e-6, 0.0])
def test_the_share_that_moves_is_the_share_that_moves(kind: str, dtype: torch.dtype, value: float) -> None:
    eps = 1e-3 if dtype != torch.float32 else 1e-3 * 2.0**-14
    w = torch.full((1 << 15,), value, dtype=dtype)
    share = findings.moved({"w": (w, eps)}, kind)["w"]
    shifted = w.clone()
    zk.perturb_([shifted], [(3, eps)], seed=0, streams=[1], kind=kind)
    measured = float((shifted != w).double().mean())
    assert share == pytest.approx(measured, abs=0.012)  # four standard deviations of a mean of 2^15


def test_shares_of_several_tensors() -> None:
    w = torch.ones(300, dtype=torch.bfloat16)
    w[::2] = 0.01
    params = {
        "half": (w[:200], 1e-3),
        "ones": (torch.ones(3, 4), 1e-3),
        "b": (torch.ones(5, dtype=torch.bfloat16), 1e-3),
        "none": (w[:0], 1e-3),
    }
    shares = findings.moved(params, "gaussian")
    assert set(shares) == {"half", "ones", "b"}
    assert shares["ones"] > 0.999 and shares["b"] == pytest.approx(0.0257, abs=1e-3)
    assert shares["half"] == pytest.approx((shares["b"] + 0.98) / 2, abs=0.02)
    eps = findings.enough(torch.ones(9, dtype=torch.bfloat16))
    assert findings.moved({"w": (torch.ones(9, dtype=torch.bfloat16), eps)}, "gaussian")["w"] > 0.75


B, H, F = torch.bfloat16, torch.float16, torch.float32
LOSSES: list[tuple[str, list[float], Any, bool, Any]] = [
    ("bfloat16", [5.34375, 5.375, 5.3125, 5.28125], F, True, B),
    ("bfloat16 of a float32 model", [5.34375, 5.375, 5.3125, 5.28125], F, False, B),
    ("bfloat16 near 0.7", [0.69140625, 0.6953125, 0.69140625, 0.69140625], F, True, B),
    ("float16", [0.69189453125, 0.6923828125, 0.69287109375, 0.6923828125], F, True, H),
    ("one 16-bit tensor tells", [0.5], B, False, B),
    ("too few to tell", [5.34375, 5.375, 5.3125], F, True, None),
    ("one is finer", [5.34375, 5.375, 5.3125, 5.281251], F, True, None),
    ("saturated", [1.0, 1.0, 0.0, 1.0, 0.5, 0.75], float, True, None),
    ("accuracy over 32", [k / 32 for k in range(20, 32)], float, True, None),
    ("accuracy over 256 of a float32 model", [k / 256 for k in range(200, 232)], float, False, None),
    ("accuracy over 30", [k / 30 for k in range(9, 20)], F, True, None),
    ("whole numbers", [129.0, 131.0, 133.0, 135.0], int, True, None),
    ("whole tensors", [129.0, 131.0, 133.0, 135.0], torch.int64, True, None),
    ("ordinary", [0.6931472, 0.6931475, 0.6931469, 0.6931470], F, True, None),
]


@pytest.mark.parametrize(("values", "kind", "model_has", "expected"), [row[1:] for row in LOSSES], ids=[row[0] for row in LOSSES])
def test_which_losses_are_of_16_bits(values: list[float], kind: Any, model_has: bool, expected: Any) -> None:
    values = [float(torch.tensor(v)) for v in values]
    assert findings.sixteen_bits(values, [kind] * len(values), model_has) == expected


SHARES: list[tuple[str, list[float], int | None]] = [
    ("accuracies over 30", [9 / 30, 11 / 30, 0.0], 30),
    ("their least n", [10 / 32, 12 / 32, 1.0], 16),
    ("over 1000, in float64", [0.901, 0.9], 1000),
    ("all or nothing", [0.0, 1.0], 1),
    ("one value", [0.5, 0.5], None),
    ("minus a reward", [-0.25, -0.5], None),
    ("counts", [3.0, 4.0], None),
    ("a cross-entropy", [0.6931472, 0.6931475], None),
    ("one is finer", [0.25, 0.5, 0.7500001], None),
    ("not finite", [0.5, float("nan"), float("inf")], None),
    ("nothing", [], None),
]


@pytest.mark.parametrize(("values", "expected"), [row[1:] for row in SHARES], ids=[row[0] for row in SHARES])
@pytest.mark.parametrize("rounded", [True, False], ids=["float32", "float64"])
def test_which_losses_are_shares(values: list[float], expected: int | None, rounded: bool) -> None:
    assert findings.shares_of([float(torch.tensor(v)) for v in values] if rounded else values) == expected


@pytest.mark.parametrize(("signs", "words"), [([True], "larger"), ([False], "smaller"), ([True, False], "up for some")])
def test_check_says_where_steps_go(signs: list[bool], words: str) -> None:
    layers = [nn.Linear(4, 1) for _ in signs]
    groups = [{"params": list(m.parameters()), "maximize": up} for m, up in zip(layers, signs, strict=True)]
    found = zk.check(zk.MeZOStep(groups, lr=0.1), lambda: sum(m(torch.ones(2, 4)).square().mean() for m in layers))["aim"]
    assert found.status == "ok" and words in found.text


def test_a_16_bit_loss_whose_differences_are_large_is_fine() -> None:
    assert findings.coarse(torch.bfloat16, [5.3, 4.1], [0.3, 0.4], 0.1) is None
    assert "multiple of 15.6" in str(findings.coarse(torch.bfloat16, [5.3, 5.4], [0.03, 0.0], 1e-3))
    assert "multiple of" in str(findings.coarse(torch.float16, [5.3, 5.4], [0.03, 0.0], 1e-3))  # 8 grains are 0.031


# ---- a journal resumed with other numbers -----------------------------------------------------------------------------


def recorded(path: Path, **more: Any) -> zk.ZOStep:
    torch.manual_seed(0)
    model = nn.Linear(8, 1).to(more.pop("dtype", torch.float32))
    options = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1, "clip": None, "maximize": False, **more}
    optimizer = zk.MeZOStep(model, journal=path, resume=True, **options)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(model.weight.dtype)
    optimizer.step(lambda: model(x).float().square().mean())
    optimizer.close_journal()
    return optimizer


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"lr": 1e-1}, "lr was [0.001, 0.001], is [0.1, 0.1]"), ({"eps": 1e-2}, "eps was [0.001, 0.001], is [0.01, 0.01]"),
        ({"clip": 2.0}, "clip was None, is 2.0"), ({"maximize": True}, "maximize was False, is True"),
        ({"weight_decay": 0.2}, "weight_decay was [0.1, 0.0], is [0.2, 0.0]"),
    ],
)  # fmt: skip
def test_a_journal_resumed_with_other_numbers_is_told(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    assert not told(lambda: recorded(tmp_path / "r.zoj"))
    assert not told(lambda: recorded(tmp_path / "r.zoj"))
    (warning,) = told(lambda: recorded(tmp_path / "r.zoj", **more))
    assert words in warning
    assert sum(name in warning for name in ("lr was", "eps was", "clip was", "maximize was", "decay was")) == 1


def test_a_journal_resumed_with_another_rounding_is_told(tmp_path: Path) -> None:
    for rounding, said in (("stochastic", False), ("nearest", True), ("stochastic", True)):
        words = told(lambda rounding=rounding: recorded(tmp_path / "r.zoj", rounding=rounding, dtype=torch.bfloat16))  # type: ignore[misc]
        assert bool([w for w in words if f"is '{rounding}'" in w]) == said


@pytest.mark.parametrize("first", ["constructor", "open_journal"])
@pytest.mark.parametrize("second", ["constructor", "open_journal"])
def test_a_scheduler_is_no_other_lr(tmp_path: Path, first: str, second: str) -> None:
    """A warm-up has changed lr when `open_journal` comes behind it; a resumed run begins with the constructor's."""

    def run(where: str, lr: float = 1e-2) -> None:
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        here = {"journal": tmp_path / "r.zoj", "resume": True} if where == "constructor" else {}
        optimizer = zk.MeZOStep(model, lr=lr, **here)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
        if where != "constructor":
            optimizer.open_journal(tmp_path / "r.zoj", resume=True)
        for _ in range(3):
            optimizer.step(lambda: model(torch.ones(2, 8)).square().mean())
            scheduler.step()
        optimizer.close_journal()

    assert not told(lambda: run(first))
    assert not told(lambda: run(second))
    assert "lr was 0.01, is 0.1" in told(lambda: run(second, 0.1))[0]


def test_what_a_user_wrote_into_a_header_is_not_compared(tmp_path: Path) -> None:
    model = nn.Linear(8, 1)
    for about in ({"lr": "0.1 to 0.2", "eps": [1, 2, 3], "clip": "none"}, {}):
        optimizer = zk.MeZOStep(model, lr=1e-3)
        assert not told(lambda about=about, o=optimizer: o.open_journal(tmp_path / "r.zoj", resume=True, hyperparameters=about))  # type: ignore[misc]
        optimizer.close_journal()


# ---- what is refused before anything is changed -----------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def generator() -> Iterator[Tensor]:
    yield from torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    "batches",
    [
        {"x": torch.ones(3, 8)}, tf.BatchEncoding({"x": torch.ones(3, 8)}), Pair(torch.ones(3, 8), torch.ones(3)), generator(), iter([torch.ones(3, 8)]),
        map(torch.ones, [8]), torch.ones(2, 3, 8), np.ones((2, 3, 8), np.float32), "batch", b"batch", {1, 2}, 3,
        torch.utils.data.DataLoader(torch.ones(4, 8)),  # type: ignore[arg-type]
    ],
    ids=lambda b: type(b).__name__,
)  # fmt: skip
def test_batches_of_the_wrong_sort_are_refused(batches: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = zk.MeZOStep(model, lr=1e-2)
    weights = model.weight.detach().clone()
    with pytest.raises(TypeError, match=f"batches is a {type(batches).__name__}"):
        optimizer.step(lambda b: model(b).square().mean(), batches)
    assert torch.equal(weights, model.weight) and optimizer.steps == 0
    if isinstance(batches, Iterator):
        next(batches)  # nothing was taken out of it


@pytest.mark.parametrize("wrap", [list, tuple])
def test_batches_of_the_right_sort(wrap: Any) -> None:
    model = nn.Linear(8, 8)
    optimizer = zk.MeZOStep(model, lr=1e-2)
    optimizer.step(lambda b: model(b["x"]).square().mean(), wrap([{"x": torch.ones(3, 8)}] * 2))
    assert optimizer.steps == 1


def parallel(base: type[nn.Module]) -> type[nn.Module]:
    """The wrapper's class, without the processes that it wants."""

    def init(self: Any, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    return type("Mine", (base,), {"__init__": init, "forward": lambda self, *a: self.module(*a)})


@pytest.mark.parametrize("base", [nn.parallel.DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel])
def test_modules_of_many_workers_are_refused(base: type[nn.Module]) -> None:
    inner = nn.Linear(4, 4)
    wrapped = parallel(base)(inner)
    with pytest.raises(TypeError, match=f"^model_or_params is a {base.__name__}: .*give the (plain )?module"):
        zk.MeZOStep(wrapped, lr=1e-3)
    with pytest.raises(TypeError, match=f"^model_or_params has a {base.__name__} inside, '1': "):
        zk.ZOAdam(nn.Sequential(nn.Linear(4, 4), wrapped), lr=1e-3)
    with pytest.raises(TypeError, match=f"^model is a {base.__name__}: "):
        zk.MeZOStep([{"params": list(inner.named_parameters())}], lr=1e-3, model=wrapped)
    zk.MeZOStep(inner, lr=1e-3).step(lambda: inner(torch.ones(2, 4)).square().mean())


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_shards_of_fsdp_are_refused_in_lists(mark: str) -> None:
    p = nn.Parameter(torch.ones(4))
    setattr(p, mark, True)
    with pytest.raises(TypeError, match="w lies in a shard of FullyShardedDataParallel"):
        zk.MeZOStep([("w", p)], lr=1e-3)
