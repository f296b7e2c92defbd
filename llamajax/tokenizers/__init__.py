"""Encode and decode text: tokenizers of several kinds, their special tokens, chat templates."""

from llamajax.tokenizers.loading import load_tokenizer
from llamajax.tokenizers.tokenizer import Tokenizer
