"""New tokens from a model: the cache of keys and values, sampling, batches of prompts, text."""
