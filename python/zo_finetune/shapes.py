"""Bare shapes: the configurations of well-known models, as transformers reads them. Nothing is downloaded, and no weight is meant.

Belongs here: sizes. Does not belong here: what is made of them (measure.py). Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zo_finetune.errors import UserError, did_you_mean


def _opt(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * width, "max_position_embeddings": 2048, "word_embed_proj_dim": width, **more,
    }  # fmt: skip


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}


def _llama(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": inner, "max_position_embeddings": 4096, **more,
    }  # fmt: skip


def _roberta(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1,
    }  # fmt: skip


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama(4096, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 28672, num_key_value_heads=8),
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
}


def get(name: str) -> dict[str, Any]:
    """Raises UserError where there is none of that name."""
    if name not in SHAPES:
        raise UserError(f"--shape {name!r:.80} must be one of {', '.join(SHAPES)}{did_you_mean(name, SHAPES)}")
    return dict(SHAPES[name])


def is_masked(shape: Mapping[str, Any]) -> bool:
    return shape["model_type"] == "roberta"


def context(shape: Mapping[str, Any]) -> int:
    """Tokens that an input may have."""
    return int(shape.get("n_positions") or shape["max_position_embeddings"] - (2 if is_masked(shape) else 0))
