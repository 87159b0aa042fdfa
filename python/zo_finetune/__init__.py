"""zo_finetune: the application. It turns a model, a task and a file of examples into a fine-tuned model, with forward passes only.

Belongs here: the command line, tasks and their prompts, data, models, evaluation, the run's record and its figures. Does not
belong here: noise, weights' arithmetic and step rules; those are `zo_kernels`, which in turn knows nothing of tasks.

From Python: `run.run(config.Config(...))` is a whole run with its folder; `load.load`, `evaluate.evaluate` and `train.train` are its parts."""
