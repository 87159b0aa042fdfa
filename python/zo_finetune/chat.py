"""A prompt as the user's turn of a chat, the assistant's turn begun behind it: what a tokenizer's chat template puts around the user's text.

Belongs here: that template. Does not belong here: prompts (tasks/), tokens (scoring.py).

What is scored, trained or generated behind it is the answer's text. The template writes every special token itself, so the tokenizer adds none. Spaces
that separate a prompt from its answer have no place between two turns, and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zo_finetune.errors import UserError, one_line

MARK = "zo-finetune's user says this"  # to be found again in what a template makes of it
A_DAY = (  # before templates that tell the date, for which transformers asks the clock: a run that goes on tomorrow has the same prompts
    "{%- macro strftime_now(format) -%}{{ {'%d %b %Y': '26 Jul 2024', '%d %B %Y': '26 July 2024'}.get(format, '2024-07-26') }}{%- endmacro -%}"
)


@dataclass(frozen=True)
class Turns:
    """What stands before and after the user's text."""

    before: str
    after: str

    def context(self, text: str) -> str:
        return f"{self.before}{text.strip()}{self.after}"

    @staticmethod
    def answer(text: str) -> str:
        return text.lstrip()


def turns_of(tokenizer: Any) -> Turns:
    """Those of a tokenizer's template, without the thinking that some begin an assistant's turn with.

    Raises:
        UserError: it has no template, or one that shows no user's text as it is.
    """
    name = type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise UserError(
            "--chat: the model's tokenizer has no chat template: leave it out, or choose a --model that was made for chats"
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=A_DAY + tokenizer.get_chat_template(),
        )
    except Exception as error:  # a template is a program of others
        raise UserError(
            f"--chat: the chat template of {name} failed ({one_line(error)}): leave it out, or choose another --model"
        ) from error
    before, *after = text.split(MARK)
    if len(after) != 1:
        raise UserError(
            f"--chat: the chat template of {name} shows the user's text {len(after)} times: leave it out, or choose another --model"
        )
    return Turns(before, after[0])
