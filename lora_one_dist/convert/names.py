"""What the files of a base call the tensors that transformers gives other names.

In: a base's folder.  Out: names.  Builds the model without values; reads headers alone.
"""

from __future__ import annotations

import math
from pathlib import Path

from lora_one_dist.base.files import weight_files
from lora_one_dist.base.skeleton import ModelError, build_skeleton
from lora_one_dist.base.sources import NotSliceableError, find_sources
from lora_one_dist.config.settings import ModelConfig
from lora_one_dist.disk.weights import WeightsError, read_header


def names_in_files(base: Path) -> dict[str, str]:
    """By the name of a parameter that of the tensor in the files which is it, whole; empty if that cannot be said."""
    try:
        skeleton = build_skeleton(ModelConfig(path=str(base), dtype="fp32", attn_implementation="eager"), base)
        files = weight_files(base, allow_pickle=False)
        found = find_sources(files, skeleton).parts
        stored = {source: name for path in files for name, source in read_header(path).items()}
    except (ModelError, NotSliceableError, WeightsError):
        return {}
    one = {name: parts[0] for name, parts in found.items() if len(parts) == 1}
    return {name: stored[part.source] for name, part in one.items() if part.count == math.prod(part.source.shape)}
