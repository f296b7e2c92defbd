"""How well a model predicts a text: rows to score, their loss token by token, perplexity."""
