"""A Trainer's run is the hand-written loop's, on every bit; and what a Trainer has besides works with it.

Belongs here: runs of `ZOTrainer` with tiny models. Does not belong here: what a step computes (tests/optim).
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from zo_finetune import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments, methods
from zo_finetune.cli import main

import zo_kernels as zk
from tests.cluster import cluster
from zo_kernels import journal

LENGTH = 10


class Rows(torch.utils.data.Dataset):
    """Sentences of different lengths, padded, with what is to be predicted."""

    def __init__(self, n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(n):
            ids = torch.randint(4, 40, (LENGTH,), generator=draw)
            filled = int(torch.randint(4, LENGTH + 1, (), generator=draw))
            mask = (torch.arange(LENGTH) < filled).long()
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return self.rows[k]


class Plain(nn.Module):
    """A module that is no PreTrainedModel, has dropout, and takes no num_items_in_batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(40, 8), nn.Dropout(0.5), nn.Linear(8, 40)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.embed(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.view(-1, 40), labels.view(-1)), "logits": logits}


def llama() -> tf.PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=16, attention_dropout=0.5))


def plain() -> nn.Module:
    torch.manual_seed(1)
    return Plain()


class Watched(ZOTrainer):
    """Keeps what its steps were given, and the weights that they began with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.seen.append((copy.copy(inputs), num_items_in_batch, self.accelerator.sync_gradients))
        return super().training_step(model, inputs, num_items_in_batch)


def arguments(folder: Path, **more: Any) -> ZOTrainingArguments:
    usual = {
        "learning_rate": 0.05, "zo_eps": 1e-2, "max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return ZOTrainingArguments(str(folder), **{**usual, **more})


def trainer(model: nn.Module, args: ZOTrainingArguments, cls: type = Watched, **more: Any) -> Any:
    return cls(model=model, args=args, train_dataset=Rows(13, 0), eval_dataset=Rows(5, 1), **more)


def by_hand(model: nn.Module, seen: list[Any], args: ZOTrainingArguments, make: Callable[..., Any]) -> list[float]:
    """The same steps in a loop of one's own; their losses."""
    step = make(model.eval())
    scheduler = tf.get_scheduler("linear", step, 0, args.max_steps)
    losses, batches = [], []
    for inputs, items, last in seen:
        batches.append(inputs)
        if not last:
            continue
        if items is None:
            losses.append(float(step.step(lambda batch: model(**batch)["loss"], batches)))
        else:  # each is a part of the sum over all items; a step takes means
            parts = len(batches)
            losses.append(float(step.step(lambda b, n=items, k=parts: model(**b, num_items_in_batch=n).loss.double() * k, batches)))
        step.flush()  # as an evaluation or a checkpoint does
        scheduler.step()
        batches = []
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def losses_of(made: Any) -> list[float]:
    return [row["loss"] for row in made.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("build", [llama, plain])
def test_a_run_is_the_hand_written_loops(tmp_path: Path, build: Callable[[], nn.Module], accumulate: int) -> None:
    """With a schedule, over the end of an epoch, which a shorter accumulation closes, with evaluations in between."""
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulate, eval_strategy="steps", eval_steps=2, zo_options={"clip": 1.5}
    )
    made = trainer(model := build(), args)
    made.train()
    losses = by_hand(other := build(), made.seen, args, lambda m: zk.MeZOStep(m, lr=0.05, eps=1e-2, seed=3, clip=1.5))
    assert same(model, other) and not same(model, build())
    assert losses_of(made) == pytest.approx(losses, rel=1e-6)
    rows = [row for row in made.state.log_history if "grad_norm" in row]
    assert len(rows) == 6 and [row["learning_rate"] for row in rows] == pytest.approx([0.05 * (1 - k / 6) for k in range(6)])
    assert rows[-1]["grad_norm"] == float(made.zo_step.projected_gradient.abs())
    assert sum("eval_loss" in row for row in made.state.log_history) == 3


@pytest.mark.parametrize("more", [{"zo_perturbation": "lazy"}, {"zo_method": "zo-adam", "gradient_accumulation_steps": 2}])
def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_an_epoch(tmp_path: Path, more: dict[str, Any]) -> None:
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=5, **more)
    whole = trainer(model := llama(), args)
    whole.train()
    again = trainer(other := llama(), args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.zo_step.steps == 8 and same(model, other)
    assert losses_of(again) == losses_of(whole)
    assert [s[0]["input_ids"].tolist() for s in again.seen] == [s[0]["input_ids"].tolist() for s in whole.seen[-len(again.seen) :]]


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer(llama(), args).train()
    with pytest.raises(ValueError, match=r"no optimizer\.pt"):
        trainer(llama(), args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_models_in_16_bits_are_in_fp32(tmp_path: Path, dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    """Where the model's own loss function takes its logits as they are, too."""
    found: list[Tensor] = []

    class Kept(Watched):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found.append(super().compute_loss(*args, **kwargs))
            return found[-1]

    trainer(plain().to(dtype), arguments(tmp_path, max_steps=2), Kept).train()
    assert len(found) == 4 and {loss.dtype for loss in found} == {torch.float32}
    assert not any(issubclass(w.category, zk.ZOWarning) for w in recwarn)


def test_callbacks_metrics_and_the_best_model(tmp_path: Path) -> None:
    """The Trainer's own, each at its time; the weights in the end are those of the best evaluation."""
    events: list[str] = []

    class Listener(tf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append(f"begin {state.global_step}")

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("substep")

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            events.append(f"end {state.global_step}")
            control.should_training_stop = state.global_step == 3

    scores = iter([0.5, 0.9, 0.1])
    args = arguments(
        tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, zo_perturbation="lazy",
    )  # fmt: skip
    made = trainer(model := plain(), args, compute_metrics=lambda _: {"score": next(scores)}, callbacks=[Listener()])
    made.train()
    assert events == [e for k in range(3) for e in (f"begin {k}", "substep", f"end {k + 1}")]
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    by_hand(
        other := plain(),
        made.seen[:4],
        args,
        lambda m: zk.MeZOStep(m, lr=0.05, eps=1e-2, seed=3, perturbation="inplace", lazy=True),
    )
    assert same(model, other)


def test_pushing_to_a_hub_that_is_not_there_says_so_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)offline|token|login"):
        trainer(llama(), arguments(tmp_path, push_to_hub=True, hub_model_id="a/b"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"zo_method": "mezzo"}, "zo_method='mezzo'.*mezo"),
        ({"zo_method": "adamw"}, "backpropagates"),
        ({"zo_method": "hybrid"}, "backpropagates"),
        ({"zo_options": {"querries": 2}}, "querries.*queries"),
        ({"zo_options": "[1"}, "its JSON"),
        ({"zo_options": "[1]"}, "a dict of options"),
        ({"zo_perturbation": "scrach"}, "scratch"),
        ({"zo_seed": -1}, "2\\^64"),
        ({"fp16": True}, "fp16=True.*bf16"),
        ({"fsdp": "full_shard"}, "sharded"),
        ({"deepspeed": "x.json"}, "shards"),
        ({"torch_compile": True}, "inplace"),
        ({"optim": "sgd"}, "optim='?sgd|optim='OptimizerNames"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"neftune_noise_alpha": 5.0}, "neftune"),
        ({"adam_beta1": 0.8}, "adam_beta1=0.8.*zo_options"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a finite number"),
        ({"zo_eps": 0.0}, "zo_eps=0 must be > 0"),
        ({"zo_eps": -1.0}, "zo_eps=-1.0 must be"),
        ({"zo_method": "mezo-inputs"}, "looks at the inputs.*zo-finetune train"),
    ],
)
def test_a_mistake_in_the_arguments_is_told_as_they_are_made(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_other_arguments_and_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ZOTrainingArguments"):
        ZOTrainer(llama(), tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    model = llama()
    with pytest.raises(TypeError, match=r"SGD.*ZOStep"):
        trainer(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters(), 0.1), None))
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {}))


def test_what_started_the_script_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's configuration reaches a Trainer through the environment, past its arguments."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    try:
        with pytest.raises(ValueError, match=r"fp16, from the environment.*bf16=True"):
            trainer(llama(), arguments(tmp_path))
    finally:
        AcceleratorState._reset_state(True)


def test_numbers_may_be_text_as_yaml_has_them(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate="1e-2", zo_eps="1e-3")
    assert (args.learning_rate, args.zo_eps) == (1e-2, 1e-3)


def test_clipping_of_a_gradients_norm_is_said_to_be_unused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    arguments(tmp_path)
    arguments(tmp_path, max_grad_norm=0)
    assert not any(issubclass(w.category, zk.ZOWarning) for w in recwarn)
    with pytest.warns(zk.ZOWarning, match="max_grad_norm=0.3 is not used.*clip"):
        arguments(tmp_path, max_grad_norm=0.3)


def test_a_loss_that_a_user_puts_in_the_place_of_the_classs_stays(tmp_path: Path) -> None:
    made = trainer(plain(), arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2))
    theirs, calls = made.compute_loss, []

    def doubled(*args: Any, **kwargs: Any) -> Any:
        calls.append(made.state.global_step)
        return 2 * theirs(*args, **kwargs)

    made.compute_loss = doubled
    made.train()
    assert calls == [0] * 4 + [1] * 4 and made.compute_loss is doubled


def test_a_skipped_step_is_nan_in_its_own_row_alone(tmp_path: Path) -> None:
    made = trainer(plain(), arguments(tmp_path, max_steps=4))
    made.compute_loss = lambda *args, **kwargs: (
        (math.nan if made.state.global_step == 1 else 1) * type(made).compute_loss(made, *args, **kwargs)
    )
    made.train()
    assert [math.isnan(loss) for loss in losses_of(made)] == [False, True, False, False]
    assert made.zo_step.skipped == 1


def test_arguments_serve_two_trainers(tmp_path: Path) -> None:
    """A rate that was not given is each model's own, and each method's."""
    import peft

    args = arguments(tmp_path, max_steps=1, learning_rate=None, zo_eps=None)
    found = []
    for model, method in (
        (llama(), "mezo"),
        (peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2)), "mezo"),
        (llama(), "fzoo"),
    ):
        args.zo_method = method  # as a search for hyperparameters does
        made = trainer(model, args)
        made.train()
        found.append((made.zo_step.param_groups[0]["initial_lr"], args.learning_rate))
    rates = [methods.get("mezo").preset("none").lr, methods.get("mezo").preset("lora").lr, methods.get("fzoo").preset("none").lr]
    assert found == [(lr, None) for lr in rates]


def test_a_run_goes_on_with_the_numbers_of_its_checkpoint_and_says_so(tmp_path: Path) -> None:
    for recorded in (None, "run.zoj"):
        folder = tmp_path / str(recorded)
        kept = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "zo_journal": recorded}
        trainer(model := llama(), arguments(folder, **kept)).train()
        again = trainer(other := llama(), arguments(folder, learning_rate=0.5, zo_eps=0.25, **kept))
        with pytest.warns(zk.ZOWarning) as said:
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        (words,) = [str(w.message) for w in said if "goes on with the numbers" in str(w.message)]
        assert "lr 0.05, not 0.5, eps 0.01, not 0.25" in words and same(model, other)
    made = trainer(llama(), arguments(tmp_path / "None", zo_seed=9, max_steps=4))
    with pytest.warns(zk.ZOWarning, match="seed 3, not 9"):
        made.train(resume_from_checkpoint=str(tmp_path / "None" / "checkpoint-2"))


def test_a_journal_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    kept = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(llama(), arguments(tmp_path, **kept)).train()
    with pytest.raises(ValueError, match=r"run\.zoj is not there.*zo_journal=None"):
        trainer(model := llama(), arguments(tmp_path, zo_journal="run.zoj", **kept)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
    assert same(model, llama())


def test_an_optimizer_made_before_the_run_is_the_runs(tmp_path: Path) -> None:
    made = trainer(model := llama(), arguments(tmp_path, max_steps=2, zo_journal="run.zoj"))
    made.create_optimizer_and_scheduler(2)
    assert not (tmp_path / "run.zoj").exists()
    made.train()
    zk.replay(replayed := llama(), tmp_path / "run.zoj")
    assert same(model, replayed) and made.zo_step.steps == 2


def test_the_best_adapter_of_16_bits_stays_and_trains_on(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    params = [p for p in model.parameters() if p.requires_grad]
    kept = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    made = trainer(model, arguments(tmp_path, max_steps=2, **kept))
    made.train()
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(params, now, strict=True))
    made.train()
    assert made.zo_step.steps == 4


def test_checkpointing_of_activations_is_switched_off(tmp_path: Path) -> None:
    with pytest.warns(zk.ZOWarning, match="switched off"):
        args = arguments(tmp_path, gradient_checkpointing=True)
    assert not args.gradient_checkpointing and not getattr(args, "activation_checkpointing", False)


def test_presets_and_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """Without learning rate and eps the method's are taken, for an adapter its own; a step made of parts is taken as it is."""
    import peft

    args = arguments(tmp_path, max_steps=1, learning_rate=None, zo_eps=None, zo_options='{"queries": 2}')
    made = trainer(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2)), args)
    made.train()
    (group,) = made.zo_step.param_groups
    preset = methods.get("mezo").preset("lora")
    assert (group["initial_lr"], group["eps"]) == (preset.lr, preset.eps)
    assert (
        made.zo_step.forwards() == 4
        and not made.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad
    )
    model = llama()
    own = zk.ZOStep(model, 0.1, rule=zk.Sign(), estimator=zk.OneSided())
    with pytest.raises(ValueError, match=r"learning_rate=0\.05, zo_eps=0\.01 with optimizers=\(ZOStep"):
        trainer(model, arguments(tmp_path), optimizers=(own, None))
    made = trainer(model, arguments(tmp_path, max_steps=2, learning_rate=None, zo_eps=None), optimizers=(own, None))
    made.train()
    assert made.zo_step is own and own.steps == 2


@pytest.mark.parametrize("more", [{"zo_perturbation": "lazy"}, {"zo_method": "zo-adam"}])
def test_a_journal_beside_the_checkpoints_is_the_whole_run(tmp_path: Path, more: dict[str, Any]) -> None:
    """It goes on with a checkpoint, cut to its steps; and from the base weights it makes those of the end."""
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=5, zo_journal="run.zoj", **more)
    trainer(model := llama(), args).train()
    whole = (tmp_path / "run.zoj").read_bytes()
    again = trainer(other := llama(), args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.zo_step.steps == 8 and same(model, other)
    assert (tmp_path / "run.zoj").read_bytes() == whole
    zk.replay(replayed := llama(), tmp_path / "run.zoj")
    assert same(model, replayed)


def test_a_journal_of_another_run_is_refused_as_it_is(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, zo_journal="run.zoj")
    trainer(llama(), args).train()
    path = tmp_path / "run.zoj"
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"zo_journal='run\.zoj': a journal of 4 steps is there.*remove the file"):
        trainer(llama(), args).train()
    for name, words in (("checkpoint-2", "base"), ("checkpoint-4", "base")):
        other = llama()
        next(other.parameters()).data.mul_(2)
        with pytest.raises(ValueError, match=words):
            trainer(other, args).train(resume_from_checkpoint=str(tmp_path / name))
    assert path.read_bytes() == before
    journal.recover(path, keep=3)
    with pytest.raises(ValueError, match="has 3 steps, and the checkpoint is of step 4"):
        trainer(llama(), args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer(llama(), arguments(tmp_path / "third", max_steps=2, save_strategy="steps", save_steps=2, seed=4)).train()
    for name in ("optimizer.pt", "model.safetensors"):  # of another run
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "other" / "checkpoint-2", dirs_exist_ok=True)
        shutil.copy(path, tmp_path / "other" / "run.zoj")
        args = arguments(tmp_path / "other", max_steps=4, zo_journal="run.zoj")
        shutil.copy(tmp_path / "third" / "checkpoint-2" / name, tmp_path / "other" / "checkpoint-2")
        with pytest.raises((ValueError, RuntimeError), match=r"not of where the run is|is not the journal of"):
            trainer(llama(), args).train(resume_from_checkpoint=True)


class Theirs(tf.Trainer):
    """A trainer as TRL's: work of its own around a step, a loss of its own that counts what it sees and looks at the model's mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {"ids": []}, "eval": {"ids": []}}
        self._total_train_tokens = self.around = 0
        self.seen: list[Any] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.around += 1
        self.seen.append((copy.copy(inputs), None, self.accelerator.sync_gradients))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids = inputs.pop("input_ids")
        if self.model.training:
            self._total_train_tokens += ids.numel()
        self._metrics["train" if self.model.training else "eval"]["ids"].append(float(ids.sum()))
        return 2 * model(input_ids=ids, labels=inputs["labels"])["loss"]


class Ours(ZOTrainerMixin, Theirs):
    pass


def test_a_trainer_that_is_made_of_theirs_counts_once_a_step(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=3)
    made = trainer(model := plain(), args, Ours)
    made.train()
    assert made.around == len(made.seen) == 7  # the first epoch ends within an accumulation
    assert made._metrics["train"]["ids"] == [float(inputs["input_ids"].sum()) for inputs, _, _ in made.seen]
    assert made._total_train_tokens == sum(inputs["input_ids"].numel() for inputs, _, _ in made.seen)
    assert not made._metrics["eval"]["ids"] and all(m.training for m in model.modules())
    other = plain()
    step = zk.MeZOStep(other.eval(), lr=0.05, eps=1e-2, seed=3)
    scheduler = tf.get_scheduler("linear", step, 0, 3)
    for batches in (made.seen[:3], made.seen[3:6], made.seen[6:]):
        step.step(lambda inputs: 2 * other(inputs["input_ids"], inputs["labels"])["loss"], [inputs for inputs, _, _ in batches])
        scheduler.step()
    assert same(model, other)


# ---- several processes ---------------------------------------------------------------------------------------------------------


def process(rank: int, folder: Path) -> list[Any]:
    """One of two that torchrun started: whole runs, each with half of the accumulation of one process's."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    found: list[Any] = []
    for name, build, more in SHARED:
        args = arguments(folder / name, **more)
        made = Watched(model=(model := build()), args=args, train_dataset=Rows(16, 0), eval_dataset=Rows(5, 1))
        made.train()
        again = ZOTrainer(model=(other := build()), args=args, train_dataset=Rows(16, 0), eval_dataset=Rows(5, 1))
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-3"))
        wrapped = type(made.model_wrapped).__name__
        found.append((model.state_dict(), other.state_dict(), losses_of(made), wrapped, made.zo_step.workers.sent > 0))
        found[-1] += ([row["eval_loss"] for row in made.state.log_history if "eval_loss" in row],)
    own = zk.MeZOStep(plain(), lr=0.1)
    for error in (
        lambda: trainer(plain(), arguments(folder, average_tokens_across_devices=False)),
        lambda: trainer(plain(), arguments(folder, learning_rate=None, zo_eps=None), optimizers=(own, None)),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            error()
        found.append(str(raised.value))
    return found


KEPT = {"save_strategy": "steps", "save_steps": 3}
SHARED: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    (
        "llama",
        llama,
        {
            "zo_method": "fzoo",
            "learning_rate": 5e-3,
            "zo_journal": "run.zoj",
            "eval_strategy": "steps",
            "per_device_eval_batch_size": 1,
            **KEPT,
        },
    ),
    ("plain", plain, {"gradient_accumulation_steps": 2, **KEPT}),
]


def test_two_processes_have_the_bits_of_one_with_the_same_batches(tmp_path: Path) -> None:
    """Over the end of an epoch, with evaluations, a checkpoint that both go on from, a journal, and a loss that is a sum over the items of all."""
    ends = cluster(2, lambda rank: process(rank, tmp_path / "two"), tmp_path / "cluster", limit=120)
    assert not any(end.error for end in ends), ends
    for k, (name, build, more) in enumerate(SHARED):
        args = arguments(
            tmp_path / "one" / name, **{**more, "gradient_accumulation_steps": 2 * more.get("gradient_accumulation_steps", 1)}
        )
        made = ZOTrainer(model=(model := build()), args=args, train_dataset=Rows(16, 0), eval_dataset=Rows(5, 1))
        made.train()
        for end in ends:
            weights, resumed, losses, wrapped, sent, evaluated = end.result[k]
            for state in (weights, resumed):
                assert all(torch.equal(x, y) for x, y in zip(state.values(), model.state_dict().values(), strict=True)), name
            assert wrapped == type(model).__name__ and sent
            assert losses == losses_of(made)
            assert evaluated == ends[0].result[k][5] and len(evaluated) == (
                6 if name == "llama" else 0
            )  # torch's averages, which take rows in pairs
            assert "average_tokens_across_devices=False with 2 processes" in end.result[2]
            assert "without process_group, with 2 processes" in end.result[3]
    zk.replay(replayed := llama(), tmp_path / "two" / "llama" / "run.zoj")
    assert all(torch.equal(x, y) for x, y in zip(replayed.state_dict().values(), ends[0].result[0][0].values(), strict=True))


# ---- what no base model has -----------------------------------------------------------------------------------------


def drawn(*, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base with an adapter whose random state nobody wrote down."""
    import peft

    base = llama().to(dtype)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))


def test_an_adapter_that_nobody_seeded_goes_on_and_replays(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, zo_journal="run.zoj")
    trainer(model := drawn(seed=5), args).train()
    whole = (tmp_path / "run.zoj").read_bytes()
    again = trainer(other := drawn(seed=6), args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(model, other) and (tmp_path / "run.zoj").read_bytes() == whole
    zk.replay(replayed := drawn(seed=7), tmp_path / "run.zoj")
    assert same(model, replayed) and all(p.requires_grad for n, p in replayed.named_parameters() if "lora" in n)
    begun = drawn(seed=8)
    zk.replay(begun, tmp_path / "run.zoj", upto=0)
    assert same(begun, drawn(seed=5))


def test_an_adapter_of_another_type_becomes_the_runs(tmp_path: Path) -> None:
    """TRL makes adapters of 16 bits on packed bases, and peft of fp32."""
    model = drawn(seed=5)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    args = arguments(tmp_path, max_steps=2, zo_journal="run.zoj", save_strategy="steps", save_steps=1)
    trainer(model, args).train()
    zk.replay(other := drawn(seed=6), tmp_path / "run.zoj")
    assert same(model, other) and {p.dtype for p in other.parameters() if p.requires_grad} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"has dtype float32, the run's had bfloat16.*in the same dtype"):
        trainer(other := drawn(seed=6), args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(other, drawn(seed=6))


def test_the_command_line_makes_a_trainers_adapter_again(tmp_path: Path, model_folder: Any) -> None:
    import peft
    from safetensors.torch import load_file

    base = str(model_folder("llama"))
    torch.manual_seed(5)
    model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer(model, arguments(tmp_path, max_steps=2, zo_journal="run.zoj")).train()
    model.save_pretrained(tmp_path / "adapter")
    command = ["replay", str(tmp_path / "run.zoj"), "--model", base, "--device", "cpu", "--output", str(tmp_path / "again")]
    assert main(command) == 0
    made, again = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert made.keys() == again.keys() and all(again[name].equal(t) for name, t in made.items())
    assert json.loads((tmp_path / "again" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_a_new_head_is_kept_and_the_body_is_not(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")

    def built(seed: int) -> Any:
        torch.manual_seed(seed)
        return tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2, pad_token_id=0)

    class Labelled(Rows):
        def __getitem__(self, k: int) -> dict[str, Tensor]:
            return {**super().__getitem__(k), "labels": torch.tensor(k % 2)}

    args = arguments(tmp_path / "run", max_steps=2, zo_journal="run.zoj")
    ZOTrainer(model := built(5), args, train_dataset=Labelled(8, 0)).train()
    zk.replay(other := built(6), tmp_path / "run" / "run.zoj")
    assert same(model, other) and not same(built(5), built(6))
    values = journal.start_of(journal.read(tmp_path / "run" / "run.zoj").header, None, tmp_path / "run" / "run.zoj")
    assert list(values) == ["score.weight"]


def test_starting_values_that_are_not_the_runs_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, zo_journal="run.zoj", save_strategy="steps", save_steps=1)
    trainer(drawn(seed=5), args).train()
    path = tmp_path / "run.zoj"
    beside = journal.start_path(path)
    begun, (name, *_) = beside.read_bytes(), [n for n, p in drawn(seed=6).named_parameters() if p.requires_grad]
    journal.write_start(path, {name: torch.zeros(2, 8)})
    for call in (
        lambda: zk.replay(drawn(seed=6), path),
        lambda: trainer(drawn(seed=6), args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")),
    ):
        with pytest.raises(ValueError, match="not of this journal's run"):
            call()
    beside.write_bytes(begun[:-1])
    with pytest.raises(ValueError, match="holds no starting values"):
        zk.replay(drawn(seed=6), path)
    beside.unlink()
    with pytest.raises(ValueError, match=rf"{name}.*has other values.*adapter or head.*\.start.*torch\.manual_seed"):
        zk.replay(other := drawn(seed=6), path)
    assert same(other, drawn(seed=6))
    zk.replay(drawn(seed=5), path)
    (tmp_path / "elsewhere").write_bytes(begun)
    zk.replay(drawn(seed=6), path, start=tmp_path / "elsewhere")


def test_a_journal_without_a_step_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """As a run leaves it that ended before its first step."""
    args = arguments(tmp_path, max_steps=1, zo_journal="run.zoj")
    made = trainer(plain(), args)
    made.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert len(journal.read(tmp_path / "run.zoj")) == 0
    trainer(model := plain(), args).train()
    zk.replay(other := plain(), tmp_path / "run.zoj")
    assert same(model, other)


def test_a_rate_of_first_order_training_is_said_to_ruin_the_model(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def said(**more: Any) -> list[str]:
        recwarn.clear()
        trainer(llama(), arguments(tmp_path, max_steps=2, **more)).train()
        return [str(w.message) for w in recwarn if issubclass(w.category, zk.ZOWarning)]

    (words,) = said(learning_rate=0.5)
    assert "learning_rate 0.5 moves a weight" in words and "the model forgets; a smaller learning_rate" in words
    assert said(learning_rate=0.002) == []
