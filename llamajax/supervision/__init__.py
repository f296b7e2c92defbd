"""Keeping a run alive: workers started, watched and restarted; and the proof that resuming works.

Nothing here trains. Workers are commands, and what is known of them is their exit code and log.
"""
