"""Loading weights for the verbs that compute with them and change nothing."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.errors import say
from llamajax.formats.weights import Weights
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Llama
from llamajax.monitoring.row_format import format_count


def load_model(
    weights: Weights, machine: backends.Machine, mesh: Mesh, dtype: str, *, notes: Sequence[str]
) -> Llama:
    """Load `weights` onto `mesh`, matrices in `dtype`; print what is loaded where, and `notes`."""
    step = "" if weights.step is None else f" of step {weights.step}"
    parameters = format_count(num_parameters(weights.model))
    say(f"weights  {weights.path} ({weights.kind}{step}), {parameters} parameters")
    say(f"machine  {machine.platform}, {machine.device_kind}; mesh {sharding.describe(mesh)}")
    for note in [*backends.machine_warnings(machine), *notes]:
        say(note)
    return weights.load(abstract_model(weights.model, mesh, dtype=jnp.dtype(dtype)))
