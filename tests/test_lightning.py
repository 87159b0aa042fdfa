"""Lightning's automatic optimization calls backward in the closure: refused with what to do, before a weight moves.

Does not belong here: manual optimization (examples/lightning_manual.py, which tests/test_examples.py runs).
"""

from __future__ import annotations

import copy
from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk


class Automatic(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return zk.MeZOStep(self.net, lr=1e-2)


def test_automatic_optimization_is_refused(tmp_path: Path) -> None:
    model = Automatic()
    before = copy.deepcopy(model.net)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with pytest.raises(RuntimeError, match=r"calls backward\(\).*in Lightning: self.automatic_optimization = False"):
        trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3))))
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), before.parameters(), strict=True))
