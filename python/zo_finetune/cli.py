"""The command `zo-finetune`: words to a set of options, errors to one line.

Belongs here: argparse and exit codes (0 done; 2 something that the user has to put right; 130, 143, 129 ended by Ctrl-C, SIGTERM, SIGHUP).
Does not belong here: which options there are (config.py); anything that loads torch before they are known to be right: `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from zo_finetune import catalog, console, team
from zo_finetune.config import COMMANDS, Comparison, Config, Demo, Profile, Replay, SuiteRuns, Tasks, shared
from zo_finetune.errors import UserError, did_you_mean, plural
from zo_finetune.machine import versions
from zo_finetune.methods import METHODS, MEZO, listing
from zo_finetune.options import add_options, given, options_of

EPILOG = """\
examples:
  zo-finetune demo
  zo-finetune train --model facebook/opt-1.3b --task sst2 --data stanfordnlp/sst2 --output runs/opt --lr 1e-7
  zo-finetune resume runs/opt
  zo-finetune evaluate --model facebook/opt-1.3b --task sst2 --data stanfordnlp/sst2 --shots 32 --output runs/in-context
  zo-finetune train --model ./my-model --task sst2 --data ./reviews --peft lora --steps 2000 --output runs/lora
  zo-finetune train --model ./my-model --task sst2 --data ./reviews --method momentum --option state=recomputed --output runs/momentum
  zo-finetune compare --model ./my-model --task sst2 --data ./reviews --methods mezo,sign,lozo:rank=4 --forwards 2000 --output runs/compared
  zo-finetune suite --suite mezo --model facebook/opt-1.3b --data hub --output runs/mezo --plan

Defaults are MeZO's (Malladi et al. 2023) where it has any; lr and eps of --method mezo by --peft: {rates}.

methods (--list-methods says more: options, defaults and where they come from, forward passes a step):
{methods}""".format(
    rates="; ".join(f"{peft} {preset.lr:g}, {preset.eps:g}" for peft, preset in MEZO.items()),
    methods="".join(f"  {m.name:<14} {m.summary}\n" for m in METHODS.values()),
)


NEEDED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tqdm",
    "matplotlib",
    "sklearn",
)  # gguf: for a .gguf file only


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line, that knows what was perhaps meant."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._words: Sequence[str] = ()
        self.commands: dict[str, Parser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.commands.get(found.command, self).error(f"{' '.join(rest)[:200]}: unknown")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(c) for c in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r:.80} must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
            )

    def error(self, message: str) -> NoReturn:
        options = [o for o in self._option_string_actions if o.startswith("--")]
        given = [w.partition("=")[0] for w in self._words if w.startswith("--") and len(w) > 2]
        strange = next((w for w in given if not any(o.startswith(w) for o in options)), None)
        hint = did_you_mean(strange, options) if strange is not None else ""
        if hint:
            hint = f"; there is no {strange:.80}{hint}"
        console.say(f"{self.prog}: error: {message}{hint}")
        console.say(f"usage: {self.prog} --help" + (" tells the options" if self.prog.count(" ") else " tells the commands"))
        sys.exit(2)


class Version(argparse.Action):
    """Prints the versions and ends, without loading what has them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        own, *others = versions().items()
        found = dict([own, *others])
        name = found.pop("zo_kernels") or "of a checkout that is not installed"
        console.tell(f"zo-finetune {name}; " + ", ".join(f"{package} {number or '-'}" for package, number in found.items()))
        parser.exit()


class ListMethods(argparse.Action):
    """Prints the methods and ends, as --version does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        console.tell(listing())
        parser.exit()


HELP = {
    "train": "fine-tune a model on a task",
    "evaluate": "measure a model as it is: zero-shot, with demonstrations, with calibrated scores",
    "probe": "measure a linear classifier on a model's last hidden states",
    "compare": "train with several methods on the same data, noise seeds and number of forward passes",
    "suite": "make a paper's table for a model: its tasks, methods and baselines, with the paper's figures beside",
    "resume": "go on with a killed or interrupted run, to the bits of a run never killed",
    "replay": "make a run's weights again from its base model and its journal",
    "profile": "measure peak memory and seconds a step of each method, for a model or a bare shape",
    "tasks": "list the tasks: for which models, what is measured, which data set and columns",
    "demo": "watch a small model learn film reviews on this machine, in minutes",
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zo-finetune",
        description="Fine-tune a language model with forward passes only: MeZO and the other zeroth-order methods.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help="print versions and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    parser.commands = commands.choices
    for name, kind in COMMANDS.items():
        runs = name in ("train", "compare", "suite")
        more: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG} if runs else {}
        command = commands.add_parser(name, help=HELP[name], **more)
        add_options(command, [*shared(kind), *options_of(kind)])
        if runs:
            command.add_argument(
                "--list-methods",
                action=ListMethods,
                nargs=0,
                dest=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                help="print the methods, their options and defaults, and exit",
            )
    return parser


def check_surroundings() -> None:
    """`pip install .` alone has no command line, whose libraries are an extra; and a directory can be gone with a shell still in it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current directory is gone: change into one that exists") from error
    if missing := [name for name in NEEDED if name not in sys.modules and importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install 'zo_kernels[finetune]', or in a checkout "
            "pip install '.[finetune]'"
        )


def run(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any] | None:
    if options.command == "tasks":
        console.tell(catalog.as_json() if Tasks(**given(Tasks, options)).json else catalog.table())
        return None
    check_surroundings()
    if "torch" not in sys.modules:
        console.say(f"zo-finetune {options.command}: loading torch and transformers")
    if options.command == "demo":
        from zo_finetune.demo import demo

        return demo(Demo(**given(Demo, options)), command)
    if options.command == "replay":
        from zo_finetune.replay import replay

        wanted = Replay(**given(Replay, options))
        folder = replay(wanted)
        what = "of the whole journal" if wanted.upto is None else f"after {plural(wanted.upto, 'step')}"
        console.tell(f"the weights {what} are in {folder}")
        return None
    if options.command in ("evaluate", "probe"):
        from zo_finetune.baseline import in_folder

        kind = COMMANDS[options.command]
        console.tell(in_folder(kind(**given(kind, options)), command))
        return None
    if options.command == "profile":
        from zo_finetune.profile import profile

        return profile(Profile(**given(Profile, options)), command)
    if options.command == "compare":
        from zo_finetune.compare import compare, plan_of

        return compare(plan_of(given(Comparison, options), given(Config, options)), command)
    if options.command == "suite":
        from zo_finetune.suite import make
        from zo_finetune.suite_plan import plan_of as suite_of

        own = {o.name for o in shared(SuiteRuns)}
        of_all = {name: value for name, value in given(Config, options).items() if name in own}
        return make(suite_of(given(SuiteRuns, options), of_all), command)
    from zo_finetune.run import resume, run

    if options.command == "resume":
        return resume(options.run_dir, command)
    return run(Config(**given(Config, options)), command)


def in_short(result: dict[str, Any]) -> str:
    """A run in a line: its metric before and after, with what says how sure that is, and where the weights are."""
    metric, majority = result["metric"], result["majority"]
    before, after = (f"{result[when][metric]:.4f} ± {result[when][f'{metric}_stderr']:.4f}" for when in ("before", "after"))
    rows = plural(result["after"]["examples"], "example") + ("" if majority is None else f" (majority {majority:.4f})")
    weights = f"; the weights are in {result['saved']}" if result.get("saved") else ""
    return f"{metric} {before} -> {after} on {rows} in {plural(result['steps'], 'step')}{weights}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zo-finetune`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.take_any_text()
    options = build_parser().parse_args(arguments)
    with console.Signals() as signals, console.warnings_as_lines():
        try:
            with team.joined(options.command):
                result = run(options, ["zo-finetune", *arguments])
        except team.Told:
            return 2
        except UserError as error:
            who = f"zo-finetune, worker {team.rank()}" if team.rank() else "zo-finetune"
            console.say(f"{who}: error: {error}", aloud=True)
            return 2
        except KeyboardInterrupt as stop:
            console.say(f"zo-finetune: {stop or 'interrupted before there was anything to save'}")
            return signals.exit_code
        if result is None:
            return 0
        if result["interrupted"]:
            return signals.exit_code
        if options.command in ("compare", "suite", "profile"):
            return 0
        folder = options.run_dir if options.command == "resume" else options.output
        console.tell(f"{in_short(result)}; see {folder}/result.json and curve.png")
        return 0
