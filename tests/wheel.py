"""An installed package makes a step with its compiled kernels, and its journal makes the weights again; where transformers is installed too, so do the command
line and the Trainer: python tests/wheel.py

Belongs here: what a wheel must do in an environment without a compiler (`make wheel-check`, cibuildwheel). Not a test of pytest's; run from outside of the
repository's root, so that the installed package is what is imported.
"""

import copy
import importlib.metadata
import importlib.util
import json
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

import zo_kernels as zk

FOLDER = Path(tempfile.mkdtemp())
WORDS = ["<pad>", "</s>", "good", "bad", "film", "the", "is", "was", "a", "it"]


def step() -> None:
    assert "cpu" in zk.backends() and "site-packages" in str(Path(zk.__file__)), zk.__file__
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    base = copy.deepcopy(model)
    x = torch.randn(32, 8)
    optimizer = zk.MeZOStep(model, lr=1e-2, seed=0, backend="cpu", journal=FOLDER / "run.zoj")
    losses = [float(optimizer.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())) for _ in range(50)]
    optimizer.close_journal()
    zk.replay(base, FOLDER / "run.zoj")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert losses[-1] < losses[0]
    print(
        f"zo_kernels {zk.__version__}, torch {torch.__version__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, replayed on every bit"
    )


def tiny() -> Path:
    """A folder with a random Llama, 16 wide, and a tokenizer of ten words."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    config = tf.LlamaConfig(**sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
    tf.LlamaForCausalLM(config).save_pretrained(FOLDER / "model")
    tokenizer.save_pretrained(FOLDER / "model")
    return FOLDER / "model"


def command_line(model: Path) -> None:
    def ran(*words: object) -> str:
        program = Path(sysconfig.get_path("scripts")) / "zo-finetune"
        done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "sst2" in ran("tasks")
    said = [f"{a} {b} {c} {d}" for a in ("the", "a", "it") for b in ("film", "it") for c in ("is", "was") for d in ("good", "bad")]
    rows = [{"text": text, "label": text.split()[-1]} for text in said]
    (FOLDER / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ("--task", "mine", "--data", FOLDER / "rows.jsonl", "--prompt", "{text} it is", "--words", "good,bad")
    sizes = ("--steps", 3, "--batch-size", 4, "--dev-examples", 0, "--eval-examples", 4, "--peft", "lora", "--device", "cpu")
    ran("train", "--model", model, *task, *sizes, "--output", FOLDER / "run")
    ran("replay", FOLDER / "run", "--model", model, "--device", "cpu", "--output", FOLDER / "again")
    saved, again = ((FOLDER / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert saved == again


def trainer(model: Path) -> None:
    import transformers as tf
    from zo_finetune import ZOTrainer, ZOTrainingArguments

    ids = [5, 4, 6, 2, 9, 6, 2]
    rows = [{"input_ids": ids, "labels": ids}] * 8
    arguments = ZOTrainingArguments(
        str(FOLDER / "trained"), max_steps=4, save_steps=2, report_to="none", learning_rate=1e-3, use_cpu=True
    )
    made = ZOTrainer(model=tf.AutoModelForCausalLM.from_pretrained(model), args=arguments, train_dataset=rows)
    made.train()
    again = ZOTrainer(model=tf.AutoModelForCausalLM.from_pretrained(model), args=arguments, train_dataset=rows)
    again.train(resume_from_checkpoint=str(FOLDER / "trained" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))


step()
if importlib.util.find_spec("transformers") is not None:
    folder = tiny()
    command_line(folder)
    trainer(folder)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "accelerate", "datasets")
    )
    print(f"{versions}: zo-finetune trains and replays, ZOTrainer trains and goes on, on every bit")
