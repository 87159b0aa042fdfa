"""The same without a trainer: answers are drawn once a step, scored by a Python function, and `zk.group_relative` makes advantages of the scores.

python examples/reward.py
"""

import functools

import tiny
import torch

import zo_kernels as zk


def says_good(text: str) -> float:
    return float(text.split().count("good"))


model, tokenizer = tiny.causal()
model.eval()
step = zk.MeZOStep(model, lr=3e-2, eps=1e-2, seed=0)
prompts = tokenizer(["the film is", "it was"], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
prompts = {name: ids.repeat_interleave(16, 0) for name, ids in prompts.items()}
width, groups = prompts["input_ids"].shape[1], torch.arange(2).repeat_interleave(16)


def loss(answers: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """What a step sees at each of its points: how likely the answers are there, weighed by how good they were."""
    words = answers[:, width:]
    mask = torch.cat([prompts["attention_mask"], words != 0], 1)
    logits = model(input_ids=answers, attention_mask=mask).logits[:, width - 1 : -1].float()
    log_probs = torch.log_softmax(logits, -1).gather(-1, words[..., None])[..., 0]
    return -(advantages[:, None] * log_probs * (words != 0)).sum() / (words != 0).sum()


scores = []
for _ in range(25):
    with torch.no_grad():
        answers = model.generate(**prompts, do_sample=True, max_new_tokens=4)
    rewards = torch.tensor([says_good(text) for text in tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)])
    step.step(functools.partial(loss, answers, zk.group_relative(rewards, groups)))
    scores.append(float(rewards.mean()))

print(f"reward {sum(scores[:5]) / 5:.3f} -> {sum(scores[-5:]) / 5:.3f}")
