"""DiZO (Tan et al. 2025, arXiv 2502.03304), table 4: OPT-2.7B on nine tasks.

The paper's dev rows are its test rows; ours are training rows, apart from both others. Sizes as in MeZO's table (large_models/dizo.sh of its code).
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.suites.base import Column, Suite


class DiZO(Suite):
    name = "dizo"
    summary = "MeZO, HiZOO and DiZO on nine tasks"
    paper, table, model = "DiZO (arXiv 2502.03304)", "table 4", "OPT-2.7B"
    tasks = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "squad", "drop")
    columns = (Column("mezo", "MeZO"), Column("hizoo", "HiZOO"), Column("dizo", "DiZO"))
    scores: ClassVar = {
        "sst2": (90.0, 90.8, 92.5),
        "rte": (63.5, 60.6, 68.2),
        "cb": (69.6, 70.4, 71.4),
        "boolq": (67.4, 68.0, 67.0),
        "wsc": (61.5, 60.2, 63.4),
        "wic": (57.6, 56.6, 57.9),
        "multirc": (58.7, 54.8, 56.4),
        "squad": (68.7, 68.3, 69.0),
        "drop": (22.9, 23.4, 24.3),
    }
