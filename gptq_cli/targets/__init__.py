"""What each reader of GPTQ checkpoints accepts."""
