"""Models of transformers and adapters of peft whose weights are sharded over real processes, as those libraries and torch shard them.

Belongs here: what the libraries' own modules add to sharded weights (tied heads, adapters, tensor parallelism by `tp_plan`). Does not belong here: shards as
such (tests/test_shards.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import zo_kernels as zk
from tests.cluster import cluster

WORDS, STEPS, EPS, LR = 97, 4, 1e-2, 1e-4


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=WORDS, tie_word_embeddings=True, **sizes)).to(dtype).eval()


def adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def train(model: Any, **more: Any) -> list[float]:
    draw = torch.Generator().manual_seed(1)
    optimizer = zk.MeZOStep(model, lr=LR, eps=EPS, seed=3, **more)

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss.float()  # type: ignore[no-any-return]

    return [float(optimizer.step(loss, list(torch.randint(WORDS, (2, 2, 7), generator=draw)))) for _ in range(STEPS)]


def whole(model: Any) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def in_two(function: Callable[[int], Any], folder: Path) -> list[Any]:
    ends = cluster(2, function, folder)
    assert not any(end.error for end in ends), [end.text for end in ends]
    return [end.result for end in ends]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::zo_kernels.ZOWarning")
def test_adapters_beneath_fsdp_have_the_bits_of_an_unsharded_run(dtype: torch.dtype, tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = adapted(llama(dtype))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        losses = train(model, process_group=dist.group.WORLD)
        return losses, whole(model)

    alone = adapted(llama(dtype))
    start, losses = whole(alone), train(alone)
    expected = whole(alone)
    assert any(not torch.equal(start[n], expected[n]) for n in expected)
    for found, weights in in_two(run, tmp_path):
        assert found == losses and weights.keys() == expected.keys()
        assert all(torch.equal(weights[n], expected[n]) for n in expected)


def test_the_tensor_parallelism_of_transformers_has_the_noise_of_whole_tensors(tmp_path: Path) -> None:
    """A loss of two processes sums in another order: 64 ulp of 4.6 are allowed, which are 2 * 64 * 2.4e-7 / (2 EPS) in a projected gradient, and in a weight LR
    times that and the largest of a few 10^4 normal numbers, below 5, in each step. Wrong noise moves a weight as far as the run does."""
    llama(torch.float32).save_pretrained(tmp_path / "model")

    def load(**options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the plan is given is about to change
            return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **options).eval()

    def run(rank: int) -> Any:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun says it
        model = load(tp_plan="auto")
        sharded = sum(isinstance(p, DTensor) for p in model.parameters())
        losses = train(model, process_group=dist.group.WORLD)
        return sharded, losses, whole(model)

    alone = load()
    start = whole(alone)
    losses = train(alone, perturbation="inplace")
    expected = whole(alone)
    bound = 64 * 2.4e-7
    (sharded, found, weights), (_, others, same) = in_two(run, tmp_path / "ranks")
    assert sharded == 2 * 7 + 1 and found == others  # the matrices of the layers, and the embedding that is the head
    assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < bound
    limit = STEPS * LR * 5 * bound / EPS
    for name, value in expected.items():
        assert torch.equal(weights[name], same[name])
        assert (weights[name] - value).abs().max() < limit < (value - start[name]).abs().max() / 10, name
