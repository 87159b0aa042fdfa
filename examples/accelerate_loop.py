"""accelerate: it places the model and the batches; the step is the optimizer's own, within accelerate's wrapper, and takes an accumulation's batches together.

python examples/accelerate_loop.py
"""

import tiny
import torch
from accelerate import Accelerator

import zo_kernels as zk

accelerator = Accelerator(cpu=True)
model, tokenizer = tiny.causal()
rows = tokenizer(tiny.TEXTS * 8, padding=True, return_token_type_ids=False, return_tensors="pt")
rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
dataset = [{name: values[k] for name, values in rows.items()} for k in range(40)]
step = zk.MeZOStep(model.eval(), lr=1e-2, eps=1e-2, queries=4, seed=0)
schedule = torch.optim.lr_scheduler.LinearLR(step, 1.0, 0.1, total_iters=20)
model, step, loader = accelerator.prepare(model, step, torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True))


def loss_of(inputs):
    return model(**inputs).loss


losses, batches = [], []
for _ in range(4):
    for batch in loader:
        batches.append(batch)
        if len(batches) == 2:  # gradient accumulation: accelerate's own would hand over one batch at a time
            # `step.step(...)`, accelerate's, would drop the loss and the batches.
            losses.append(float(step.optimizer.step(loss_of, batches)))
            schedule.step()
            last, batches = batches, []
accelerator.save_state("runs/accelerate")  # weights, the optimizer's state and random states
further = [float(step.optimizer.step(loss_of, last)) for _ in range(2)]
accelerator.load_state("runs/accelerate")
assert [float(step.optimizer.step(loss_of, last)) for _ in range(2)] == further  # the same directions from the same weights

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
