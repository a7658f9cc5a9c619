"""One run from start to end, and what it leaves.  Uses config to plan."""
