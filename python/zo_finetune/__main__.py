"""`python -m zo_finetune` is `zo-finetune`: it needs no installed script."""

import sys

from zo_finetune.cli import main

sys.exit(main())
