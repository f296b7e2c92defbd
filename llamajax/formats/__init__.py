"""Weights of other systems, and ours as theirs: Hugging Face, GGUF, Meta, PEFT."""
