"""The command line of lora_one_dist/commands/coverage: ``python tools/coverage.py --help``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands.coverage import command

if __name__ == "__main__":
    code = command.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as launch/train.py: teardown of gloo's threads now and then aborts a process that has finished
