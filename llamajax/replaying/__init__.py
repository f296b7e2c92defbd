"""Repeat a recorded step, and explain it by document and by layer."""
