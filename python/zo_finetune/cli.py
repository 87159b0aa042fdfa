"""The command `zo-finetune`: options to a `train.Config`, errors to one line.

Belongs here: argparse and exit codes (0 done; 2 something that the user has to put right; 130, 143, 129 ended by Ctrl-C, SIGTERM, SIGHUP).
Does not belong here: anything that loads torch before the options are known to be right: `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from zo_finetune import console, methods
from zo_finetune.errors import UserError, did_you_mean, once
from zo_finetune.methods import METHODS

EPILOG = """\
examples:
  zo-finetune demo
  zo-finetune train --model facebook/opt-1.3b --task sst2 --data stanfordnlp/sst2 --output runs/opt --lr 1e-7
  zo-finetune resume runs/opt
  zo-finetune train --model ./my-model --task sst2 --data ./reviews --peft lora --steps 2000 --output runs/lora
  zo-finetune train --model ./my-model --task sst2 --data ./reviews --method momentum --option state=recomputed --output runs/momentum
  zo-finetune compare --model ./my-model --task sst2 --data ./reviews --methods mezo,sign,lozo:rank=4 --forwards 2000 --output runs/compared

Defaults are MeZO's (Malladi et al. 2023): batch 16, 1,000 training, 500 dev and 1,000 evaluation examples, constant learning rate;
its lr and eps by --peft: none 1e-6, 1e-3; lora 1e-4, 1e-2; prefix and prompt 1e-2, 1e-1; ln 3e-4, 5e-3 (ours).

methods (--list-methods says more: options, defaults and where they come from, forward passes a step):
""" + "".join(f"  {m.name:<14} {m.summary}\n" for m in METHODS.values())


NEEDED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tqdm",
    "matplotlib",
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
        from zo_finetune.report import versions

        own, *others = versions().items()
        found = dict([own, *others])
        name = found.pop("zo_kernels") or "of a checkout that is not installed"
        console.tell(f"zo-finetune {name}; " + ", ".join(f"{package} {number or '-'}" for package, number in found.items()))
        parser.exit()


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,400}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no whole number")
    return int(text)


def real(text: str) -> float:
    try:
        return methods.number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no number") from None


def pair(text: str, wanted: str = "KEY=VALUE, for example queries=4") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
    return name, value


def column(text: str) -> tuple[str, str]:
    return pair(text, "FIELD=NAME, for example sentence=text")


def number_of(text: str) -> tuple[str, float]:
    """METHOD=VALUE; the method may have options, which have = signs too."""
    name, equals, value = text.rpartition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, methods.number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be METHOD=NUMBER, for example mezo=1e-6") from None


def whole_numbers(text: str) -> list[int]:
    try:
        return [whole(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from None


def numbers(text: str) -> list[float]:
    try:
        return [methods.number(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from None


class ListMethods(argparse.Action):
    """Prints the methods and ends, as --version does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from zo_finetune.methods import listing

        console.tell(listing())
        parser.exit()


def add_run_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What a run is of, how it goes, where it leaves what; `several`: as many runs as there are methods and seeds."""
    from zo_finetune.tasks import TASKS

    what = parser.add_argument_group("what")
    what.add_argument("--model", required=True, metavar="PATH_OR_HUB_ID", help="model folder, .gguf file or hub id")
    what.add_argument("--gguf-file", metavar="NAME", help="a GGUF file inside --model, dequantised on loading")
    what.add_argument(
        "--form", choices=("auto", "causal", "masked"), default="auto", help="kind of language model (default: as its config says)"
    )
    what.add_argument("--task", required=True, metavar="TASK", help="; ".join(f"{t.name}: {t.summary}" for t in TASKS.values()))
    what.add_argument(
        "--data",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="file or folder (train.*, validation.*; jsonl, json, csv, tsv, parquet), or hub id",
    )
    what.add_argument("--data-config", metavar="NAME", help="configuration of a hub data set, such as sst2 of nyu-mll/glue")
    what.add_argument(
        "--column",
        dest="columns",
        type=column,
        action="append",
        metavar="FIELD=NAME",
        help="the column that holds a task's field; repeatable",
    )
    what.add_argument("--train-examples", type=whole, metavar="N", help="sampled training examples, 0: all (default: 1000)")
    what.add_argument(
        "--dev-examples",
        type=whole,
        metavar="N",
        help="training rows held out to watch progress on (default: 500, at most a fifth)",
    )
    what.add_argument(
        "--eval-examples",
        type=whole,
        metavar="N",
        help="sampled evaluation examples, 0: all (default: 1000, at most a fifth of a single file)",
    )
    what.add_argument(
        "--max-length", type=whole, metavar="TOKENS", help="longest input; longer ones lose their beginning (default: the model's)"
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--peft",
        choices=("none", "lora", "ln", "prefix", "prompt"),
        help="what is trained: all weights, or an adapter (default: none)",
    )
    how.add_argument(
        "--peft-target",
        dest="targets",
        action="append",
        metavar="MODULE",
        help="ends of names of the modules that lora or ln adapts (default: query and value; every norm); repeatable",
    )
    if several:
        how.add_argument(
            "--methods",
            required=True,
            metavar="METHOD,...",
            help="with a method's own options behind it, as in mezo,mezo:queries=4,momentum:state=recomputed:history=16",
        )
        how.add_argument(
            "--forwards",
            type=whole,
            required=True,
            metavar="N",
            help="forward passes of each run; --list-methods says what a step costs",
        )
        how.add_argument(
            "--seeds", type=whole_numbers, metavar="S,...", help="of noise, sample and order of the data (default: 0,1,2)"
        )
        how.add_argument(
            "--lr",
            dest="lrs",
            type=number_of,
            action="append",
            metavar="METHOD=LR",
            help="instead of the method's default; repeatable",
        )
        how.add_argument(
            "--eps",
            dest="epses",
            type=number_of,
            action="append",
            metavar="METHOD=EPS",
            help="instead of the method's default; repeatable",
        )
        how.add_argument(
            "--lr-factors",
            type=numbers,
            metavar="F,...",
            help="try each method's lr times these with the first seed, and take the best by its loss on the dev examples (default: 1)",
        )
        how.add_argument("--points", type=whole, metavar="N", help="evaluations on the dev examples along a run (default: 5)")
    else:
        how.add_argument("--method", metavar="METHOD", help="one of those below (default: mezo)")
        how.add_argument(
            "--option",
            dest="options",
            type=pair,
            action="append",
            metavar="KEY=VALUE",
            help="one of the method's own options; repeatable",
        )
        how.add_argument("--steps", type=whole, metavar="N", help="(default: 20000)")
    how.add_argument(
        "--list-methods",
        action=ListMethods,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="print the methods, their options and defaults, and exit",
    )
    how.add_argument("--batch-size", type=whole, metavar="B", help="(default: 16)")
    how.add_argument(
        "--accumulate",
        type=whole,
        metavar="N",
        help="micro-batches of --batch-size in one step, their losses averaged (default: 1)",
    )
    if not several:
        how.add_argument("--lr", type=real, help="learning rate (default: by --method and --peft)")
        how.add_argument("--eps", type=real, help="perturbation scale (default: by --method and --peft)")
        how.add_argument("--seed", type=whole, help="of the noise, the sample and the order of the data (default: 0)")
    how.add_argument("--lr-schedule", choices=("constant", "linear", "cosine"), help="the last two decay to 0 (default: constant)")
    how.add_argument("--weight-decay", type=real, metavar="W", help="decoupled (default: 0)")
    how.add_argument("--clip", type=real, metavar="G", help="clip |projected gradient| to this (default: not)")
    how.add_argument(
        "--perturbation",
        choices=("auto", "inplace", "scratch", "lazy"),
        help="change the weights for a forward, or a copy of each layer's; lazy: in place with two passes a step (default: auto)",
    )
    how.add_argument(
        "--rounding", choices=("auto", "nearest", "stochastic"), help="of the update to 16-bit weights (default: auto)"
    )

    where = parser.add_argument_group("where")
    where.add_argument(
        "--output",
        required=True,
        metavar="DIR" if several else "RUN_DIR",
        help="table.md, curves.png, compare.csv, compare.json and a folder of each run go here; finished runs in it are kept"
        if several
        else "result.json, curve.png, log.csv, the journal run.zoj and the weights go here",
    )
    if not several:
        where.add_argument("--overwrite", action="store_true", help="replace an earlier run in RUN_DIR")
        where.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="save the model or adapter")
        where.add_argument(
            "--eval-every",
            type=whole,
            metavar="N",
            help="steps between evaluations on the dev examples, 0: none (default: a fifth of --steps)",
        )
    where.add_argument("--eval-batch-size", type=whole, metavar="B", help="(default: 32)")
    where.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="of the weights (default: float32 on a CPU, as saved on a GPU)",
    )
    where.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, help="launch whole steps as CUDA graphs; pads batches (default: no)"
    )
    where.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    where.add_argument(
        "--backend", choices=("reference", "cpu", "triton", "cuda"), help="of zo_kernels (default: the best available)"
    )


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|compare|resume|replay|demo")
    parser.commands = commands.choices
    train = commands.add_parser(
        "train", help="fine-tune a model on a task", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    compare = commands.add_parser(
        "compare",
        help="train with several methods on the same data, noise seeds and number of forward passes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    resume = commands.add_parser("resume", help="go on with a killed or interrupted run, to the bits of a run never killed")
    resume.add_argument("run_dir", metavar="RUN_DIR", help="the --output of the run")
    replay = commands.add_parser("replay", help="make a run's weights again from its base model and its journal")
    replay.add_argument("source", metavar="RUN_DIR_OR_JOURNAL", help="a run's folder, or its run.zoj alone")
    replay.add_argument(
        "--model", required=True, metavar="PATH_OR_HUB_ID", help="the base model that the run started from; another is refused"
    )
    replay.add_argument("--output", required=True, metavar="DIR", help="the model or adapter goes here")
    replay.add_argument("--upto", type=whole, metavar="N", help="the weights after N steps (default: after all)")
    replay.add_argument(
        "--mode",
        choices=("sequential", "fused"),
        default="sequential",
        help="the run's own bits, or one sum rounded once (default: sequential)",
    )
    replay.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    replay.add_argument(
        "--backend", choices=("reference", "cpu", "triton", "cuda"), help="of zo_kernels (default: the best available)"
    )
    demo = commands.add_parser("demo", help="watch a small model learn film reviews on this machine, in minutes")

    add_run_options(train)
    add_run_options(compare, several=True)
    demo.add_argument("--output", default="runs/demo", metavar="RUN_DIR", help="(default: %(default)s)")
    demo.add_argument("--seed", type=whole, default=0, help="of the noise and the order of the data (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in RUN_DIR")
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
    given = {name: value for name, value in vars(options).items() if value is not None and name != "command"}
    check_surroundings()
    if "torch" not in sys.modules:
        console.say(f"zo-finetune {options.command}: loading torch and transformers")
    if options.command == "demo":
        from zo_finetune.demo import demo

        return demo(**given, command=command)
    from zo_finetune.train import Config, replay, resume, train

    if options.command == "resume":
        return resume(options.run_dir, command)
    if options.command == "replay":
        console.tell(f"saved in {replay(**given)}")
        return None
    for name, option in (("columns", "--column"), ("options", "--option"), ("lrs", "--lr"), ("epses", "--eps")):
        if name in given:
            given[name] = once(option, given[name])
    if options.command == "compare":
        from zo_finetune.compare import compare, plan_of

        return compare(plan_of(given), command)
    return train(Config(**given), command)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zo-finetune`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.take_any_text()
    options = build_parser().parse_args(arguments)
    with console.Signals() as signals, console.warnings_as_lines():
        try:
            result = run(options, ["zo-finetune", *arguments])
        except UserError as error:
            console.say(f"zo-finetune: error: {error}")
            return 2
        except KeyboardInterrupt as stop:
            console.say(f"zo-finetune: {stop or 'interrupted before there was anything to save'}")
            return signals.exit_code
        if result is None:
            return 0
        if result["interrupted"]:
            return signals.exit_code
        if options.command == "compare":
            return 0
        before, after = result["before"]["accuracy"], result["after"]["accuracy"]
        folder = options.run_dir if options.command == "resume" else options.output
        console.tell(f"accuracy {before:.4f} -> {after:.4f} in {result['steps']} steps; see {folder}/result.json and curve.png")
        return 0
