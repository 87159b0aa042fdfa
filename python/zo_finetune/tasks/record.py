"""ReCoRD (Zhang et al. 2018; SuperGLUE): which entity of a news text belongs into a gap of one more sentence?

The text is MeZO's, as in GPT-3: its highlights as "- " items, and the sentence with an entity in its gap as one more. MeZO's score is the mean over the
whole sentence, most of which is the same for all entities; here it is over the entity and what follows it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from zo_finetune.tasks.base import Candidate, Example, Form, Row, RowError, Task

GAP = "@placeholder"


class ReCoRD(Task):
    name = "record"
    summary = f"which entity of a passage fills the gap, {GAP} in the query? entities and answers are lists of texts"
    source, source_config = "aps/super_glue", "record"
    fields = ("passage", "query", "entities", "answers")
    objective = "language-model"
    empty: ClassVar = "test sets of the hub have no answers: evaluate on another split"

    def specimen(self) -> Row:
        return {"passage": "{passage}", "query": f"{{before}} {GAP} {{after}}", "entities": ["{entity}"], "answers": ["{entity}"]}

    def listed(self, row: Row, field: str) -> list[str]:
        """The texts of a list, each once."""
        value: Any = row[field]
        if not isinstance(value, (list, tuple)) or not value:
            raise RowError(field, value, f"record needs a list of texts there: correct the row or remove it; {self.empty}")
        return list(dict.fromkeys(self.clean(text, field) for text in value))

    def example(self, row: Row, form: Form) -> Example:
        passage = self.text(row, "passage").replace("@highlight\n", "- ")
        before, gap, after = self.text(row, "query").partition(GAP)
        if not gap:
            raise RowError("query", row["query"], f"record needs {GAP} there: correct the row or remove it")
        entities, answers = self.listed(row, "entities"), self.listed(row, "answers")
        right = [entities.index(answer) for answer in answers if answer in entities]
        if not right:
            raise RowError("answers", row["answers"], "none of them is among the entities: correct the row or remove it")
        query = f"- {before.rstrip(' ')}" if before.strip() else "-"
        space = " " if before.endswith(" ") or not before else ""
        endings = (f"{space}{entity}{after.replace(GAP, entity)}" for entity in entities)
        candidates = tuple(Candidate(f"{passage}\n{query}", ending, neutral=query) for ending in endings)
        return Example(candidates, right[0], frozenset(right))
