"""`zo-finetune train --offload`: the bits of a resident run, gone on with after it was killed, and what is refused.

Belongs here: runs of the command line. Does not belong here: how blocks come and go (tests/test_offload.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune.cli import main
from zo_finetune.train import Progress

import zo_kernels as zk
from tests.finetune.test_team import torchrun
from zo_kernels.optim.lockstep import Lockstep

SAME = ["--batches", "padded", "--cache", "off"]  # as an offloaded run has them


class Killed(BaseException):
    pass


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*/*model.safetensors")))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_from_disk_is_the_resident_one(
    train_command: Callable[..., list[str]], model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, gone on with in host memory, and saved block by block; the model's file is as it was."""
    file = model_folder("opt") / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    options: dict[str, Any] = {"model": "opt", "steps": 5, "lr": "1e-3"}
    assert main(train_command(tmp_path / "resident", *SAME, **options)) == 0
    add = Progress.add

    def die(self: Progress, step: int, *rest: Any) -> None:
        add(self, step, *rest)
        if step == 3:
            raise Killed

    monkeypatch.setattr(Progress, "add", die)
    with pytest.raises(Killed):
        main(train_command(tmp_path / "disk", offload="disk", offload_every=2, **options))
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "disk")]) == 0
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "resident"))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert main(train_command(tmp_path / "again", *SAME, model=str(tmp_path / "disk" / "model"), steps=1)) == 0


def test_micro_batches_side_by_side_keep_their_positions(
    train_command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last block, one forward ends, and begins the next micro-batch, before another is at its head."""
    blocks = [f"model.decoder.{name}" for name in ("embed_positions", "layers.0", "layers.1")]
    monkeypatch.setattr(zk, "offload", functools.partial(zk.offload, blocks=blocks))
    options: dict[str, Any] = {"model": "opt", "steps": 3, "lr": "1e-3", "accumulate": 3}
    assert main(train_command(tmp_path / "resident", *SAME, **options)) == 0
    assert main(train_command(tmp_path / "cpu", offload="cpu", **options)) == 0
    assert same(weights(tmp_path / "cpu"), weights(tmp_path / "resident"))


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_adapters_and_other_families(train_command: Callable[..., list[str]], family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": family, "steps": 2, "lr": "1e-3", "peft": "lora" if family == "llama" else "none"}
    assert main(train_command(tmp_path / "resident", *SAME, **options)) == 0
    for where in ("cpu", "disk"):
        assert main(train_command(tmp_path / where, offload=where, **options)) == 0
        assert same(weights(tmp_path / where), weights(tmp_path / "resident"))


def test_processes_share_visits_through_a_death(
    train_command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes the forwards of its micro-batch side by side; one is killed, and another number of them, and then one, goes on."""
    options: dict[str, Any] = {"model": "opt", "steps": 5, "lr": "1e-3", "accumulate": 2}
    assert main(train_command(tmp_path / "resident", *SAME, **options)) == 0
    run = Lockstep.run

    def counted(self: Lockstep, job: Any) -> list[Any]:
        found = run(self, job)
        with (tmp_path / f"beside.{os.environ.get('WORLD_SIZE')}.{os.environ.get('RANK')}").open("a") as file:
            file.write(f"{len(self.forwards)} ")
        return found

    monkeypatch.setattr(Lockstep, "run", counted)
    command = train_command(tmp_path / "run", offload="disk", offload_every=2, parallel="auto", **options)
    ends = torchrun(2, command, tmp_path / "said", death=(1, 6))
    assert ends[1][0] == -signal.SIGKILL and "worker 1 of 2 is gone" in ends[0][1], ends
    ends = torchrun(3, command, tmp_path / "said", restarts=1, death=(2, 2))
    assert ends[2][0] == -signal.SIGKILL and "worker 2 of 3 is gone" in ends[0][1], ends
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "resident"))
    assert [(tmp_path / f"beside.2.{rank}").read_text() for rank in range(2)] == ["2 2 2 ", "2 2 "]  # forwards of each step


def test_refusals(train_command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    for more, words in (
        ({"perturbation": "lazy"}, "--perturbation lazy, which writes to all weights"),
        ({"cache": "memory"}, "--cache memory"),
        ({"method": "adam"}, "--method adam"),
        ({"method": "zo-adam"}, "keeps a state of their size"),
        ({"keep": "best"}, "--keep best"),
    ):
        assert main(train_command(tmp_path / "run", offload="disk", **more)) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
