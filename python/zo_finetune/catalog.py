"""The tasks as lists: what `zo-finetune tasks` prints, and docs/tasks.md: `python -m zo_finetune.catalog > docs/tasks.md`.

Belongs here: how tasks are shown; everything shown is asked of them. Does not belong here: what a task is (tasks/).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Form, Task
from zo_finetune.tasks.own import METRICS_OF_ANSWERS, METRICS_OF_WORDS

HEAD = ("task", "models", "measured", "trained", "data", "columns")
INTRODUCTION = """\
# Tasks

What `zo-finetune tasks` lists (`--json` for programs), and what each task makes of a row; made from the tasks by `python -m zo_finetune.catalog`.
`data` is the data set on the hub that stands for `--data` where none is given. A column has one of the names given, the first that is there; `--column
FIELD=NAME` names another. A label is a number in the order below, or its name, in any case.

"""
PROMPTS = """
## Prompts

`{column}` is the text of a column without blanks around it, `\\n` a new line, `<mask>` where a masked model reads masks. The prompts are those of MeZO's and
ZO-LLM's code, but where it says "ours"; the masked ones are those of MeZO's medium models. An answer's score is the mean log-probability of its tokens.

"""
OWN = """
## A task of your own

A TOML file describes it, or the options of the same names; no Python is needed. With words to choose from:

```toml
name = "mood"
prompt = "{review}\\nIs the customer happy?"  # what a causal model goes on with
masked = "{review} The customer is {mask}."  # the same for a masked model; one of both is enough
words = ["No", "Yes"]
labels = ["unhappy", "happy"]  # what the words stand for; by default they themselves
label = "mood"  # the column with a label, or its number, counted from 0; by default "label"
```

With answers that a model writes:

```toml
name = "capitals"
prompt = "Country: {country}\\nCapital:"
answer = "capital"  # a column with a text, or a list of accepted ones
```

```
zo-finetune train --model MODEL --task-file mood.toml --data reviews.csv --output runs/mood
zo-finetune train --model MODEL --task mood --prompt '{review} The customer is' --words unhappy,happy --data reviews.csv --output runs/mood
```

`{{` and `}}` are braces. Between a prompt and a word that begins with a letter or digit there is a space, unless the prompt ends with one or with a new
line. A token that has characters of a prompt's end and of an answer's beginning is the answer's. An answer of several lines is trained on as one. Where
`labels` are numbers, as of stars, a number in the column is one of these, and none is counted from 0. `neutral` is the prompt of the calibrated score;
`objective` is what `--objective` says, `decoding` follows from the rest.
`metrics` (`--task-metrics`), the first of which curves and tables show, are of WORDS for words (`auc` for two of
them), and of ANSWERS for answers; the loss is always among them.

The whole description is part of a run's record: `resume` and `compare` refuse a file that has changed since, and `resume` needs none.
"""


def columns_of(task: Task) -> str:
    return ", ".join(" or ".join((field, *task.aliases.get(field, ()))) for field in task.fields)


def source_of(task: Task) -> str:
    return " ".join(filter(None, (task.source, task.source_config)))


def row_of(task: Task) -> tuple[str, ...]:
    return (task.name, ", ".join(task.forms), ", ".join(task.metrics), task.objective, source_of(task), columns_of(task))


def table() -> str:
    """Markdown, and to be read on a terminal."""
    return aligned(HEAD, map(row_of, TASKS.values()))


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def as_json() -> str:
    def entry(task: Task) -> dict[str, Any]:
        return {
            "name": task.name,
            "summary": task.summary,
            "forms": task.forms,
            "metrics": task.metrics,
            "objective": task.objective,
            "decoding": task.decoding,
            "source": task.source,
            "source_config": task.source_config,
            "columns": {field: [field, *task.aliases.get(field, ())] for field in task.fields},
            "labels": task.class_names,
        }

    return json.dumps([entry(task) for task in TASKS.values()], indent=2)


def code(text: str) -> str:
    """As a span of code."""
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`` {shown} ``" if shown[:1] in ("", " ", "`") or shown[-1:] in (" ", "`") else f"`{shown}`"


def prompts() -> str:
    """What each task makes of a row of its fields' names."""
    lines = ["| task | models | prompt | answers |", "|---|---|---|---|"]
    for task in TASKS.values():
        for form in task.forms:
            lines.append(f"| {task.name} | {form} | {' | '.join(shown(task, form))} |")
    return "\n".join(lines)


def shown(task: Task, form: Form) -> tuple[str, str]:
    """Prompt and answers."""
    example = task.example(task.specimen(), form)
    first = example.candidates[0]
    prompt = first.context if form == "causal" else f"{first.context}<mask>{first.tail}"
    names = task.class_names or [""] * len(example.candidates)
    answers = (f"{code(c.answer)} {name}".strip() for name, c in zip(names, example.candidates, strict=True))
    return code(prompt), ", ".join(answers)


def page() -> str:
    about = "".join(f"- `{task.name}`: {task.summary}\n" for task in TASKS.values())
    return (
        INTRODUCTION
        + table()
        + "\n\n"
        + about
        + PROMPTS
        + prompts()
        + "\n"
        + OWN.replace("WORDS", ", ".join(METRICS_OF_WORDS)).replace("ANSWERS", ", ".join(METRICS_OF_ANSWERS))
    )


if __name__ == "__main__":
    print(page(), end="")
