"""Models: tiny checkpoints made on this machine, local folders and hub ids, LoRA."""
