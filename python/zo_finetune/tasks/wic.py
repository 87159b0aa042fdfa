"""WIC (Pilehvar and Camacho-Collados 2019; SuperGLUE): has a word one meaning in two sentences? MeZO's prompt, from PromptSource."""

from __future__ import annotations

from zo_finetune.tasks.base import Row
from zo_finetune.tasks.yes_no import YesNo


class WIC(YesNo):
    name = "wic"
    summary = "has a word the same meaning in two sentences? 0 no, 1 yes"
    source, source_config = "aps/super_glue", "wic"
    fields = ("word", "sentence1", "sentence2", "label")

    def prompt(self, row: Row) -> str:
        word, *sentences = (self.text(row, field) for field in self.fields[:3])
        return f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n' + "".join(
            f"{s}\n" for s in sentences
        )
