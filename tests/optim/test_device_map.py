"""Models that accelerate has spread over devices by hooks (`device_map` of Hugging Face). Here all devices are the CPU: the hooks are real, a second device is
not; what is known of one without having it is in tests/kernels/test_devices.py.
"""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.models import VOCABULARY, llama, llama_tied

LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ROWS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def model(tied: bool = False, frozen: str = "") -> nn.Module:
    torch.manual_seed(3)
    made = (llama_tied if tied else llama)().eval()
    for name, p in made.named_parameters():
        p.requires_grad_(not frozen or not name.startswith(frozen))
    return made


def dispatched(made: nn.Module, folder: Path, disk: str = "") -> nn.Module:
    places = {name: "disk" if name == disk else "cpu" for name in LAYERS}
    with_hooks: nn.Module = accelerate.dispatch_model(made, places, offload_dir=str(folder), force_hooks=True)
    return with_hooks


def run(made: nn.Module, mode: str, journal: Path | None = None) -> dict[str, Tensor]:
    step = zk.MeZOStep(made, lr=1e-3, eps=1e-2, seed=2, perturbation=mode, journal=journal, resume=journal is not None)
    while step.steps < 4:
        step.step(lambda: made(input_ids=ROWS, labels=ROWS).loss)
    step.close_journal()
    return {name: p for name, p in made.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(p.detach(), b[name].detach()) for name, p in a.items())


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_hooks_change_no_bit(tied: bool, mode: str, tmp_path: Path) -> None:
    want = run(model(tied), mode)
    assert same(run(dispatched(model(tied), tmp_path), mode, tmp_path / "run.zoj"), want)
    whole = model(tied)
    zk.replay(whole, tmp_path / "run.zoj")
    assert same(dict(whole.named_parameters()), want)


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_frozen_weights_may_come_for_their_forward(mode: str, tmp_path: Path) -> None:
    layer = LAYERS[2]
    spread = dispatched(model(frozen=layer), tmp_path, disk=layer)
    assert all(p.is_meta == name.startswith(layer) for name, p in spread.named_parameters())
    assert same(run(spread, mode), run(model(frozen=layer), mode))


def test_trained_weights_that_accelerate_offloads_are_refused(tmp_path: Path) -> None:
    refusal = r"parameter '{}' is offloaded by accelerate \(device_map.*zk.offload\(model, source\); or freeze"
    with pytest.raises(ValueError, match=refusal.format("model.layers.1.self_attn.q_proj.weight")):
        zk.MeZOStep(dispatched(model(), tmp_path, disk=LAYERS[2]), lr=1e-3)
    with pytest.raises(ValueError, match=refusal.format("model.embed_tokens.weight")):
        zk.MeZOStep(accelerate.cpu_offload(model(), torch.device("cpu")), lr=1e-3, perturbation="inplace")
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'weight' is on the meta device and has no values: load its weights first"):
        zk.MeZOStep(empty, lr=1e-3)
