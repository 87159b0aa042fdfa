"""The weights of a recorded run, made again from its base model and its journal.

Belongs here: what the journal says of the model, and where the weights go. Does not belong here: how records become weights (zo_kernels.replay)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from zo_finetune import console, run_folder
from zo_finetune.config import DTYPES, Config, Replay
from zo_finetune.errors import UserError, one_line
from zo_finetune.files import JOURNAL, check_plain, path_of
from zo_finetune.keep import made_again
from zo_finetune.run import remedy
from zo_kernels import journal


def replay(given: Replay) -> Path:
    """A model or adapter in the usual format; returns its folder.

    Raises:
        UserError: the base model is not the one that the run started from, or the journal is damaged.
    """
    path, target = path_of("RUN_DIR_OR_JOURNAL", given.source), path_of("--output", given.output)
    run_folder.check_run_dir(target, overwrite=False)
    if os.path.isdir(path):
        path = path / JOURNAL
        check_plain(path)
    try:
        past = journal.read(path, strict=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{given.source}: {one_line(error)}") from error
    about, weights = past.header.hyperparameters, past.header.parameters
    options = about.get("config")
    if isinstance(options, dict):
        config = Config.of_json(options, f"{given.source}, config")
    else:  # a run of the library or of a Trainer, which says of what model
        packed = "nf4" if about.get("quantize") == "nf4" else None
        config = Config(model=given.model, task="", data="", output=given.output, quantize=packed)
    dtype = about.get("dtype", weights[0].dtype)
    if dtype not in DTYPES:
        raise UserError(f"{given.source}: dtype {dtype!r:.40} must be one of {', '.join(DTYPES)}")
    if past.tail is not None:
        console.say(f"{path} has {past.tail.reason} at its end, where the run was ended: that is left out")
    if given.upto is None and isinstance(options, dict) and len(past.steps) < config.steps:
        console.say(
            f"the run was recorded for {len(past.steps)} of its {config.steps} steps: these are the weights that it had then"
        )
    if given.upto is None and config.keep == "best":
        console.say(
            "these are the weights after the last step, and the run kept those of its best evaluation on the dev examples: for them give --upto with "
            'the step that its result.json has under "kept"'
        )
    if given.adapter is not None and config.adapter is None:
        raise UserError(f"--adapter {given.adapter}: the run started from none: leave it out")
    folder = config.adapter if given.adapter is None else given.adapter
    config = replace(config, model=given.model, adapter=folder, dtype=dtype, device=given.device, backend=given.backend)
    if given.upto is not None and not 0 <= given.upto <= len(past.steps):
        raise UserError(f"--upto {given.upto} must be 0 to {len(past.steps)}: so many steps are in {path}")
    trained = about.get("peft") if not isinstance(options, dict) else None
    adapter = trained if isinstance(trained, dict) else None
    language_model = made_again(config, past, given.upto, given.mode, given.source, path, adapter)
    try:
        with console.Phase("saving the weights"):
            return run_folder.save_weights(target, language_model.save)[0]
    except OSError as error:
        raise UserError(f"{target}: {one_line(error)}; {remedy(error)} and run it again") from error
