"""Checkpoints of a training state: saved in the background, atomic, restored onto any mesh.

A state is any pytree of arrays. Storage knows array names, never classes; models, optimizers and
configs stay strangers here.
"""

from llamajax.checkpoint.checkpointer import Checkpointer, CheckpointError
from llamajax.checkpoint.manifest import complete_steps, find_damage
from llamajax.checkpoint.names import named_leaves, rebuild
from llamajax.checkpoint.restore import (
    Checkpoint,
    check_same_model,
    newest_checkpoint,
    open_checkpoint,
    restore_state,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "check_same_model",
    "complete_steps",
    "find_damage",
    "named_leaves",
    "newest_checkpoint",
    "open_checkpoint",
    "rebuild",
    "restore_state",
]
