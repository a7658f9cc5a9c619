"""The command line of lora_one_dist/commands/inspect_data.py: ``python tools/inspect_data.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands import inspect_data

if __name__ == "__main__":
    sys.exit(inspect_data.main())
