"""Tiny models of every family that scratch mode must serve unchanged, and one whose parameters it cannot hook."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 97
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def opt(**sizes: int) -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(**{**SMALL, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **sizes})
    )


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def llama(tied: bool = False, **sizes: int) -> nn.Module:
    changed = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, **sizes}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**changed, tie_word_embeddings=tied))


def llama_tied() -> nn.Module:
    return llama(tied=True)


def qwen() -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2))


def roberta() -> nn.Module:
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=66))


def with_peft(config: Callable[[], peft.PeftConfig]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return peft.get_peft_model(llama(), config())

    return build


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "opt": opt,
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": llama_tied,
    "qwen": qwen,
    "roberta": roberta,
    "lora": with_peft(lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)),
    "prefix": with_peft(lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt": with_peft(lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "ln": with_peft(lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm", "norm"])),
}  # fmt: skip


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family]().to(dtype).eval()


def tokens(batch: int = 3, length: int = 11, seed: int = 5) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy in float32."""
    logits = model(input_ids=ids).logits.float()
    logits = logits[:, -ids.shape[1] :]  # prompt tuning puts its virtual tokens in front
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Captured(nn.Module):
    """Keeps its weights in a list of its own, past the attributes that a shadow can stand in (as fused and exported modules do)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.inner = nn.Linear(16, 24)
        self.head = nn.Linear(24, VOCABULARY)
        self.captured = [self.inner.weight, self.inner.bias]

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.linear(self.embedding(ids), *self.captured)
        return self.head(x.tanh() + self.inner(self.embedding(ids)))


class Awkward(nn.Module):
    """A module called twice, a parent that reads a child's weight, a view of a weight that outlives its call, a module that
    returns its own weight, a parameter list, an LSTM, and a parameter used by a parent around its children."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.shared = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(16))
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        transposed = self.shared.weight.t()
        bias = self.bias.view(1, 16)
        x = self.embedding(ids)
        x = self.shared(self.norm(self.shared(x))) + bias
        x = x * self.gates[0] + x @ transposed * self.gates[1]
        return self.lstm(x)[0] @ self.embedding.weight.T + bias.sum()
