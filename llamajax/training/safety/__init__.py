"""What protects a run: guard, canary, hang watch, shutdown, rollback."""
