"""Workers that share a step: who evaluates which losses, how the losses travel, and what is said when one fails, is missing or is another.

Belongs here: the cut of a table of points x micro-batches, one round of numbers between the workers of a process group, who is named.
Does not belong here: what stands for what they compare (digests.py), forwards (evaluate.py), what follows from losses (decide.py), files (record.py).

A round is one exchange of `FRAME` float64 numbers of each worker: what it is about, whether this worker failed, a digest of what all must have in common,
and losses; those that do not fit follow in a second one, once the workers have agreed on how many there are. Only torch.distributed carries them, in a gloo
group of their own: the losses of a GPU are read by its host, and the user's own collectives are never mixed with ours.

Each worker says its numbers to each of the others, at once (an all-to-all): they cross one link, however many workers there are, and each waits itself for each
of the others, so that it learns itself that one is gone. gloo's all-gather is a ring, whose numbers cross all links but one, one after another, and where a
dead worker's neighbours alone learn of it; by a tree they would cross log2 of the workers' number, and its partners learn.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from zo_kernels import checks
from zo_kernels.optim.digests import number_of, print_of
from zo_kernels.optim.findings import ZOWarning

PARALLEL = ("auto", "directions", "data", "both")
FRAME = 16  # numbers of a round
HEAD = 4  # of them: what it is about, failure, what is in common, random numbers
AGAIN = "the comparison of weights that were written to between steps"
GIVEN = "what the closure gives the model"
UNSEEN = "nothing that a look sees, as in a compiled model"
REMEDIES = dict.fromkeys(  # what to do where workers differ in this
    ("micro-batches", GIVEN),
    "all of them take the same batches, and share the forwards (no DistributedSampler, the same shuffling)",
)
GRACE = 5.0  # seconds in which who still waits says so, when a round has come to no end; a connection that is closed needs a fifth

T = TypeVar("T")


class WorkerError(RuntimeError):
    """Another worker failed, does not answer, or has another run than this one: the text names it. Nothing of the step was done here; whoever had heard of all
    others before one was lost may have done it, and its record, which only the first worker's journal has, is what a run goes on from.

    Attributes:
        ranks: of the workers that it is about, in the process group.
    """

    def __init__(self, text: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.ranks = tuple(ranks)


# ---- the cut of a table ---------------------------------------------------------------------------------------------------


def cut(parallel: str, points: int, batches: int, workers: int, visited: bool = False) -> list[list[int]]:
    """The cells of each worker, in order; cell p * batches + k is micro-batch k at point p. A worker for which none is left makes again those of another,
    while it would wait for them: its forwards draw the same random numbers, and it sees how the model reads its weights.

    Args:
        parallel: "directions": whole points. "data": a micro-batch at all points. "both": any cell. "auto": the one whose largest share is the smallest.
        visited: by blocks, which serve all points of a micro-batch in one visit: "both" gives a worker few micro-batches, and of two largest shares as small
            "auto" takes the one with fewer visits.
    """
    if parallel == "auto":
        choices = [cut(kind, points, batches, workers, visited) for kind in PARALLEL[1:]]
        return min(choices, key=lambda shares: (max(map(len, shares)), max(visits(s, batches) for s in shares) if visited else 0))
    parts = {"directions": points, "data": batches, "both": points * batches}[parallel]

    def of(part: int) -> list[int]:
        if parallel == "directions":
            return [part * batches + k for k in range(batches)]
        if parallel == "data":
            return [p * batches + part for p in range(points)]
        return [part % points * batches + part // points if visited else part]

    sharing = min(workers, parts)
    shares = [
        sorted(c for part in range(w * parts // sharing, (w + 1) * parts // sharing) for c in of(part)) for w in range(sharing)
    ]
    return [shares[w % sharing] for w in range(workers)]


def visits(share: Sequence[int], batches: int) -> int:
    """How often a block comes for these cells, where it serves all points of a micro-batch."""
    return max(Counter(c // batches for c in share).values())


def parts_batches(shares: Sequence[Sequence[int]], batches: int) -> bool:
    """Whether the micro-batches of a point are not all of one worker."""
    return any(len({c // batches for c in share}) * batches != len(share) for share in shares)


@contextlib.contextmanager
def _reaching_the_store() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise WorkerError(
            "the store of process_group cannot be reached: the process that keeps it, as a rule the first one, has ended, or raised before all had made the "
            "optimizer, and its own output says why. Nothing was made"
        ) from error


# ---- the workers ------------------------------------------------------------------------------------------------------------


class Workers:
    """The workers of one optimizer, or of what they evaluate beside one: all make theirs, and all its calls, in the same order.

    Args:
        group: the processes. parallel: how an optimizer's steps are shared, see `cut`. timeout: seconds that a round waits for the slowest worker.
        made_of: lists of texts by what they are of: what must be the same on all for an optimizer to be made. visited: see `cut`; of one, then of all.

    Attributes:
        rank, size: of this worker and of all, in the group. sent: bytes that this worker has sent to all others, but for what tells a failure.
        common: what a step has in common, in words that an error may use.
        met: the workers have compared what they begin with.

    Raises:
        TypeError, ValueError: no process group that this process is in; parallel or timeout is none. WorkerError: a worker makes another one, or none: names
            it, and what differs.
    """

    def __init__(
        self,
        group: Any,
        parallel: str = "auto",
        timeout: float = 600.0,
        made_of: Mapping[str, Sequence[str]] | None = None,
        visited: bool = False,
    ) -> None:
        checks.check_choice("parallel", parallel, PARALLEL)
        if not (isinstance(timeout, (int, float)) and 0 < timeout < 1e7):
            raise ValueError(f"timeout={timeout!r:.80} must be a positive number of seconds")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={group!r:.80} must be a process group of torch.distributed that this process is in: call "
                "torch.distributed.init_process_group(), and give torch.distributed.group.WORLD"
            )
        self.parallel, self.timeout = parallel, float(timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        self.common: dict[str, Any] = {}
        self.met = False
        self.written = ""  # the parameter for which they compare it again
        self.chain = ""  # a digest of all decisions so far
        self.whole = False  # the forwards draw random numbers: a point is one worker's
        self.alike = (
            False  # they have the parts of one model between them: all make their forwards together, at one point after the other
        )
        self.apart = False  # of such workers: each has whole layers in a forward, and may have a micro-batch of its own
        self.lost: WorkerError | None = None
        self.visited = visited
        self._group: Any = None
        if self.size > 1:
            self._introduce(group.get_group_store(), {"parallel": [parallel], **(made_of or {})})
            self._group = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=datetime.timedelta(seconds=self.timeout),
                backend="gloo",
                use_local_synchronization=True,
            )

    @_reaching_the_store()
    def _introduce(self, store: Any, made_of: Mapping[str, Sequence[str]]) -> None:
        """Compare, by the processes' store, what torch would wait for in vain where it differs: a new group is named by how many there are, and whole tensors
        are gathered one after another."""
        turn = store.add(f"zo_kernels/made by {self.rank}", 1)

        def exchange(what: str, value: Any) -> list[Any]:
            keys = [f"zo_kernels/{turn}/{what}/{rank}" for rank in range(self.size)]
            gone = f"zo_kernels/{turn}/gone"
            store.set(keys[self.rank], json.dumps(value))
            try:
                store.wait(keys, datetime.timedelta(seconds=self.timeout))
                if store.check([gone]):  # for this worker's own sake
                    raise RuntimeError("the others no longer wait")
            except RuntimeError as error:
                silent = [rank for rank, key in enumerate(keys) if not store.check([key])] or [self.rank]
                store.set(gone, "")
                raise WorkerError(
                    f"worker {_names(silent)} of {self.size} did not come within {self.timeout:g} s to make optimizer number {turn} of process_group's "
                    "processes: all of them make the same ones, in the same order. Nothing was made",
                    silent,
                ) from error
            return [json.loads(store.get(key)) for key in keys]

        mine = {"process groups": [str(_groups())], **{what: list(lines) for what, lines in made_of.items()}}
        rows = exchange("digests", {"visited": self.visited} | {what: print_of(lines) for what, lines in mine.items()})
        self.visited = any([row.pop("visited") for row in rows])
        for what in dict.fromkeys(key for row in rows for key in row):
            if len({row.get(what) for row in rows}) > 1:
                lists = exchange(what, mine.get(what, []))
                at = next(k for k in range(max(map(len, lists))) if len({tuple(found[k : k + 1]) for found in lists}) > 1)
                remedy = (
                    " (which name torch's new ones: make the optimizer before those that not every process is in, or as many on each)"
                    if what == "process groups"
                    else ""
                )
                where = (
                    f"{what}, number {at + 1} of {', '.join(str(len(found)) for found in lists[:4])}"
                    if max(map(len, lists)) > 1
                    else what
                )
                self._differ(where + remedy, ["".join(found[at : at + 1]) or "nothing" for found in lists])

    # -- rounds --

    def round(
        self, what: str, error: BaseException | None = None, common: Mapping[str, Any] | None = None, drawn: str = "",
        values: Sequence[float] = (), counts: Sequence[int] = (), why: str = "",
    ) -> tuple[list[list[float]], list[float]]:  # fmt: skip
        """One round, which every worker makes.

        Args:
            what: it is about. error: why this worker failed. common: what is the same on all workers. drawn: a digest of the random state around a forward
                that drew numbers. values: of this worker; counts: how many each worker has. why: this one is at it, where others are at something else.

        Returns:
            The values of each worker, and the numbers that stand for what each has drawn.

        Raises:
            WorkerError: a worker failed, differs or is missing; names it. KeyboardInterrupt: one was interrupted. Where this worker failed itself, nothing:
            its error is the caller's to raise, with a note where the others could not be told.
        """
        failure = 0.0 if error is None else 2.0 if isinstance(error, KeyboardInterrupt) else 1.0
        text = "" if common is None else print_of(common)
        head = [number_of(what), failure, number_of(text), number_of(drawn) if drawn else 0.0]
        room = FRAME - HEAD
        try:
            rows = self._gather([*head, *values[:room]], FRAME)
            failing = any(row[1] for row in rows)
            reasons = self.tell(None if error is None else f"{type(error).__name__}: {error}"[:300]) if failing else []
        except WorkerError as missing:
            if error is None:
                raise
            self.met = False
            error.add_note(f"The others have not heard of it: {missing}")
            return [], []
        if failing:
            self.met = False
            if error is None:
                failed = [rank for rank, reason in enumerate(reasons) if reason is not None]
                if all(rows[rank][1] == 2.0 for rank in failed):
                    raise KeyboardInterrupt(f"worker {_names(failed)} was interrupted")
                raise WorkerError(
                    f"worker {failed[0]} of {self.size} failed in {what} ({reasons[failed[0]]}): nothing was done on any worker",
                    failed,
                )
            return [], []
        if len({row[0] for row in rows}) > 1:
            self._differ("what it is at", self.tell(what + why))
        if len({row[2] for row in rows}) > 1:
            self._compare(self.tell({key: f"{value!r:.200}" for key, value in (common or {}).items()}))
        if len({row[3] for row in rows}) > 1:
            odd = [rank for rank, row in enumerate(rows) if row[3] != rows[0][3]]
            self._stop(
                f"the forwards of worker {_names(odd)} drew other random numbers than worker 0's: seed all workers alike (torch.manual_seed, numpy, random), "
                "or take what draws out (dropout: model.eval()). Numbers whose count depends on the weights cannot be shared",
                odd,
            )
        found = [row[HEAD:] for row in rows]
        if counts and max(counts) > room:
            more = self._gather(values[room:], max(counts) - room)
            found = [a + b for a, b in zip(found, more, strict=True)]
        return [row[:n] for row, n in zip(found, counts, strict=True)] if counts else found, [row[3] for row in rows]

    def _gather(self, values: Sequence[float], size: int) -> list[list[float]]:
        """`size` numbers of each worker, in the order of their ranks."""
        mine = torch.zeros(size, dtype=torch.float64)
        mine[: len(values)] = torch.tensor(values, dtype=torch.float64)
        found = [row.tolist() for row in self._exchange(mine, [size] * self.size)]
        self.sent += 8 * size * (self.size - 1)
        return found

    def tell(self, value: T) -> list[T]:
        """An object of each worker, in the order of their ranks. A step needs it only where something is wrong."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = [int(one) for one in self._exchange(torch.tensor([len(mine)]), [1] * self.size)]
        return [pickle.loads(one.numpy().tobytes()) for one in self._exchange(mine, lengths)]

    def _exchange(self, mine: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        """A vector of each worker, in the order of their ranks; of one dtype, and of these lengths.

        Raises:
            WorkerError: a worker does not answer, now or before; names it.
        """
        if self.lost is not None:
            raise WorkerError(f"{self.lost} This optimizer shares no further step: make a new one", self.lost.ranks)
        if self.size == 1:
            return [mine]
        found = mine.new_empty(sum(lengths))
        try:
            dist.all_to_all_single(found, mine.repeat(self.size), [*lengths], [len(mine)] * self.size, group=self._group)
        except RuntimeError as error:
            self.lost = self._missing(error)
            raise self.lost from error
        return found.split([*lengths])

    def _stop(self, text: str, ranks: Sequence[int]) -> None:
        self.met = False
        raise WorkerError(f"{text}. Nothing was done on any worker", ranks)

    def _differ(self, what: str, found: Sequence[Any]) -> None:
        odd = [rank for rank, one in enumerate(found) if one != found[0]]
        remedy = f": {REMEDIES[what]}" if what in REMEDIES else ""
        self._stop(
            f"worker {_names(odd)} differs from worker 0 in {what}: {found[odd[0]]} there, {found[0]} on worker 0{remedy}", odd
        )

    def _compare(self, found: Sequence[Mapping[str, str]]) -> None:
        """Name the first thing in which a worker differs from the first one."""
        for what in dict.fromkeys(key for one in found for key in one):
            if len({one.get(what) for one in found}) > 1:
                self._differ(what, [one.get(what, "nothing") for one in found])
        self._stop("the workers' values differ behind their first 200 characters", range(1, self.size))

    # -- a worker that is missing --

    def _missing(self, error: RuntimeError) -> WorkerError:
        """Which workers do not answer: those whose connection is closed, or after a timeout those that are not waiting, and that do not say that they only
        gave up for another's sake."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        late = "imed out" in str(error)
        silent = set(others) if late else {rank for rank in others if not self._reaches(rank)}
        key = f"zo_kernels/{self._group.group_name}/"
        with contextlib.suppress(RuntimeError):
            store = self._group.get_group_store()
            store.set(f"{key}{self.rank}", "gave up")
            end = time.monotonic() + (GRACE if late else GRACE / 5)
            while silent and time.monotonic() < end:
                silent -= {rank for rank in silent if store.check([f"{key}{rank}"])}
                time.sleep(0.05)
            if not silent:  # others were late, and know for whom they waited, or soon will
                store.wait([f"{key}missing"], datetime.timedelta(seconds=2 * GRACE))
                ranks, late = json.loads(store.get(f"{key}missing"))
                silent = set(ranks)
            elif not store.check([f"{key}missing"]):
                store.set(f"{key}missing", json.dumps([sorted(silent), late]))
        dist.destroy_process_group(self._group)
        self._group = None
        names = f"worker {_names(sorted(silent))}" if silent else "a worker"
        why = f"did not come within {self.timeout:g} s" if late else "is gone (it ended, was killed, or cannot be reached)"
        return WorkerError(
            f"{names} of {self.size} {why}: the step was not done. Start the workers again: a run with a journal goes on from it, with any number of them.",
            sorted(silent),
        )

    def _reaches(self, rank: int) -> bool:
        try:
            dist.isend(torch.zeros(1), group=self._group, group_dst=rank)
        except RuntimeError:
            return False
        return True

    # -- what they do together --

    @contextlib.contextmanager
    def together(self, what: str, common: Mapping[str, Any] | None = None) -> Iterator[None]:
        """What each worker does, and none goes on from where one failed.

        Raises:
            What the block raises; WorkerError of another worker's, or where `common` differs.
        """
        try:
            yield
        except BaseException as error:
            self.round(what, error)
            raise
        self.round(what, None, common)

    def failed(self, what: str, error: BaseException) -> None:
        """What each worker does alone has failed on this one, which raises that: the others are in a round, and do not wait for it."""
        if not isinstance(error, WorkerError) and self.lost is None:
            self.round(what, error)

    def meet(self, common: Mapping[str, Any]) -> None:
        """Compare what the workers begin with, or where they stand when all of them had their weights written to.

        Raises:
            WorkerError: a worker has another seed, base, method, version, ...: names it, and what differs; or weights of this one were written to and another's
                were not: names it, and the parameter.
        """
        self.round(AGAIN if self.written else "the comparison before the first step", common=common, why=self._why)
        self.met = True

    def begin(self, common: Mapping[str, Any], written: str = "") -> None:
        """A step begins, and all workers' rounds compare this. Those that are alike do so at once: a forward that one of them makes alone waits for the
        others' parts in torch.

        Args:
            written: the parameter that somebody has written to, moved or replaced since the last step: the workers compare where they stand. "": none. Of
                those that are alike one is enough: a part that was written to is a part of everyone's weight.

        Raises:
            WorkerError: of those, one has another step, batches, or parameters that it trains; names it, and what differs.
        """
        self.common, self.written = dict(common), written
        if self.alike:
            found, _ = self.round("the beginning of a step", common=self.common, values=[float(bool(written))])
            if any(row[0] for row in found):
                self.written = written or "a part"
        self.met = self.met and not self.written

    @property
    def _why(self) -> str:
        return (
            f" ({self.written}: all workers are to write the same, flush() of lazy steps too; the next step compares all weights)"
            if self.written
            else ""
        )

    def hand_out(self, value: T) -> T:
        """The first worker's, on all."""
        return self.tell(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def decided(self, decision: Mapping[str, Any]) -> None:
        """What a step decided: the next round compares it."""
        self.chain = print_of([self.chain, decision])

    def agree(self, found: Sequence[Sequence[float]], shares: Sequence[Sequence[int]]) -> None:
        """Of workers that are alike, each has found the same losses where they had the same share.

        Raises:
            WorkerError: one has others; names it.
        """
        rows = [np.array(row, dtype=np.float64).tobytes() for row in found]
        if self.alike and shares[0] == shares[-1] and (odd := [rank for rank, row in enumerate(rows) if row != rows[0]]):
            self._stop(
                f"worker {_names(odd)} found other losses than worker 0 ({list(found[odd[0]])[:2]} there, {list(found[0])[:2]} on worker 0), "
                "and the weights are sharded over them: give all of them the same batches (no DistributedSampler), and models in the same mode",
                odd,
            )

    def shares(self, points: int, batches: int) -> list[list[int]]:
        """See `cut`. Workers that are alike have as many forwards at each point, or all of them.

        Raises:
            ValueError: micro-batches were to be shared, and the workers do not divide them.
        """
        if self.alike:
            if self.apart and not self.whole and batches % self.size == 0:
                return cut("data", points, batches, self.size)
            if self.parallel == "data":
                raise ValueError(
                    f"parallel='data': {self.size} processes with sharded weights make their forwards together, and {batches} micro-batches are not as many "
                    "for each: give a multiple"
                )
            return [list(range(points * batches))] * self.size
        return cut("directions" if self.whole else self.parallel, points, batches, self.size, self.visited)

    def idle(self, shares: Sequence[Sequence[int]]) -> int:
        """How many make forwards of others again, where shards leave them a choice."""
        return 0 if self.alike else self.size - len({tuple(share) for share in shares})


def _groups() -> int:
    """How many process groups this process is in, where torch tells."""
    return len(getattr(getattr(dist.distributed_c10d, "_world", None), "pg_names", ()))


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) < 4 else f"{ranks[0]}, {ranks[1]} and {len(ranks) - 2} more"


def workers_in(
    process_group: Any, parallel: str, timeout: float, made_of: Callable[[], Mapping[str, Sequence[str]]], visited: bool
) -> Workers | None:
    """Those of an optimizer, see `Workers`; None without a process group, with a word where there are processes that could share its steps."""
    if process_group is not None:
        return Workers(process_group, parallel, timeout, made_of(), visited)
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        warnings.warn(
            f"torch.distributed has {size} processes, and this optimizer is given no process_group: each would step with losses of its own, and their weights "
            "drift apart. Give process_group=torch.distributed.group.WORLD, and the same batches to all (docs/parallel.md); runs that have nothing in "
            "common need no torch.distributed",
            ZOWarning,
            stacklevel=4,
        )
    return None


def together(
    workers: Workers | None, what: str, common: Mapping[str, Any] | None = None
) -> contextlib.AbstractContextManager[None]:
    """`Workers.together`, of a worker that may be alone."""
    return contextlib.nullcontext() if workers is None else workers.together(what, common)
