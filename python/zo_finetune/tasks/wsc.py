"""WSC (Levesque et al. 2012; SuperGLUE): does a pronoun refer to a noun? MeZO's prompt, from PromptSource.

554 training rows, and 104 of validation of which 63.5 % are "no": a score of 63.5 has learned nothing.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.yes_no import YesNo


class WSC(YesNo):
    name = "wsc"
    summary = "does a pronoun (span2_text) refer to a noun (span1_text)? 0 no, 1 yes"
    source, source_config = "aps/super_glue", "wsc.fixed"
    fields = ("text", "span1_text", "span2_text", "label")
    aliases: ClassVar = {"span1_text": ("target",), "span2_text": ("target",)}

    def prompt(self, row: Row) -> str:
        noun, pronoun = self.text(row, "span1_text"), self.text(row, "span2_text").lower()
        return f'{self.text(row, "text")}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n'
