"""LoRA-One on DeepSpeed ZeRO-3: one-step full gradient, sharded SVD, preconditioned LoRA training."""
