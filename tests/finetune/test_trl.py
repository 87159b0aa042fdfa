"""TRL's trainers with our steps: on every bit a hand-written loop's, counted and generated once a step.

Belongs here: runs of `ZOSFTTrainer` and `ZOGRPOTrainer` with tiny models. Does not belong here: what holds for every trainer (test_trainer.py).
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from zo_finetune import methods

import zo_kernels as zk
from tests.finetune.test_trainer import losses_of, same

WORDS = ["<pad>", "</s>", "a", "b", "c", "d", "e", "f"]
TEXTS = ["a b c", "b c d", "c d e e e", "d e f", "e f", "f a b", "a a a a"]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """TRL, which takes seconds to load."""
    return importlib.import_module("trl")


@pytest.fixture(scope="module")
def words(theirs: Any) -> tf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")


def llama() -> tf.PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **ends, max_position_embeddings=32, attention_dropout=0.5))


def usual(**more: Any) -> dict[str, Any]:
    fixed = {
        "learning_rate": 0.05, "zo_eps": 1e-2, "max_steps": 4, "gradient_accumulation_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return {**fixed, **more}


def watched(cls: type) -> type:
    """Keeps what the losses of its steps were given, and what had been counted when it was logged."""

    class Watched(cls):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen: list[Any] = []
            self.counted: list[dict[str, int]] = []
            super().__init__(*args, **kwargs)

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._prepare_inputs(*args, **kwargs)
            if "labels" in found or "advantages" in found:
                self.seen.append(copy.copy(found))
            return found

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.counted.append({name: len(values) for name, values in self._metrics["train"].items()})
            super().log(*args, **kwargs)

    return Watched


def sft(folder: Path, words: Any, model: Any, trainer: dict[str, Any] | None = None, **more: Any) -> Any:
    import datasets
    from zo_finetune import ZOSFTConfig, ZOSFTTrainer

    args = ZOSFTConfig(str(folder), **usual(per_device_train_batch_size=2, **more))
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    return watched(ZOSFTTrainer)(model=model, args=args, train_dataset=rows, processing_class=words, **(trainer or {}))


def count_of_a(completions: list[str], **_: Any) -> list[float]:
    """A reward is any function of answers."""
    return [float(text.count("a")) for text in completions]


def grpo(folder: Path, words: Any, model: Any, reward: Any = count_of_a, trainer: dict[str, Any] | None = None, **more: Any) -> Any:
    import datasets
    from zo_finetune import ZOGRPOConfig, ZOGRPOTrainer

    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5}
    args = ZOGRPOConfig(str(folder), **usual(**{**sizes, **more}))
    rows = datasets.Dataset.from_dict({"prompt": TEXTS})
    return watched(ZOGRPOTrainer)(
        model=model, args=args, train_dataset=rows, processing_class=words, reward_funcs=reward, **(trainer or {})
    )


def by_hand(model: Any, batches: list[Any], loss: Any, seed: int = 3) -> list[float]:
    """The same steps, of two micro-batches each but for the last of an epoch, in a loop of one's own."""
    step = zk.MeZOStep(model.eval(), lr=0.05, eps=1e-2, seed=seed)
    scheduler = tf.get_scheduler("linear", step, 0, 4)
    losses = []
    for group in batches:
        losses.append(float(step.step(lambda batch, n=group: loss(model, batch, n), group)))
        scheduler.step()
    return losses


def fused(model: Any, *outputs: str) -> Any:
    """TRL's forward, whose log-probabilities have bits of their own."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", *outputs))
    return model


def sft_loss(model: Any, batch: Any, group: list[Any]) -> Tensor:
    items = sum((b["labels"][:, 1:] != -100).sum() for b in group)
    out = model(**batch, use_cache=False, fused_lm_head=True)
    return (-out.log_probs.sum() / items).double() * len(group)


def test_sft_is_the_hand_written_loop_and_counts_once_a_step(tmp_path: Path, words: Any) -> None:
    made = sft(tmp_path, words, model := llama())
    made.train()
    steps = [made.seen[:2], made.seen[2:4], made.seen[4:6], made.seen[6:]]
    losses = by_hand(fused(other := llama()), steps, sft_loss)
    assert same(model, other) and not same(model, llama())
    assert losses_of(made) == pytest.approx(losses, rel=1e-6)
    assert [(c["entropy"], c["num_tokens"]) for c in made.counted[:4]] == [(2, 1)] * 4
    tokens = [sum(int(b["attention_mask"].sum()) for b in group) for group in steps]
    assert [row["num_tokens"] for row in made.state.log_history if "loss" in row] == [sum(tokens[: k + 1]) for k in range(4)]


def test_the_loss_that_trl_makes_is_the_models(words: Any) -> None:
    """So that the loop above is of a loss that is known."""
    batch = words(TEXTS[:3], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        plain = llama().eval()(**batch, labels=labels).loss
        theirs = sft_loss(fused(llama().eval()), {**batch, "labels": labels}, [{"labels": labels}])
    assert float(theirs) == pytest.approx(float(plain), rel=1e-6)


def log_probs_of(model: Any, batch: Any) -> Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    n = batch["completion_ids"].shape[1]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-n] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -n:]


def grpo_loss(model: Any, batch: Any, group: list[Any]) -> Tensor:
    """DAPO's: the clipped ratio to the probabilities of the weights that answered, over all tokens of the step."""
    ratio, a = torch.exp(log_probs_of(model, batch) - batch["old_per_token_logps"]), batch["advantages"][:, None]
    terms = -torch.min(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a) * batch["completion_mask"]
    return (terms.sum() / sum(b["completion_mask"].sum() for b in group)).double() * len(group)


def test_grpo_is_the_hand_written_loop_and_generates_once_a_step(tmp_path: Path, words: Any) -> None:
    asked: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        return count_of_a(completions)

    made = grpo(tmp_path, words, model := llama(), reward)
    made.train()
    assert asked == [8] * 4 and len(made.seen) == 8  # two groups of four answers a step, a micro-batch each
    steps = [made.seen[k : k + 2] for k in range(0, 8, 2)]
    losses = by_hand(fused(other := llama()), steps, grpo_loss)
    assert same(model, other) and not same(model, llama())
    assert losses_of(made) == pytest.approx(losses, rel=1e-5)
    assert [(c["entropy"], c["reward"], c["step_time"]) for c in made.counted[:4]] == [(2, 1, 1)] * 4
    with torch.no_grad():  # without dropout, as the points of a step are
        first = log_probs_of(fused(llama().eval()), made.seen[0])
    assert torch.allclose(made.seen[0]["old_per_token_logps"], first, rtol=1e-5)
    assert all(row["grad_norm"] > 0 for row in made.state.log_history if "loss" in row)
    assert all(m.training for m in model.modules())


def test_advantages_are_relative_to_the_group(tmp_path: Path, words: Any) -> None:
    """`zk.group_relative` makes them of the same rewards, but for what TRL adds to a standard deviation."""
    made = grpo(tmp_path, words, llama(), max_steps=1, gradient_accumulation_steps=1, num_generations=2)
    made.train()
    (batch,) = made.seen
    texts = words.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(count_of_a(texts))
    prompts = [tuple(ids.tolist()) for ids in batch["prompt_ids"]]
    groups = torch.tensor([sorted(set(prompts)).index(p) for p in prompts])
    assert torch.allclose(batch["advantages"], zk.group_relative(rewards, groups), rtol=1e-3)


@pytest.mark.parametrize("build", [sft, grpo])
def test_a_run_goes_on_from_a_checkpoint_and_is_its_journals(tmp_path: Path, words: Any, build: Any) -> None:
    more = {"save_strategy": "steps", "save_steps": 2, "zo_perturbation": "lazy", "zo_journal": "run.zoj"}
    whole = build(tmp_path, words, model := llama(), **more)
    whole.train()
    recorded = (tmp_path / "run.zoj").read_bytes()
    again = build(tmp_path, words, other := llama(), **more)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(model, other) and losses_of(again) == losses_of(whole)
    assert (tmp_path / "run.zoj").read_bytes() == recorded
    zk.replay(replayed := llama(), tmp_path / "run.zoj")
    assert same(model, replayed)


@pytest.mark.parametrize("build", [sft, grpo])
def test_an_adapter_on_16_bits_with_a_loss_in_32(tmp_path: Path, words: Any, build: Any, recwarn: pytest.WarningsRecorder) -> None:
    """TRL makes the adapter; presets are an adapter's, and nothing but it is trained."""
    import peft

    made = build(
        tmp_path,
        words,
        llama().to(torch.bfloat16),
        trainer={"peft_config": peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")},
        max_steps=1,
        learning_rate=None,
    )
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert (
        moved
        and all("lora_" in name for name in moved)
        and made.zo_step.param_groups[0]["initial_lr"] == methods.get("mezo").preset("lora").lr
    )
    assert not any(issubclass(w.category, zk.ZOWarning) for w in recwarn)


def test_sft_of_an_adapter_on_four_bits(tmp_path: Path, words: Any) -> None:
    """TRL packs the base and makes the adapter, in bf16; the run goes on, with a journal and without, and replays as on any base."""
    import peft

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)).save_pretrained(
        tmp_path / "base"
    )
    packed = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {
        "quantization_config": packed,
        "peft_config": peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"),
    }

    def made(recorded: str | None = "run.zoj") -> Any:
        more = {"save_strategy": "steps", "save_steps": 2, "zo_journal": recorded}
        return sft(tmp_path, words, str(tmp_path / "base"), trainer=options, **more)

    def adapter(trainer: Any) -> list[Tensor]:
        return [p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad]

    (whole := made()).train()
    recorded = (tmp_path / "run.zoj").read_bytes()
    (again := made()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "run.zoj").read_bytes() == recorded
    zk.replay((other := made()).model, tmp_path / "run.zoj")
    (without := made(None)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {p.dtype for p in adapter(whole)} == {torch.bfloat16}
    for found in (again, other, without):
        assert adapter(whole) and all(torch.equal(a, b) for a, b in zip(adapter(whole), adapter(found), strict=True))


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("ZOSFTConfig", {"loss_type": "dft"}, "dft.*hold constant.*nll"),
        ("ZOGRPOConfig", {"loss_type": "cispo"}, "cispo.*hold constant"),
        ("ZOGRPOConfig", {"loss_type": "vespo"}, "vespo.*hold constant"),
        ("ZOGRPOConfig", {"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2.*chosen anew.*leave it at 1.0"),
        ("ZOGRPOConfig", {"off_policy_mask_threshold": 0.5}, "chosen anew"),
        ("ZOGRPOConfig", {"use_adaptive_entropy": True}, "between the points"),
        ("ZOGRPOConfig", {"use_transformers_continuous_batching": True}, "casts the weights"),
        ("ZOGRPOConfig", {"zo_method": "mezzo"}, "mezo"),
    ],
)
def test_losses_that_only_backpropagation_can_follow_are_refused(
    tmp_path: Path, theirs: Any, name: str, more: dict[str, Any], said: str
) -> None:
    import zo_finetune

    sizes = {"num_generations": 4} if "GRPO" in name else {}
    with pytest.raises(ValueError, match=said):
        getattr(zo_finetune, name)(str(tmp_path), **usual(per_device_train_batch_size=4, **sizes, **more))


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zo_finetune.trl_trainers", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"zo_kernels\[trl\]"):
        importlib.import_module("zo_finetune.trl_trainers")
