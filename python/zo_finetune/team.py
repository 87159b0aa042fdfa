"""The processes of one run: what each does of it, and what the first one alone does.

    torchrun --nproc-per-node 4 -m zo_finetune train ...

Belongs here: whether there are several, what they share of an evaluation, and the folders of those that write none. Does not belong here: how a step is
shared (zo_kernels), what a run is (run.py).

The first process has the run's folder and speaks. Each of the others has a folder of its own, which goes when it ends: what a run writes, it writes there, and
what it reads there, the first one has handed out. Nothing here loads torch before there is a team.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from zo_finetune import console
from zo_finetune.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
SHARED = ("train", "resume")  # commands
_team: Any = None  # zo_kernels.Workers; None: this process is alone


class Told(UserError):
    """A mistake of the user that the first process has found, and has said."""


def size() -> int:
    """Of the team, as torchrun's environment has it."""
    there = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if there else 1


def rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def restarted() -> bool:
    """Whether torchrun has started these processes again, after one of them had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def joined(command: str) -> Iterator[None]:
    """Inside, the processes of torchrun are a team, of which the first one speaks.

    Raises:
        UserError: the command is none that they could share.
    """
    global _team
    if size() == 1:
        yield
        return
    if command not in SHARED:
        raise UserError(
            f"zo-finetune {command} is one process's: start it without torchrun, which shares the steps of {' and '.join(SHARED)}"
        )
    console.hush(rank() > 0)
    import torch.distributed as dist

    import zo_kernels

    dist.init_process_group("gloo")
    try:
        _team = zo_kernels.Workers(dist.group.WORLD)
        yield
    finally:
        _team = None
        dist.destroy_process_group()


def options(parallel: str) -> dict[str, Any]:
    """Of the library's optimizers."""
    if _team is None:
        return {}
    import torch.distributed as dist

    return {"process_group": dist.group.WORLD, "parallel": parallel}


def device(given: str) -> str:
    """That of this process, where the user leaves it open which."""
    if _team is None or given not in ("auto", "cuda"):
        return given
    import torch

    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if torch.cuda.is_available() else given


def by_first(function: Callable[[], T]) -> T:
    """What the first process makes of it, on all.

    Raises:
        UserError: of the first one; on the others one that is said already.
    """
    if _team is None:
        return function()
    found: Any = None
    mistake: UserError | None = None
    with _team.together("what the first process does alone"):
        if _team.rank == 0:
            try:
                found = function()
            except UserError as error:
                mistake = error
    found, said = _team.hand_out((found, None if mistake is None else str(mistake)))
    if said is not None:
        raise mistake or Told(said)
    return found  # type: ignore[no-any-return]


def first() -> bool:
    """Whether this process writes the run's files."""
    return _team is None or _team.rank == 0


def mapped(function: Callable[[T], R], parts: Sequence[T], progress: Callable[[int], None], count: Callable[[T], int]) -> list[R]:
    """`function` of each part, in their order: of several processes each makes its own, and all get all.

    Args:
        function: its result is plain data, or tensors on the CPU. progress: called with the `count` of each part as its turn comes.
    """
    own: dict[int, R] = {}

    def make() -> None:
        for k, part in enumerate(parts):
            if _team is None or k % _team.size == _team.rank:
                own[k] = function(part)
            progress(count(part))

    if _team is None:
        make()
        return [own[k] for k in range(len(parts))]
    with _team.together("an evaluation"):
        make()
    all_of: dict[int, R] = {k: one for theirs in _team.tell(own) for k, one in theirs.items()}
    return [all_of[k] for k in range(len(parts))]


@contextlib.contextmanager
def folder(output: str) -> Iterator[str]:
    """Where this process writes what a run writes."""
    if first():
        yield output
        return
    own = tempfile.mkdtemp(prefix="zo-finetune-")
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def copied(output: Path, names: Sequence[str]) -> None:
    """Files of the first process's folder, in that of each other one."""
    if _team is None:
        return

    def read() -> dict[str, bytes]:
        return {name: (output / name).read_bytes() for name in names if (output / name).exists()}

    found = by_first(read)
    if not first():
        for name, data in found.items():
            (output / name).write_bytes(data)
