"""An installed package makes a step with its compiled kernels, and its journal makes the weights again: python tests/wheel.py

Belongs here: what a wheel must do in an environment with torch and numpy alone, without a compiler. Not a test of pytest's; run from outside of the
repository's root, so that the installed package is what is imported.
"""

import copy
import tempfile
from pathlib import Path

import torch

import zo_kernels as zk

assert "cpu" in zk.backends() and "site-packages" in str(Path(zk.__file__)), zk.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
base = copy.deepcopy(model)
x = torch.randn(32, 8)
journal = Path(tempfile.mkdtemp()) / "run.zoj"
step = zk.MeZOStep(model, lr=1e-2, seed=0, backend="cpu", journal=journal)
losses = [float(step.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())) for _ in range(50)]
step.close_journal()
zk.replay(base, journal)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
assert losses[-1] < losses[0]
print(f"zo_kernels {zk.__version__}, torch {torch.__version__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, replayed on every bit")
