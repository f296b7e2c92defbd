"""Hugging Face Llama directories: config, tensor names, safetensors, reading, writing."""
