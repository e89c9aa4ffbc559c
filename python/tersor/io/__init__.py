"""Reading and writing checkpoints: compressed-tensors, GPTQ, AWQ, and our own container."""
