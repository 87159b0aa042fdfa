"""A whole run in its folder: load, evaluate, train, evaluate, save; and one that goes on after it was ended.

Belongs here: the order of the parts, what is on the disk before what happens, how a run ends. Does not belong here: the parts (load.py, evaluate.py,
train.py, report.py), the files (run_folder.py), the command line (cli.py).

From Python, as `compare` and the demo do it: `run(Config(...))` is a run with its folder; `load`, `evaluate` and `train` are its parts without one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from zo_finetune import beside, console, files, inputs, methods, outcomes, report, run_folder, sources, team
from zo_finetune.cached import keep
from zo_finetune.common import Common
from zo_finetune.config import EARLIER, Config
from zo_finetune.errors import UserError, one_line
from zo_finetune.evaluate import answers_of, describe, measure
from zo_finetune.files import JOURNAL, path_of
from zo_finetune.keep import Keeper, last
from zo_finetune.load import Loaded, load
from zo_finetune.options import difference
from zo_finetune.outcomes import Outcomes
from zo_finetune.packing import pack
from zo_finetune.report import Outcome
from zo_finetune.scoring import Scorer
from zo_finetune.train import Optimizer, Progress, Stopwatch, eval_every, make_optimizer, pace_of, rate, train
from zo_kernels import InputFactors, WorkerError, journal

FACTORS = journal.factors_path(JOURNAL).name


def run(config: Config, command: Sequence[str] | None = None, common: Common | None = None) -> dict[str, Any]:
    """A run from its beginning; returns what result.json holds. `common`: what other runs of this process have in common with it.

    Ctrl-C during training ends it: weights, log and curve up to then are saved, `interrupted` is true and `after` is None.

    Raises:
        UserError: something the user can put right; nothing has been written yet.
    """
    config.check()
    config = config.placed(os.getcwd()).settled()
    config.check_use()
    goes_on, overwrite = team.by_first(functools.partial(begins, config))
    if goes_on:
        return resume(config.output, command, common)
    with placed(replace(config, overwrite=overwrite)) as config:
        return complete(begun(config, common), command)


def begins(config: Config) -> tuple[bool, bool]:
    """Whether the run's folder has it already, as torchrun starts it again, and it goes on; and whether it replaces what is there.

    Raises:
        UserError: the folder may not be used, or several processes cannot share the run.
    """
    output = Path(config.output)
    if team.size() > 1 and (reason := methods.get(config.method).no_journal):
        raise UserError(f"--method {config.method} is one process's ({reason}): start it without torchrun")
    overwrite = config.overwrite
    if team.restarted() and output.is_dir() and any(output.iterdir()):
        if (output / "config.json").exists() and (output / JOURNAL).exists():
            saved = run_folder.saved_config(output)
            if name := difference(config, asdict(saved), but=lambda option: option.movable):
                raise UserError(f"{output} has a run with another {name} in it: give another folder, or --overwrite")
            return True, False
        overwrite = overwrite or run_folder.holds_run(output)
    read = [("--model", config.model), *(("--data", str(path)) for path in sources.paths_of(config.rows()[0]))]
    read += [("--adapter", config.adapter)] if config.adapter is not None else []
    run_folder.check_run_dir(output, overwrite, read)
    return False, overwrite


@contextlib.contextmanager
def placed(config: Config) -> Iterator[Config]:
    """The run's options in this process of it: the first one writes its folder and saves its weights."""
    with team.folder(config.output) as output:
        yield replace(config, output=output, save=config.save and team.first(), device=team.device(config.device))


def begun(config: Config, common: Common | None) -> Loaded:
    """What a new run is of."""
    with explained(functools.partial(way_on, config)):
        loaded = load(config, common=common)
    rows = len(loaded.train_set)
    if (batch := config.batch_size * config.accumulate) > rows:
        if config.accumulate > 1:
            raise UserError(
                f"--batch-size {config.batch_size} with --accumulate {config.accumulate}: a step would take {batch} examples, and there are {rows} to "
                "train on: give less"
            )
        taken = "as many" if loaded.labels else "all of them"
        note = f"--batch-size {config.batch_size}: there are {rows} examples to train on, and each step takes {taken}"
        loaded = replace(loaded, config=replace(config, batch_size=rows), notes=[*loaded.notes, note])
    return loaded


def resume(folder: str, command: Sequence[str] | None = None, common: Common | None = None) -> dict[str, Any]:
    """Go on with a killed or interrupted run; returns what result.json then holds: that of a run that was never killed, but for times. `common` as in `run`.

    Raises:
        UserError: there is no run in the folder, it is running, or its options, base model or data have changed; nothing was changed.
    """
    found = team.by_first(functools.partial(resumable, folder))
    if isinstance(found, dict):
        console.say(f"{folder} is finished after {found['steps']} steps: there is nothing to resume")
        return found
    for name in ("model", "data", "adapter"):
        if os.path.isabs(path := getattr(found, name) or "") and not sources.paths_of(path):
            raise UserError(
                f"the {name} that the run began with, {path}, is gone: put it back, or write its new place into {found.output}/config.json"
            )
    with placed(found) as config:
        team.copied(Path(config.output), ("config.json", "evaluations.jsonl", "log.csv", FACTORS))
        with explained(functools.partial(way_on, config)):
            loaded = load(config, common=common)
        return complete(loaded, command, resumed=True)


def resumable(folder: str) -> Config | dict[str, Any]:
    """The options of a run that goes on; of one that is finished, its result.

    Raises:
        UserError: see `resume`.
    """
    output = path_of("RUN_DIR", folder).absolute()
    run_folder.check_files(output)
    nothing = f"{folder} has no config.json and {JOURNAL}: no run began there that could be resumed"
    if not (output / "config.json").exists():
        raise UserError(nothing)
    config = run_folder.saved_config(output)
    if reason := methods.get(config.method).no_journal:
        raise UserError(f"{folder}: a run of --method {config.method} cannot be resumed: {reason}; begin it anew with --overwrite")
    if not (output / JOURNAL).exists():
        raise UserError(nothing)
    config.check_file()
    if (result := run_folder.read_result(output / "result.json", config.the_task(), config.save)) is not None:
        return result
    return replace(recorded_config(output, config), output=str(output))


def recorded_config(output: Path, config: Config) -> Config:
    """`config`, with the learning rate and eps that the journal has where it leaves them to the method.

    Raises:
        UserError: the journal is damaged, or began with other options than `config`: names the first that differs.
    """
    try:
        about = journal.read(output / JOURNAL, strict=False).header.hyperparameters
    except journal.UnbegunError:
        return config  # the run died as it wrote the header: it begins anew
    except (OSError, ValueError) as error:
        raise UserError(f"{output}: {one_line(error)}") from error
    recorded = about.get("config")
    if not isinstance(recorded, dict):
        raise UserError(f"{output / JOURNAL} holds no options: it is not of a run of zo-finetune")
    if name := difference(config, {**EARLIER, **recorded}, but=lambda option: option.movable):
        now, then = (files.shown(value) for value in (getattr(config, name), recorded.get(name)))
        raise UserError(
            f"{output / 'config.json'}: {name} is {now}, and was {then} when the run began: put it back, or begin a new run"
        )
    lr, eps = (one_number(about.get(name)) for name in ("lr", "eps"))
    config = replace(config, lr=lr if config.lr is None else config.lr, eps=eps if config.eps is None else config.eps)
    config.check()
    return config


def one_number(values: Any) -> float | None:
    """Of a journal's list of one for each group: an application's run has the same in all."""
    return values[0] if isinstance(values, list) and values and isinstance(values[0], float) else None


# ---- the run itself -----------------------------------------------------------------------------------------------------------


def prepared(loaded: Loaded, scorer: Scorer, resumed: bool) -> tuple[Optimizer, dict[str, Any] | None, InputFactors | None]:
    """The optimizer, what result.json says of hidden states that are kept, and the factors of the inputs, looked at from these. A method that
    needs no factors says what it refuses before anything is computed."""
    config, lm = loaded.config, loaded.language_model
    every, looks = eval_every(loaded), config.recipe().method.looks
    optimizer = None if looks else make_optimizer(lm, config)
    for line in (*loaded.notes, loaded.describe()):
        console.say(line)
    cache = keep(loaded, scorer, config.steps // every + 1 if every else 0)  # at the weights that the run starts from
    beside = Path(config.output) / JOURNAL if resumed else None
    factors = inputs.of_run(config, lm, loaded.train_set, scorer.states, beside, loaded.common)
    return make_optimizer(lm, config, factors) if optimizer is None else optimizer, cache, factors


def digest_of(loaded: Loaded) -> str:
    """SHA-256 of the examples of a run, which its journal has."""
    digest = hashlib.sha256()
    for part in (loaded.train_set, loaded.dev_set, loaded.eval_set):
        for example in part:
            digest.update(repr(example).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def open_journal(loaded: Loaded, optimizer: Optimizer, factors: InputFactors | None, batches: str, resumed: bool) -> Any:
    """Start or resume the run's journal; returns what was in it. Its lock keeps the folder for this process. A method without a journal has
    neither; one of an earlier run goes. `batches`: "packed" or "padded", as was decided."""
    config, output = loaded.config, Path(loaded.config.output)
    if reason := methods.get(config.method).no_journal:
        console.say(f"--method {config.method} writes no journal and cannot be resumed: {reason}")
        output.mkdir(parents=True, exist_ok=True)
        run_folder.remove_journal(output / JOURNAL)
        return None
    about = {
        **team.by_first(lambda: {"model": config.model, "config": asdict(config)}),
        "dtype": str(loaded.language_model.model.dtype).removeprefix("torch."),
        "data": digest_of(loaded),
        "batches": batches,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        past = optimizer.open_journal(
            output / JOURNAL, resume=resumed, replace=config.overwrite and not resumed, hyperparameters=about
        )
    except FileExistsError as error:
        raise UserError(f"{output} has a run in it: resume it, or give another folder") from error
    except (OSError, ValueError, RuntimeError) as error:  # locked, damaged, another base model
        raise UserError(f"{output}: {one_line(error)}") from error
    if factors is not None:  # those of directions lie there already, an adapter's do not
        journal.write_factors(output / JOURNAL, factors)
    if past is not None and past.header.hyperparameters.get("data") != about["data"]:
        optimizer.close_journal()
        raise UserError(f"--data {config.data} gives other examples than when the run began: restore it, or begin a new run")
    if past is not None and (began := past.header.hyperparameters.get("batches", "padded")) != batches:
        optimizer.close_journal()
        raise UserError(
            f"the run began with {began} batches, and here they are {batches}: go on where it began, or begin a new run"
        )
    return past


Measure = Callable[[Scorer, str, str], tuple[dict[str, Any], Outcomes]]  # words for the user, split -> the evaluation, and each row


def perform(loaded: Loaded, resumed: bool) -> Outcome:
    """Evaluate, train, evaluate what is kept. Ctrl-C in the training ends it and keeps what there is, and so it does in the last evaluation;
    before and between it ends the run."""
    config, keeper, evaluating = loaded.config, Keeper(loaded), Stopwatch()

    def evaluated(scorer: Scorer, what: str, split: str) -> tuple[dict[str, Any], Outcomes]:
        examples = loaded.dev_set if split == "dev" else loaded.eval_set
        with evaluating, console.Counter(what, len(examples), "example") as counter:
            answers = answers_of(loaded.task, scorer, examples, config.eval_batch_size, counter.advance)
        with evaluating:
            more = loaded.beside.measure(scorer) if split == "eval" else {}
        return measure(loaded.task, answers) | more, outcomes.outcomes_of(loaded.task, answers, loaded.rows[split])

    outcome = trained(loaded, resumed, keeper, evaluated)
    outcome.kept = last(outcome.steps)
    if not outcome.interrupted:
        if keeper.best:
            team.copied(Path(config.output), (JOURNAL, FACTORS))
        with run_folder.held(Path(config.output) / JOURNAL) as past:
            outcome.kept = keeper.settle(outcome.history, outcome.steps, past)
            try:
                with loaded.scorer() as scorer:
                    outcome.after, found = evaluated(scorer, "after", "eval")
                outcomes.write(Path(config.output) / outcomes.AFTER, found)
                console.say(f"after:  {describe(loaded.task, outcome.after)}")
                beside.say("after: ", outcome.after)
            except KeyboardInterrupt:
                outcome.interrupted = True
    outcome.evaluation_seconds = evaluating.seconds
    return outcome


def trained(loaded: Loaded, resumed: bool, keeper: Keeper, evaluated: Measure) -> Outcome:
    """Evaluate and train. The optimizer is this function's alone: when it is over, nothing but `loaded` holds the model."""
    config, task, output = loaded.config, loaded.task, Path(loaded.config.output)
    every = eval_every(loaded)
    seconds = run_folder.Log.seconds(output / "log.csv") if resumed else {}
    training = Stopwatch()
    evaluations = run_folder.Evaluations(output / "evaluations.jsonl", task)

    with loaded.scorer() as scorer:
        optimizer, cache, factors = prepared(loaded, scorer, resumed)
        batches = pack(loaded, scorer)

        def watch(step: int) -> None:
            measured, found = evaluated(scorer, f"step {step}, dev", "dev")
            outcome.history.append({"step": step, **measured})
            if step == 0:
                outcomes.write(output / outcomes.DEV, found)
            evaluations.add("dev", outcome.history[-1])
            console.say(f"step {step}, dev: {describe(task, outcome.history[-1])}")
            keeper.saw(outcome.history)

        before = evaluations.read()[0] if resumed else None
        measured, found = evaluated(scorer, "before", "eval") if before is None else (before, None)
        console.say(f"before: {describe(task, measured)}")
        beside.say("before:", measured)
        pace = pace_of(loaded)
        with console.Phase("opening the journal"):  # which reads all weights, for their fingerprint
            past = open_journal(loaded, optimizer, factors, batches, resumed)
        outcome, rows = Outcome(before=measured, cache=cache, batches=batches), []
        if past is None:
            run_folder.clear_run_dir(output)
            run_folder.write_config(output, config)
        else:
            outcome.history = evaluations.recover(optimizer.steps)[1]
            wanted = list(range(0, optimizer.steps, every)) if every else []
            if [e["step"] for e in outcome.history] != wanted:
                raise UserError(
                    f"{evaluations.path} lacks evaluations of the first {optimizer.steps} steps: it was changed or is of another run"
                )
            last, lr = 0.0, config.recipe().lr
            for k, r in enumerate(past.steps):
                last = seconds.get(k + 1, last)
                rows.append((k + 1, float(r["loss"]), float(r["gradient"]), lr * rate(config, k), last))
            training = Stopwatch(last)
            torn = f"; cut off: {past.tail.reason}" if past.tail else ""
            console.say(f"resumed after {optimizer.steps} of {config.steps} steps{torn}")
        if found is not None:
            outcomes.write(output / outcomes.BEFORE, found)
            evaluations.add("before", measured)
        log = run_folder.Log(output / "log.csv", rows)
        progress = Progress(log, config.steps, optimizer, loaded.language_model.device, pace=pace)
        try:
            train(loaded, optimizer, scorer, progress, training, watch)
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            try:
                progress.close()
            finally:
                optimizer.close_journal()
        outcome.steps = optimizer.steps
        outcome.losses, outcome.still = log.losses, log.still
        outcome.training_seconds = training.seconds
        outcome.skipped, outcome.state_bytes, outcome.movement = optimizer.skipped, optimizer.state_bytes(), optimizer.movement()
    return outcome


def complete(loaded: Loaded, command: Sequence[str] | None, resumed: bool = False) -> dict[str, Any]:
    """Train and write what there is to write: result.json first, since it is small and tells whether the weights were saved."""
    config, output = loaded.config, Path(loaded.config.output)
    with explained(functools.partial(way_on, config)):
        outcome = perform(loaded, resumed)
        result = report.result_of(loaded, outcome, sys.argv if command is None else command)
        if outcome.interrupted:
            again = "saving the weights, unless Ctrl-C comes again" if config.save else way_on(config)
            console.say(f"interrupted after {outcome.steps} of {config.steps} steps; {again}")
        for line in report.misgivings(outcome, methods.get(config.method).first_order):
            console.say(line)
        files.write_json(output / "result.json", result)
        try:
            if team.first():
                with console.Phase("drawing curve.png"):
                    report.draw(loaded, outcome, output / "curve.png")
        except Exception as error:  # the least of what a run leaves, made by a library that needs fonts, caches and space
            console.say(f"curve.png could not be drawn ({one_line(error)}); log.csv has what it shows")
        if config.save:
            save(loaded, result)
        if outcome.interrupted:
            console.say(f"interrupted after {outcome.steps} of {config.steps} steps; {way_on(config)}")
    return result


def save(loaded: Loaded, result: dict[str, Any]) -> None:
    """The weights, and the word of them in result.json."""
    output = Path(loaded.config.output)
    try:
        with console.Phase("saving the weights"):
            folder, names = run_folder.save_weights(output, loaded.language_model.save)
    except Exception as error:  # safetensors and tokenizers, whose code is Rust's, have exceptions of their own for a full disk
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise UserError(
            f"the weights could not be saved in {output}: {one_line(error)}; {remedy(error)}, then {way_on(loaded.config)}"
        ) from error
    result |= {"saved": str(folder), "saved_files": names}
    files.write_json(output / "result.json", result)


# ---- how it ends before its end -------------------------------------------------------------------------------------------------


def way_on(config: Config) -> str:
    """What to do after a run has ended before its end."""
    output = Path(config.output)
    no_journal = methods.get(config.method).no_journal
    if not team.first():
        return "see what worker 0 says"
    with contextlib.suppress(UserError):
        if run_folder.read_result(output / "result.json", config.the_task(), config.save) is not None:
            return f"see {output / 'result.json'} (the run is finished)"
        if (output / "config.json").is_file() and not no_journal and (output / JOURNAL).is_file():
            return f"go on with: zo-finetune resume {shlex.quote(str(output))}"
    again = "with --overwrite " if not config.overwrite and output.is_dir() and any(output.iterdir()) else ""
    why = f"a run of --method {config.method} has no journal to go on from" if no_journal else "nothing was recorded yet"
    return f"give the same command again {again}({why})"


@contextlib.contextmanager
def explained(way_on: Callable[[], str]) -> Iterator[None]:
    """What ends a run from outside (Ctrl-C, a full disk, too little memory) ends with what to do; `way_on` says that, in the end."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {way_on()}") from None
    except OSError as error:
        raise UserError(f"{one_line(error)}; {remedy(error)}, then {way_on()}") from error
    except WorkerError as error:
        raise UserError(f"{error}; {way_on()}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory ({one_line(error, 160)}): free some, then {way_on()}; or begin anew with a smaller --batch-size, "
            "--eval-batch-size or --max-length, or with --dtype bfloat16"
        ) from error


def remedy(error: BaseException) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error)
    return "free space there" if full else "mend that"
