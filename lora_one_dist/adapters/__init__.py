"""LoRA pairs in the model and on disk.  Uses config to initialise."""
