"""The last that the fork server of tests/ranks.py imports: what is there by then is no garbage.

Without it each rank goes through, and so copies, all that the server has imported at its first full collection: half a
second.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
