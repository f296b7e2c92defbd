"""Tokenizers: encode and decode text, and everything that a directory says of special tokens."""

from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.loading import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
