"""The command line of lora_one_dist/commands/doctor/command.py: ``python tools/doctor.py --help``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands.doctor import command

if __name__ == "__main__":
    exit_code = command.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # as launch/train.py: the teardown of gloo's threads may abort a finished process
