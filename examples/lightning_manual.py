"""Lightning: manual optimization, in which a module calls the step itself (automatic optimization would call backward). Checkpoints, the schedule and going on
are Lightning's; the weights are those of a loop written by hand.

pip install lightning; python examples/lightning_manual.py
"""

import copy

import lightning
import torch

import zo_kernels as zk


class Regression(lightning.LightningModule):
    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.accumulate, self.batches, self.losses = accumulate, [], []

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[torch.Tensor], number: int) -> None:
        self.batches.append(batch)
        if len(self.batches) < self.accumulate:
            return
        # One closure for a step's micro-batches: Lightning wraps it in one without an argument, and counts its steps by it.
        loss = self.optimizers().step(lambda: torch.stack([self.loss(b).double() for b in self.batches]).mean())
        self.lr_schedulers().step()
        self.log("loss", loss)
        self.losses.append(float(loss))
        self.batches = []

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        step = zk.MeZOStep(self.net, lr=1e-2, eps=1e-3, queries=4, seed=0)
        return [step], [torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.1, total_iters=80)]


def trainer(epochs: int, checkpoints: str | None = None) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=checkpoints, enable_checkpointing=checkpoints is not None, **quiet
    )


torch.manual_seed(0)
base, data = Regression(accumulate=2), torch.randn(64, 8)
dataset = torch.utils.data.TensorDataset(data, data[:, :1] - data[:, 1:2])
loader = torch.utils.data.DataLoader(dataset, batch_size=8)

model = copy.deepcopy(base)
run = trainer(20)
run.fit(model, loader)
assert run.global_step == 80

half = copy.deepcopy(base)  # and in two parts, the second from a checkpoint of Lightning's
run = trainer(10, "runs/lightning")
run.fit(half, loader)
run.save_checkpoint("runs/lightning/half.ckpt")
rest = copy.deepcopy(base)
trainer(20).fit(rest, loader, ckpt_path="runs/lightning/half.ckpt", weights_only=True)
assert half.losses + rest.losses == model.losses

by_hand = copy.deepcopy(base)
([step], [schedule]), losses = by_hand.configure_optimizers(), []
for _ in range(20):
    batches = list(loader)
    for k in range(0, len(batches), 2):
        losses.append(float(step.step(by_hand.loss, batches[k : k + 2])))
        schedule.step()
assert losses == model.losses
for other in (rest, by_hand):
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
print(f"loss {sum(losses[:4]) / 4:.3f} -> {sum(losses[-4:]) / 4:.3f}")  # of an epoch
