"""The command line of lora_one_dist/commands/export_adapter.py: ``python tools/export_adapter.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands import export_adapter

if __name__ == "__main__":
    sys.exit(export_adapter.main())
