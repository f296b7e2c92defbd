"""GGUF files: header, config, tensors, tokenizer."""
