"""Prove that a training command resumes bit by bit, by killing it."""
