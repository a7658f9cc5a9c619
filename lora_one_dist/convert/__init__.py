"""Checkpoints from one format to another, a tensor at a time, on a machine with little memory.  Uses config to run."""
