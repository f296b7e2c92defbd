"""Optimizer: schedules and one optax chain."""

from llamajax.optim.chain import apply, build, decay_mask
from llamajax.optim.schedule import schedule

__all__ = ["apply", "build", "decay_mask", "schedule"]
