"""The command line of lora_one_dist/commands/report/page.py: ``python tools/report.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands.report import page

if __name__ == "__main__":
    sys.exit(page.main())
