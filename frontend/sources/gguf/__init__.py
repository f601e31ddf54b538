"""GGUF files as checkpoints: header, tensors, configuration and tokenizer."""
