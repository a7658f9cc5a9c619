"""The command line of lora_one_dist/commands/megatron_to_hf.py: ``python tools/megatron_to_hf.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf.main())
