"""Training: state, step, loop. Nothing is imported here, so that signals are caught early."""
