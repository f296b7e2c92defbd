"""Llama as frozen pytrees; parameter and FLOP counts."""
