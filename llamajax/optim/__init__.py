"""Optimizer: schedules and one optax chain."""

from llamajax.optim.chain import apply, build, decayed
from llamajax.optim.schedule import schedule

__all__ = ["apply", "build", "decayed", "schedule"]
