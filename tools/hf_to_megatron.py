"""The command line of lora_one_dist/commands/hf_to_megatron.py: ``python tools/hf_to_megatron.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.commands import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron.main())
