"""Optimizer: schedules and one optax chain."""

from llamajax.optim.average import copied, move_average
from llamajax.optim.chain import RunFacts, apply, build, decay_mask
from llamajax.optim.custom import check_state
from llamajax.optim.schedule import schedule
