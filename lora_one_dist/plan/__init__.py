"""What a run will take, and which settings make it fit.  Uses config to train; asks no cluster."""
