"""The options of every command, each described once (options.py says what a description is).

Belongs here: what a user may choose, and which choices contradict each other. Does not belong here: a method's own options (methods.py), what is
done with a value. Nothing here loads torch: `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from zo_finetune import folders, methods, options, shapes, sources, values
from zo_finetune.chosen_task import TaskChoice
from zo_finetune.data import USUAL_DEV, USUAL_EVAL
from zo_finetune.errors import UserError
from zo_finetune.files import path_of
from zo_finetune.options import DATA, METHOD, MODEL, OWN, RUN, again, option
from zo_finetune.suites import SUITES

DTYPES = ("float32", "float16", "bfloat16")  # by torch's names
SCHEDULES: Mapping[str, Callable[[float], float]] = {  # share of the steps done -> factor of the learning rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
LORA, SOFT = ("lora",), ("prefix", "prompt")
ADAPTERS = {
    "targets": ("lora", "ln"),
    "lora_rank": LORA,
    "lora_alpha": LORA,
    "lora_init": LORA,
    "prefix_length": SOFT,
}  # of a new one, by --peft
INPUT_INITS = {
    "eva": 0.5,
    "whitened": -0.5,
}  # lora's first matrix in the space of its inputs: the power, see zo_kernels' `input_factors`
EARLIER = {"batches": "padded"}  # of runs that began before there was the option
PERTURBING = (
    "eps",
    "anchor",
    "perturbation",
    "rounding",
    "cuda_graph",
    "parallel",
    "backend",
)  # what first-order methods do not read


@dataclass(kw_only=True)
class Config(TaskChoice):
    """Everything that determines a run: `zo-finetune train`."""

    model: str = option(MODEL, "model folder, .gguf file or hub id", metavar="PATH_OR_HUB_ID", path=True, movable=True)
    gguf_file: str | None = option(MODEL, "a GGUF file inside --model, dequantised on loading", None, metavar="NAME")
    form: str = option(MODEL, "kind of language model", "auto", choices=("auto", "causal", "masked"), usual="as its config says")
    peft: str = option(MODEL, "what is trained: all weights, or an adapter", "none", choices=methods.PEFTS)
    targets: list[str] | None = option(
        MODEL,
        "ends of names of the modules that lora or ln adapts; of lora also all-linear",
        None,
        flag="--peft-target",
        metavar="MODULE",
        usual="query and value; every norm",
    )
    lora_rank: int | None = option(MODEL, "of lora's matrices", None, metavar="R", positive=True, below=1 << 16, usual="8")
    lora_alpha: float | None = option(
        MODEL, "lora's factor is this over the rank", None, metavar="A", positive=True, fp32=True, usual="16"
    )
    lora_init: str | None = option(
        MODEL,
        "of lora's first matrix (the second is 0: it begins as the base model); default: peft's uniform numbers; eva, whitened: principal components of the "
        "layer's inputs over the training rows, weighed by their size, or whitened",
        None,
        choices=("default", "gaussian", *INPUT_INITS),
        usual="default",
    )
    lora_freeze_a: bool = option(MODEL, "train lora's second matrix alone", False, negatable=True)
    prefix_length: int | None = option(
        MODEL, "virtual tokens of prefix and prompt", None, metavar="N", positive=True, below=1 << 16, usual="5"
    )
    adapter: str | None = option(
        MODEL, "an adapter's folder of peft to go on from; it decides --peft", None, metavar="FOLDER", path=True, movable=True
    )
    train_blocks: str | None = option(
        MODEL,
        "train these blocks of the model alone, or adapters in them alone: by number, counted from 0, as 24- or 20-25, last:4, or dominant: the "
        "one behind which activations first stand out, found by one forward of a text",
        None,
        metavar="BLOCKS",
        usual="all",
    )
    train_only: list[str] | None = option(
        MODEL,
        "train only weights in whose name this regular expression occurs, of an adapter or of --train-blocks if they are given",
        None,
        metavar="PATTERN",
        usual="all",
    )
    max_length: int | None = option(
        MODEL, "longest input; longer ones lose their beginning", None, metavar="TOKENS", positive=True, usual="the model's"
    )
    chat: bool = option(MODEL, "put each prompt into the tokenizer's chat template, as the user's turn", False)
    dtype: str = option(MODEL, "of the weights", "auto", choices=("auto", *DTYPES), usual="float32 on a CPU, as saved on a GPU")
    device: str = option(MODEL, "auto, cpu, cuda or cuda:N", "auto", movable=True)
    quantize: str | None = option(
        MODEL,
        "pack the base's weights as they are loaded, under an adapter or for --method qzo: bitsandbytes' 4 bits, or torchao's 8 or 4, of weights alone",
        None,
        choices=("nf4", "int8", "int4"),
        usual="not",
    )
    offload: str = option(
        MODEL,
        "the weights lie in host memory, or stay in the model's safetensors files, and visit the device a block at a time, with the same bits",
        "none",
        choices=("none", "cpu", "disk"),
        movable=True,
    )
    offload_every: int = option(
        MODEL,
        "steps after which a block that visits is written back, from disk to a file without a name on RUN_DIR's disk, 0: never",
        8,
        metavar="N",
        least=True,
        movable=True,
    )

    data: str | None = option(
        DATA,
        "file, pattern of files, folder (train.*, validation.*, in shards or not; jsonl, json, csv, tsv, parquet, arrow; .gz, .zst) or hub id",
        None,
        usual="the task's own set on the hub",
        metavar="PATH_OR_HUB_ID",
        path=True,
        movable=True,
    )
    data_config: str | None = option(DATA, "configuration of a hub data set, such as sst2 of nyu-mll/glue", None, metavar="NAME")
    columns: dict[str, str] = option(
        DATA,
        "the column that holds a task's field, as in sentence=text",
        {},
        flag="--column",
        metavar="FIELD=NAME",
        read=values.column,
    )
    train_examples: int = option(DATA, "sampled training examples, 0: all", 1000, metavar="N", least=True)
    dev_examples: int | None = option(
        DATA,
        "training rows held out to watch progress on, 0: none",
        None,
        metavar="N",
        least=True,
        usual=f"{USUAL_DEV}, at most a fifth",
    )
    eval_examples: int | None = option(
        DATA,
        "sampled evaluation examples, 0: all",
        None,
        metavar="N",
        least=True,
        usual=f"{USUAL_EVAL}, at most a fifth of a single file",
    )
    k_shot: int | None = option(
        DATA,
        "rows of each label to train on, and as many others for dev, in place of --train-examples and --dev-examples",
        None,
        metavar="K",
        positive=True,
        usual="not",
    )
    data_seed: int | None = option(DATA, "of the sample of rows", None, metavar="S", least=True, below=1 << 64, usual="as --seed")

    method: str = option(METHOD, "one of those below", "mezo", metavar="METHOD", each=True)
    options: dict[str, str] = option(
        METHOD, "one of the method's own options", {}, flag="--option", metavar="KEY=VALUE", read=values.pair, each=True
    )
    objective: str | None = option(
        METHOD,
        "what a step lowers: loss, the task's own of the next two; classification, cross-entropy over the answers; language-model, that of the right "
        "answer's tokens; pairs, a ranking loss over pairs of rows with different labels, or of right and wrong candidates, with --balanced; or a metric "
        "of the task, such as accuracy or f1: its loss is 1 - the metric",
        None,
        metavar="NAME",
        usual="loss",
    )
    centre: float | None = option(
        METHOD,
        "of --objective pairs: weight of the squared mean score, which decides between labels where their order does not",
        None,
        metavar="W",
        least=True,
        usual="0.02",
    )
    balanced: bool = option(METHOD, "batches with each label equally often; rows of the rarer ones come again sooner", False)
    steps: int = option(METHOD, "training steps", 20_000, metavar="N", positive=True, each=True)
    batch_size: int = option(METHOD, "examples in a micro-batch", 16, metavar="B", positive=True)
    accumulate: int = option(
        METHOD, "micro-batches of --batch-size in one step, their losses averaged", 1, metavar="N", positive=True
    )
    batches: str = option(
        METHOD,
        "padded: rows of a training batch as long as its longest; packed: one after another in one sequence, without padding; auto: packed on a CPU, where it "
        "is the same but for rounding and a batch saves time by it",
        "auto",
        choices=("auto", "packed", "padded"),
    )
    lr: float | None = option(METHOD, "learning rate", None, least=True, fp32=True, usual="by --method and --peft", each=True)
    eps: float | None = option(
        METHOD, "perturbation scale", None, positive=True, fp32=True, usual="by --method and --peft", each=True
    )
    seed: int = option(METHOD, "of the noise, the sample and the order of the data", 0, least=True, below=1 << 64, each=True)
    lr_schedule: str = option(METHOD, "the last two decay to 0", "constant", choices=tuple(SCHEDULES))
    weight_decay: float = option(
        METHOD, "decoupled; of sgd and adam torch's, a part of the gradient", 0.0, metavar="W", least=True, fp32=True
    )
    anchor: str | None = option(
        METHOD,
        "at the end of every EVERYth step (1) pull the trained weights back toward those that the run began with, by this share of the way",
        None,
        metavar="LAM[:EVERY]",
        usual="not",
    )
    clip: float | None = option(
        METHOD,
        "clip |projected gradient| to this, of sgd, adam and adamw the gradient's norm",
        None,
        metavar="G",
        positive=True,
        fp32=True,
        usual="not",
    )
    perturbation: str = option(
        METHOD,
        "change the weights for a forward, or a copy of each layer's; lazy: in place with two passes a step",
        "auto",
        choices=("auto", "inplace", "scratch", "lazy"),
    )
    rounding: str = option(METHOD, "of the update to 16-bit weights", "auto", choices=("auto", "nearest", "stochastic"))
    cache: str = option(
        METHOD,
        "where all that is trained lies in upper blocks, keep the hidden states that enter them, in memory or a file on RUN_DIR's disk, so that a forward "
        "runs these blocks alone; auto: where it is exact and saves time",
        "auto",
        choices=("auto", "memory", "disk", "off"),
    )
    cuda_graph: bool = option(METHOD, "launch whole steps as CUDA graphs; pads batches", False, negatable=True)
    parallel: str = option(
        METHOD,
        "of several processes (torchrun), what of a step each evaluates: directions, micro-batches (data), or both; auto: what divides best",
        "auto",
        choices=("auto", "directions", "data", "both"),
        movable=True,
    )
    backend: str | None = option(
        METHOD,
        "of zo_kernels",
        None,
        choices=("reference", "cpu", "triton", "cuda"),
        usual="the best available",
        movable=True,
    )

    output: str = option(
        RUN,
        "result.json, curve.png, log.csv, the journal run.zoj and the weights go here",
        metavar="RUN_DIR",
        path=True,
        movable=True,
        place=True,
        each=True,
    )
    overwrite: bool = option(RUN, "replace an earlier run in RUN_DIR", False, movable=True, place=True, each=True)
    save: bool = option(RUN, "save the model or adapter in RUN_DIR", True, negatable=True, movable=True, each=True)
    eval_every: int | None = option(
        RUN,
        "steps between evaluations on the dev examples, 0: none",
        None,
        metavar="N",
        least=True,
        usual="a fifth of --steps",
        each=True,
    )
    keep: str = option(
        RUN,
        "which weights are evaluated at the end and saved: those after the last step, or those of the best evaluation on the dev examples",
        "last",
        choices=("last", "best"),
    )
    keep_by: str | None = option(
        RUN,
        "what --keep best judges by: loss, or a metric of the task",
        None,
        metavar="METRIC",
        usual="loss, or the first metric of a task without one",
    )
    language_texts: str | None = option(
        RUN,
        "a file of texts of another kind, with empty lines between them: the loss of a causal model's next tokens on them is told before and after",
        None,
        metavar="FILE",
        path=True,
        usual="none",
    )
    continued: list[str] | None = option(
        RUN, "a text that the model goes on with, greedily, before and after", None, flag="--continue", metavar="TEXT", usual="none"
    )
    eval_batch_size: int = option(RUN, "examples in a batch of an evaluation", 32, metavar="B", positive=True)

    def check(self) -> None:
        """Values that no part of the run could use; each error names the option."""
        options.check(self)
        if self.train_blocks not in (None, values.DOMINANT):
            values.blocks("--train-blocks", self.train_blocks)
        if self.anchor is not None:
            values.pull("--anchor", self.anchor)
        if methods.get(self.method).packed:
            self._check_scales()
        elif self.quantize is not None and self.peft == "none" and self.adapter is None:
            raise UserError(
                f"--quantize {self.quantize} packs the weights, and --peft none would train them: give --peft lora, ln, prefix or prompt, or --method qzo for "
                "their scales"
            )
        self.recipe()

    def check_use(self) -> None:
        """Options that nothing of a new run would read: whoever gave one means another run than would come of it."""
        model = Path(self.model).expanduser()
        if self.targets and self.peft not in ("lora", "ln"):
            raise UserError(
                f"--peft-target {self.targets[0]!r:.80} names what --peft lora or ln adapts, and --peft is {self.peft}: give one of them, or "
                "leave the target out"
            )
        if self.targets and "all-linear" in self.targets and (len(self.targets) > 1 or self.peft == "ln"):
            raise UserError("--peft-target all-linear stands alone, and is of --peft lora: leave the others out")
        for o in options.options_of(Config):
            if not (value := getattr(self, o.name)) or o.name not in ADAPTERS:
                continue
            if self.adapter is not None:
                raise UserError(
                    f"{o.spelling} {value!s:.80} is of a new adapter, and --adapter {self.adapter} has its own: leave one out"
                )
            if self.peft not in (kinds := ADAPTERS[o.name]):
                raise UserError(f"{o.spelling} {value} is of --peft {' or '.join(kinds)}, and --peft is {self.peft}: leave it out")
        part = (
            f"--train-blocks {self.train_blocks}"
            if self.train_blocks
            else f"--train-only {self.train_only[0]!r:.80}"
            if self.train_only
            else None
        )
        if self.lora_freeze_a and self.peft != "lora":
            raise UserError(f"--lora-freeze-a is of --peft lora, and --peft is {self.peft}: leave it out")
        if self.lora_init in INPUT_INITS and methods.get(self.method).looks:
            raise UserError(
                f"--lora-init {self.lora_init} with --method {self.method}: both take factors of the inputs, and a run keeps those of one: leave one out"
            )
        if part is not None and self.peft in SOFT:
            raise UserError(
                f"{part}: --peft {self.peft} puts something before what every block sees: leave one out, or choose lora or ln"
            )
        if self.offload != "none":
            self._check_offload()
        if self.batches == "packed" and self.cuda_graph:
            raise UserError("--batches packed: a CUDA graph has batches of a few shapes: leave it or --cuda-graph out")
        if methods.get(self.method).first_order:
            for o in options.options_of(Config):
                if o.name in PERTURBING and (value := getattr(self, o.name)) != o.default:
                    raise UserError(
                        f"{o.spelling} {value} is of methods that perturb weights, and --method {self.method} does not: leave it out"
                    )
        if self.gguf_file is not None and model.suffix.lower() == ".gguf" and model.name != self.gguf_file and model.is_file():
            raise UserError(
                f"--gguf-file {self.gguf_file!r:.80}: --model {model} is a GGUF file itself: give its folder, or leave one out"
            )
        if self.data_config is not None and self.data is not None and sources.paths_of(self.data):
            raise UserError(
                f"--data-config {self.data_config!r:.80} is of data sets on the hub, and --data {self.data} is here: leave it out"
            )
        usual = next(f.default for f in fields(self) if f.name == "train_examples")
        if self.k_shot is not None and (self.dev_examples is not None or self.train_examples != usual):
            other = "train" if self.dev_examples is None else "dev"
            raise UserError(
                f"--k-shot {self.k_shot} says how many rows there are to train on and for dev: leave out --{other}-examples "
                f"{getattr(self, f'{other}_examples')}, or --k-shot"
            )
        if self.keep == "best" and (self.dev_examples == 0 or self.eval_every == 0):
            none = "--dev-examples 0" if self.dev_examples == 0 else "--eval-every 0"
            raise UserError(
                f"--keep best chooses by the evaluations on the dev examples, and with {none} there are none: give more, or --keep last"
            )
        if self.keep_by is not None and self.keep == "last":
            raise UserError(
                f"--keep-by {self.keep_by!r:.80} says which evaluation is the best, and --keep is last: give --keep best, or leave it out"
            )
        if self.eval_every and self.dev_examples == 0:
            raise UserError(
                f"--eval-every {self.eval_every} evaluates on the dev examples, and --dev-examples is 0: give some, or leave it out"
            )

    @classmethod
    def of_json(cls, content: Any, where: str) -> Config:
        """Exactly these options, each of its type and within its bounds; what is younger than a run is as it was then.

        Raises:
            UserError: names the first that is not so.
        """
        config = options.of_json(cls, {**EARLIER, **content} if isinstance(content, dict) else content, where)
        config.check()
        return config

    def without_perturbing(self) -> Config:
        """For a first-order method that shares its options with others: those that it does not read as if nobody had given them."""
        return replace(self, **{o.name: o.default for o in options.options_of(Config) if o.name in PERTURBING})

    def recipe(self) -> methods.Recipe:
        """The method with its numbers. Raises UserError for an option that the method has not, or reads otherwise."""
        return methods.get(self.method).recipe(self.peft, self.options, self.lr, self.eps)

    def settled(self) -> Config:
        """With everything said that a file or a task says: the description of a task of one's own, the task's own data, the --peft of an --adapter;
        and what a step lowers, where neither an option nor a file says it.

        Raises:
            UserError: there is no such task, data or adapter, the description is wrong, or an option says otherwise.
        """
        config = self.with_file()
        data, data_config = config.rows()
        config = replace(config, data=data, data_config=data_config, objective=config.objective or "loss")
        if config.adapter is None:
            return config
        kind = folders.check_adapter(path_of("--adapter", config.adapter)).kind
        if config.peft not in ("none", kind):
            raise UserError(f"--peft {config.peft}: --adapter {config.adapter} is of {kind}: leave --peft out")
        return replace(config, peft=kind)

    def _check_scales(self) -> None:
        """Raises UserError: the method trains the scales of packed weights, and there are none, or something else is to be trained."""
        if self.quantize is None:
            raise UserError(
                f"--method {self.method} trains the scales of packed weights: give --quantize nf4, int8 or int4 (int4 has none by themselves on a GPU)"
            )
        for given, spelled in (
            (self.peft != "none", f"--peft {self.peft}"),
            (self.adapter is not None, f"--adapter {self.adapter}"),
            (self.train_blocks is not None, f"--train-blocks {self.train_blocks}"),
            (bool(self.train_only), "--train-only"),
            (self.anchor is not None, "--anchor"),
        ):
            if given:
                raise UserError(
                    f"--method {self.method} trains all scales of the packed weights and nothing else: leave {spelled} out"
                )

    def _check_offload(self) -> None:
        """Raises UserError: what is given needs all weights at once, or twice."""
        method = methods.get(self.method)
        for wrong, given, why in (
            (method.first_order, f"--method {self.method}", "backpropagates through all weights"),
            (
                self.perturbation in ("inplace", "lazy"),
                f"--perturbation {self.perturbation}",
                "writes to all weights for each forward",
            ),
            (self.cuda_graph, "--cuda-graph", "cannot wait for a block"),
            (self.cache in ("memory", "disk"), f"--cache {self.cache}", "keeps hidden states of a model that is there"),
            (self.batches == "packed", "--batches packed", "changes the model's attention for a forward, and others run beside it"),
            (self.quantize is not None, f"--quantize {self.quantize}", "packs the weights as they are loaded"),
            (self.anchor is not None, "--anchor", "reads all weights of the beginning"),
            (self.keep == "best", "--keep best", "loads the model once more"),
            (self.offload == "disk" and self.gguf_file is not None, "--gguf-file", "is no safetensors file"),
        ):
            if wrong:
                raise UserError(f"--offload {self.offload} with {given}, which {why}: leave one of them out")

    def rows(self) -> tuple[str, str | None]:
        """The data, and its configuration on the hub: the task's own where none is named. Raises as `settled`."""
        task = self.the_task()
        if self.data is not None:
            return self.data, self.data_config
        if task.source is None:
            raise UserError(f"task {task.name} has no data of its own: give --data")
        return task.source, self.data_config or task.source_config

    def placed(self, directory: str) -> Config:
        """With the absolute paths of what is there in `directory`, so that the run can go on from anywhere; hub ids stay."""

        def place(name: str) -> Path:
            return Path(directory, path_of(f"--{name.replace('_', '-')}", getattr(self, name))).absolute()

        def found(name: str) -> str:
            path = place(name)
            with contextlib.suppress(OSError):
                return str(path) if path.exists() else getattr(self, name)
            return str(getattr(self, name))  # longer than a path may be

        more: dict[str, Any] = {
            name: str(place(name)) for name in ("adapter", "task_file", "language_texts") if getattr(self, name) is not None
        }
        if self.data is not None:
            path_of("--data", self.data)
            more["data"] = sources.placed(self.data, directory)
        return replace(self, model=found("model"), output=str(place("output")), **more)


@dataclass(kw_only=True)
class Comparison:
    """What `zo-finetune compare` has beside the options that its runs share, in place of those that it sets for each."""

    methods: str = option(
        METHOD,
        "with a method's own options behind it, as in mezo,mezo:queries=4,momentum:state=recomputed:history=16; behind @ one of --objectives or --forwards, "
        "where it is wanted with that alone, as in mezo@loss,fzoo@pairs@900",
        metavar="METHOD,...",
    )
    forwards: list[int] = option(
        METHOD,
        "forward passes of each run, or several such numbers: each method then runs with each; --list-methods says what a step costs",
        metavar="N,...",
        read=values.whole_numbers,
    )
    objectives: list[str] | None = option(
        METHOD,
        "each method with each of these, in place of --objective; the first is the baseline's",
        None,
        metavar="NAME,...",
        usual="--objective alone",
        read=values.texts,
    )
    baseline: str | None = option(
        METHOD,
        "the method that the others are set against, with the first objective and the most forward passes",
        None,
        metavar="METHOD",
        usual="mezo, or the first",
    )
    seeds: list[int] = option(
        METHOD, "of noise, sample and order of the data", [0, 1, 2, 3, 4], metavar="S,...", read=values.whole_numbers
    )
    lrs: dict[str, float] = option(
        METHOD, "instead of the method's default", {}, flag="--lr", metavar="METHOD=LR", read=values.number_of
    )
    epses: dict[str, float] = option(
        METHOD, "instead of the method's default", {}, flag="--eps", metavar="METHOD=EPS", read=values.number_of
    )
    lr_factors: list[float] = option(
        METHOD,
        "try each method's lr times these with the first seed, and take the best by its loss on the dev examples",
        [1.0],
        metavar="F,...",
        usual="1",
        read=values.numbers,
    )
    lr_grid: list[float] | None = option(
        METHOD,
        "try these learning rates with every method, in place of --lr-factors",
        None,
        metavar="LR,...",
        usual="not",
        read=values.numbers,
    )
    lr_seeds: int = option(METHOD, "seeds that a learning rate is chosen with, the first ones", 1, metavar="N", positive=True)
    lr_by: str | None = option(
        METHOD,
        "what chooses a learning rate on the dev examples",
        None,
        metavar="METRIC",
        usual="loss, or the first metric of a task without one",
    )
    points: int = option(RUN, "evaluations on the dev examples along a run", 5, metavar="N", least=True, below=1 << 63)
    output: str = option(
        RUN,
        "table.md, ranking.csv, ranking.png, curves.png, compare.csv, compare.json and a folder of each run go here; finished runs in it are kept",
        metavar="DIR",
        path=True,
    )


@dataclass(kw_only=True)
class SuiteRuns:
    """What `zo-finetune suite` has beside the options that all of its runs share, in place of those that it sets for each."""

    suite: str = option(DATA, "; ".join(f"{s.name}: {s.summary}" for s in SUITES.values()), choices=tuple(SUITES))
    data: str = option(
        DATA,
        "a folder with TASK or extras/TASK* for each task; or hub: each task's data set there",
        metavar="ROOT",
        path=True,
    )
    tasks: list[str] | None = option(DATA, "these instead", None, metavar="TASK,...", usual="the suite's", read=values.texts)
    methods: list[str] | None = option(
        METHOD,
        "these instead: zero-shot, in-context, probe, or a method with its options and the kind of tuning, as in mezo:peft=lora",
        None,
        metavar="COLUMN,...",
        usual="the suite's columns",
        read=values.texts,
    )
    pefts: list[str] | None = option(
        METHOD,
        "of the columns that train, those with these kinds of tuning",
        None,
        flag="--peft",
        metavar="KIND,...",
        usual="all",
        read=values.texts,
    )
    steps: int | None = again(Config, "steps", None, usual="the paper's")
    seeds: list[int] | None = again(Comparison, "seeds", None, usual="the suite's")
    lrs: dict[str, float] = again(Comparison, "lrs", metavar="COLUMN=LR")
    epses: dict[str, float] = again(Comparison, "epses", metavar="COLUMN=EPS")
    lr_factors: list[float] = again(
        Comparison,
        "lr_factors",
        help="on each task try each column's lr times these with the first seed, and take the best by its loss on the dev examples",
    )
    points: int = again(Comparison, "points")
    plan: bool = option(RUN, "print the plan, with an estimate of what it costs, and end", False)
    output: str = option(
        RUN,
        "table.md, table.csv, table.png, suite.json and a folder of each cell go here; finished cells in it are kept",
        metavar="DIR",
        path=True,
    )


# what a suite says of each of its runs, and a comparison of all
OF_ONE_RUN = ("task", "data", "data_config", "columns", "peft", "adapter")


def shared(kind: Any) -> list[options.Option]:
    """The options that all runs of a comparison or a suite have in common; none of other commands."""
    if kind not in (Comparison, SuiteRuns):
        return []
    of_all = [o for o in options.options_of(Config) if not o.each]
    return of_all if kind is Comparison else [o for o in of_all if o.part != OWN and o.name not in OF_ONE_RUN]


@dataclass(kw_only=True)
class Resume:
    """`zo-finetune resume`."""

    run_dir: str = option(RUN, "the --output of the run", flag="", metavar="RUN_DIR")


@dataclass(kw_only=True)
class Replay:
    """`zo-finetune replay`."""

    source: str = option(RUN, "a run's folder, or its run.zoj alone", flag="", metavar="RUN_DIR_OR_JOURNAL")
    model: str = again(Config, "model", help="the base model that the run started from; another is refused")
    device: str = again(Config, "device")
    output: str = option(RUN, "the model or adapter goes here", metavar="DIR", path=True)
    adapter: str | None = again(
        Config, "adapter", help="the adapter's folder that the run started from; another is refused", usual="where it was then"
    )
    upto: int | None = option(RUN, "the weights after N steps", None, metavar="N", usual="after all")
    mode: str = option(METHOD, "the run's own bits, or one sum rounded once", "sequential", choices=("sequential", "fused"))
    backend: str | None = again(Config, "backend")


SPLITS = ("train", "dev", "eval")  # by a run's names: what it trains on, watches and is measured on


@dataclass(kw_only=True)
class Baseline(TaskChoice):
    """What `zo-finetune evaluate` and `zo-finetune probe` have in common: a model and rows, as a run has them."""

    model: str = again(Config, "model")
    gguf_file: str | None = again(Config, "gguf_file")
    form: str = again(Config, "form")
    max_length: int | None = again(Config, "max_length")
    chat: bool = again(Config, "chat")
    dtype: str = again(Config, "dtype")
    device: str = again(Config, "device")
    quantize: str | None = again(Config, "quantize", help="pack the weights as they are loaded, as those under an adapter were")
    data: str | None = again(Config, "data")
    data_config: str | None = again(Config, "data_config")
    columns: dict[str, str] = again(Config, "columns")
    train_examples: int | None = again(Config, "train_examples")
    dev_examples: int | None = again(Config, "dev_examples")
    eval_examples: int | None = again(Config, "eval_examples")
    k_shot: int | None = again(Config, "k_shot")
    data_seed: int | None = again(Config, "data_seed")
    seed: int = again(Config, "seed", help="of the sample, and of what is drawn from it")
    batch_size: int = again(Config, "eval_batch_size", help="examples in a batch")
    output: str = again(Config, "output", help="result.json and predictions.jsonl go here", metavar="DIR")
    overwrite: bool = again(Config, "overwrite", help="replace an earlier baseline in DIR")

    def check(self) -> None:
        """Raises UserError: names the option that no part could use, or that nothing would read."""
        options.check(self)
        self.run().check_use()

    def run(self) -> Config:
        """A run with this model and these rows."""
        known = {o.name for o in options.options_of(Config)}
        given = {name: value for name, value in asdict(self).items() if name in known}
        return Config(**given | {"train_examples": self.train_rows}).settled()

    @property
    def train_rows(self) -> int:
        """As a run has --train-examples."""
        return self.train_examples or 0

    @property
    def reads(self) -> Sequence[str]:
        """The splits whose rows it depends on, by the names that they have when they are read."""
        return SPLITS


@dataclass(kw_only=True)
class Evaluation(Baseline):
    """`zo-finetune evaluate`: a model as it is."""

    adapter: str | None = again(Config, "adapter", help="an adapter's folder of peft, which the model has")
    train_examples: int | None = again(
        Config, "train_examples", None, usual="1000; all where --shots are drawn from them, as in MeZO"
    )
    split: str = option(
        DATA,
        "rows to evaluate on: eval, dev or train as a run samples them; another file's stem or split of the hub; all: every row of one file",
        "eval",
        metavar="NAME",
    )
    shots: int = option(METHOD, "demonstrations before each example, drawn from the training rows", 0, metavar="K", least=True)
    calibrated: bool = option(
        METHOD, "score answers by how much likelier the prompt makes them than neutral words do (MeZO's sfc)", False
    )

    @property
    def reads(self) -> Sequence[str]:
        split = self.split if self.split in SPLITS else "eval"
        return ("train", split) if self.shots and split != "train" else (split,)

    def check(self) -> None:
        super().check()
        unread = [] if self.shots else ["train_examples", "dev_examples", "k_shot"]
        unread += ["eval_examples"] if self.split == "all" else []
        if self.split not in SPLITS and (name := next((n for n in unread if getattr(self, n) is not None), None)):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(self, name)} says nothing of --split {self.split:.80}: leave it out"
            )

    @property
    def train_rows(self) -> int:
        if self.train_examples is not None:
            return self.train_examples
        return 0 if self.shots and self.split != "train" and self.k_shot is None else 1000


@dataclass(kw_only=True)
class Probing(Baseline):
    """`zo-finetune probe`: a linear classifier on what a model makes of the prompts."""


@dataclass(kw_only=True)
class Demo:
    """`zo-finetune demo`."""

    output: str = again(Config, "output", "runs/demo", help="the run goes here")
    seed: int = again(Config, "seed")
    overwrite: bool = again(Config, "overwrite")


@dataclass(kw_only=True)
class Profile:
    """`zo-finetune profile`."""

    model: str | None = option(MODEL, "model folder or hub id", None, metavar="PATH_OR_HUB_ID", path=True)
    shape: str | None = option(
        MODEL, f"instead of --model, a bare shape with random weights: {', '.join(shapes.SHAPES)}", None, metavar="NAME"
    )
    form: str = again(Config, "form")
    dtype: str = again(Config, "dtype", usual="float32 on a CPU; on a GPU as saved, of a shape bfloat16")
    device: str = again(Config, "device")
    methods: list[str] | None = option(
        METHOD,
        "inference, and methods with @PEFT and their own options behind them, as in inference,adam,adam@lora,mezo:queries=4",
        None,
        metavar="METHOD[@PEFT],...",
        read=lambda text: text.split(","),
        usual="inference, sgd, adam, adam@lora, mezo@lora and every zeroth-order method",
    )
    batch_size: int = option(DATA, "rows of a step's batch, of random tokens", 16, metavar="B", positive=True)
    length: int = option(DATA, "tokens of a row", 64, metavar="TOKENS", positive=True)
    steps: int = option(METHOD, "timed steps, after two that are not", 5, metavar="N", positive=True, below=1 << 20)
    perturbation: str = again(Config, "perturbation")
    output: str = option(RUN, "table.md, profile.csv, memory.png and result.json go here", metavar="DIR", path=True)

    def check(self) -> None:
        """Everything that is known before a model is made. Raises UserError: names the option."""
        options.check(self)
        if (self.model is None) == (self.shape is None):
            raise UserError("zo-finetune profile needs a --model or a --shape, and not both")
        if self.shape is not None:
            shape = shapes.get(self.shape)
            if self.form not in ("auto", "masked" if shapes.is_masked(shape) else "causal"):
                raise UserError(f"--form {self.form}: --shape {self.shape} is not: leave it out")
            if self.length > (room := shapes.context(shape)):
                raise UserError(f"--length {self.length}: --shape {self.shape} has room for {room} tokens")


@dataclass(kw_only=True)
class Tasks:
    """`zo-finetune tasks`."""

    json: bool = option(RUN, "as JSON, with what they are about", False)


COMMANDS = {
    "train": Config,
    "evaluate": Evaluation,
    "probe": Probing,
    "compare": Comparison,
    "suite": SuiteRuns,
    "resume": Resume,
    "replay": Replay,
    "profile": Profile,
    "demo": Demo,
    "tasks": Tasks,
}


def page() -> str:
    """docs/options.md: `python -m zo_finetune.config > docs/options.md`."""
    parts = [
        "# Options of zo-finetune\n\nMade from their descriptions by `python -m zo_finetune.config`; `--list-methods` prints the methods' own.\n"
    ]
    for name, kind in COMMANDS.items():
        also = " And, for all of its runs, " + ", ".join(f"`{o.spelling}`" for o in shared(kind)) + "." if shared(kind) else ""
        parts.append(f"\n## {name}\n\n{options.table(kind)}" + (f"\n{also.strip()}\n" if also else ""))
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
