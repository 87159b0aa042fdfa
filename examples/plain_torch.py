"""A loop of one's own: micro-batches, a schedule of torch, a checkpoint from which it goes on, and a journal that is the whole run.

python examples/plain_torch.py
"""

import copy
import pathlib

import torch

import zo_kernels as zk

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
base, data = copy.deepcopy(model), torch.randn(64, 8)
target = data[:, :1] - data[:, 1:2]


def closure(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(data[rows]), target[rows])


def optimizer() -> tuple[zk.MeZOStep, torch.optim.lr_scheduler.LRScheduler]:
    step = zk.MeZOStep(model, lr=5e-3, eps=1e-3, queries=2, seed=0)
    return step, torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.1, total_iters=200)


def train(steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(float(step.step(closure, torch.randperm(64).split(32))))  # one step on two micro-batches
        schedule.step()
    return losses


pathlib.Path("runs").mkdir(exist_ok=True)
step, schedule = optimizer()
step.open_journal("runs/plain.zoj", replace=True)
losses = train(100)
parts = {"model": model, "step": step, "schedule": schedule}
torch.save({"random": torch.get_rng_state(), **{name: part.state_dict() for name, part in parts.items()}}, "runs/plain.pt")
losses += train(100)
step.close_journal()

zk.replay(base, "runs/plain.zoj")  # the same weights again, from those of the beginning
assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))

saved = torch.load("runs/plain.pt")  # and the second half again, from the checkpoint
step, schedule = optimizer()
for name, part in (("model", model), ("step", step), ("schedule", schedule)):
    part.load_state_dict(saved[name])
torch.set_rng_state(saved["random"])
assert train(100) == losses[100:]
assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
