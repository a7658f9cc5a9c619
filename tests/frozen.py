"""The last that the fork server of tests/ranks.py imports: what each rank would import, draw up and go through anew.

The modules are those that a run imports on its way; transformers keeps its renamings of weights once they are drawn up,
and matplotlib its fonts.  What is there by then is no garbage: without the freeze each rank goes through, and so
copies, all of it at its first full collection, half a second.
"""

from __future__ import annotations

import gc
import importlib
import io

import matplotlib.pyplot as plt
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for late in (
    *("deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "numpy.ctypeslib"),
    *("peft.utils.transformers_weight_conversion", "torch.utils.tensorboard"),
):
    importlib.import_module(late)
get_checkpoint_conversion_mapping("llama")
plt.switch_backend("agg")
picture, axes = plt.subplots(layout="constrained")
axes.set(xscale="log", title="warm")
picture.savefig(io.BytesIO())
plt.close(picture)

gc.collect()
gc.freeze()
