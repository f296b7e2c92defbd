"""The work of `prepare`: read files, clean and tokenize their text, write shards."""
