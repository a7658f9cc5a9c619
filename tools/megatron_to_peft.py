"""The command line of lora_one_dist/commands/megatron_to_peft.py: ``python tools/megatron_to_peft.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands import megatron_to_peft

if __name__ == "__main__":
    sys.exit(megatron_to_peft.main())
