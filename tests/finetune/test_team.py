"""Runs of several processes, as torchrun starts them: the files of one process's run, through deaths and other numbers of processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import figures, files, run_folder, team
from zo_finetune.cli import main
from zo_finetune.objectives.classification import Classification

from tests.finetune.test_resume import assert_same
from zo_kernels import journal

STEPS = 5
LIMIT = 120.0  # seconds of a team's run

Arguments = Callable[..., list[str]]


def torchrun(
    size: int, command: list[str], folder: Path, restarts: int = 0, death: tuple[int, int] | None = None
) -> list[tuple[int, str]]:
    """What each process ended with (its exit code, or minus the signal's number), and what it said. `death`: the worker that is killed in its so-manyth
    loss."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in range(size):
        if not (pid := os.fork()):
            code = 1
            try:
                torch.set_num_threads(1)
                file = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                sys.stdout = sys.stderr = os.fdopen(file, "w")
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
                if death is not None and death[0] == rank:
                    dies_at(death[1])
                code = main(command)
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids[pid] = rank
    ends, until = [0] * size, time.monotonic() + LIMIT
    while pids:
        for pid in list(pids):
            if (done := os.waitpid(pid, os.WNOHANG))[0]:
                ends[pids.pop(pid)] = os.waitstatus_to_exitcode(done[1])
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [(end, (folder / str(rank)).read_text()) for rank, end in enumerate(ends)]


def dies_at(count: int) -> None:
    loss, left = Classification.loss, [count]

    def counted(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args)

    Classification.loss = counted  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def arguments(train_command: Arguments) -> Arguments:
    def build(output: Path, *more: str, **options: Any) -> list[str]:
        fixed = {
            "steps": STEPS,
            "lr": "1e-3",
            "eval_every": 2,
            "seed": 5,
            "accumulate": 2,
            "eval_batch_size": 4,
            "parallel": "both",
        }
        return train_command(output, *more, **{**fixed, **options})

    return build


@pytest.fixture(scope="module")
def alone(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_curve", lambda path, *_: path.write_bytes(b""))
        assert main(arguments(path, "--keep", "best")) == 0
    return path


def same_run(run: Path, alone: Path) -> None:
    text = (run / "result.json").read_text().replace(str(run), str(alone))
    (run / "result.json").write_text(text)
    assert_same(run, alone)
    for name in ("scores_before.csv", "scores_after.csv", "scores_dev.csv", "evaluations.jsonl"):
        if (alone / name).exists():
            assert (run / name).read_bytes() == (alone / name).read_bytes(), name


def test_two_processes_write_what_one_does(arguments: Arguments, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (first, said), (second, silence) = torchrun(2, arguments(run, "--keep", "best"), tmp_path / "said")
    assert (first, second) == (0, 0), said + silence
    assert "before:" in said and "after:" in said and silence == ""
    same_run(run, alone)
    # What is there is not written over, and one says so.
    (first, said), (second, silence) = torchrun(2, arguments(run), tmp_path / "said")
    assert (first, second) == (2, 2) and "is not empty" in said and silence == ""


def test_a_team_that_loses_one_goes_on_as_another(arguments: Arguments, alone: Path, tmp_path: Path) -> None:
    """torchrun starts the same command again; a person says `resume`, to as many processes as are there."""
    run = tmp_path / "run"
    command = arguments(run, "--keep", "best")
    ends = torchrun(2, command, tmp_path / "said", death=(1, 6))
    assert ends[1][0] == -signal.SIGKILL and ends[0][0] == 2 and "worker 1 of 2 is gone" in ends[0][1], ends
    assert "go on with: zo-finetune resume" in ends[0][1]
    done = len(journal.read(run / files.JOURNAL))
    assert 0 < done < STEPS
    ends = torchrun(3, command, tmp_path / "said", restarts=1, death=(0, 2))
    assert ends[0][0] == -signal.SIGKILL and {ends[1][0], ends[2][0]} == {2}, ends
    assert "worker 0 of 3 is gone" in ends[1][1] + ends[2][1]
    assert done < len(journal.read(run / files.JOURNAL)) < STEPS
    ends = torchrun(2, ["resume", str(run)], tmp_path / "said")
    assert [end for end, _ in ends] == [0, 0], ends
    assert "resumed after" in ends[0][1] and ends[1][1] == ""
    same_run(run, alone)
    ends = torchrun(2, ["resume", str(run)], tmp_path / "said")
    assert [end for end, _ in ends] == [0, 0] and "is finished after" in ends[0][1], ends


def test_what_is_one_processs_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    ends = torchrun(2, arguments(tmp_path / "a", method="sgd", parallel="auto"), tmp_path / "said")
    assert [end for end, _ in ends] == [2, 2] and "is one process's" in ends[0][1] and ends[1][1] == "", ends
    ends = torchrun(2, ["demo"], tmp_path / "said")
    assert [end for end, _ in ends] == [2, 2] and "start it without torchrun" in ends[0][1], ends
    assert not (tmp_path / "a").exists()


def test_a_run_that_torchrun_starts_again_is_the_same_run(
    arguments: Arguments, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(arguments(alone, "--keep", "best", seed=6)) == 2
    assert "has a run with another seed in it" in capsys.readouterr().err
    before = (alone / "result.json").read_bytes()
    assert main(arguments(alone, "--keep", "best")) == 0
    assert "is finished after" in capsys.readouterr().err
    assert (alone / "result.json").read_bytes() == before
    assert team.size() == 1 and team.first() and run_folder.holds_run(alone)
