"""From a gradient to initial pairs: the one-step gradient, its SVD, the broadcast.  Uses config to base."""
