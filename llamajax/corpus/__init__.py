"""The work of `prepare`: text from files, cleaned and tokenized by workers, into shards."""
