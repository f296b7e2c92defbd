"""Checkpoints of a training state: saved in the background, atomic, restored onto any mesh.

A state is any pytree of arrays. Storage knows array names, never classes; models, optimizers and
configs stay strangers here.
"""

from llamajax.checkpoint.checkpointer import Checkpointer, CheckpointError
from llamajax.checkpoint.manifest import complete_steps, find_damage
from llamajax.checkpoint.names import named_leaves, rebuild
from llamajax.checkpoint.restore import newest_step, read_arrays_index, read_meta, restore_state

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "complete_steps",
    "find_damage",
    "named_leaves",
    "newest_step",
    "read_arrays_index",
    "read_meta",
    "rebuild",
    "restore_state",
]
