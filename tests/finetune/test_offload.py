"""`zo-finetune train --offload`: the bits of a resident run, gone on with after it was killed, and what is refused.

Belongs here: runs of the command line. Does not belong here: how blocks come and go (tests/test_offload.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune.cli import main
from zo_finetune.train import Progress

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


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_adapters_and_other_families(train_command: Callable[..., list[str]], family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": family, "steps": 2, "lr": "1e-3", "peft": "lora" if family == "llama" else "none"}
    assert main(train_command(tmp_path / "resident", *SAME, **options)) == 0
    for where in ("cpu", "disk"):
        assert main(train_command(tmp_path / where, offload=where, **options)) == 0
        assert same(weights(tmp_path / where), weights(tmp_path / "resident"))


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
