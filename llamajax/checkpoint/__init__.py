"""Save the training state in the background, verify it, and restore it onto any mesh.

A state is any pytree of arrays. This package knows arrays by name, and no models or optimizers.
"""

from llamajax.checkpoint.checkpointer import Checkpointer, CheckpointError
from llamajax.checkpoint.leaf_names import named_leaves, rebuild
from llamajax.checkpoint.manifest import complete_steps
from llamajax.checkpoint.restore import (
    Checkpoint,
    check_same_model,
    newest_checkpoint,
    open_checkpoint,
    restore_state,
)
