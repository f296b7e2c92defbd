"""Meta's checkpoints: params.json and pickled shards, read without torch."""
