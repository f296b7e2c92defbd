"""Load weights for the verbs that compute with them and change nothing."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.config import MeshConfig, ModelConfig, WeightsFlags, mesh_config
from llamajax.errors import say
from llamajax.formats.weights import Weights
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Llama
from llamajax.monitoring.row_format import format_count
from llamajax.ops.attention import AttentionChoice, best_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on its devices. dtype: of weights, computation and cache."""

    machine: backends.Machine
    mesh: Mesh
    dtype: str
    model: Llama

    def attention(self, seq_len: int) -> AttentionChoice:
        """Return the attention for rows of this length."""
        return best_attention(self.machine, self.dtype, self.model.config.head_size, seq_len)


def load_model(
    weights: Weights, flags: WeightsFlags, *, default_mesh: Callable[[ModelConfig, int], MeshConfig]
) -> LoadedModel:
    """Start the machine, load `weights` as `flags` say, and print what is loaded where.

    default_mesh: called with the model and the number of devices where `--mesh` is not given.
    Raises UserError.
    """
    machine = backends.start(flags.backend_config, keep_programs=True)
    config, devices = weights.model, jax.devices()
    chosen = mesh_config(flags.mesh) if flags.mesh else default_mesh(config, len(devices))
    mesh = sharding.build_mesh(chosen, devices)
    sharding.check_divides(config.dims, mesh, batch=sharding.batch_shards(mesh))
    dtype = flags.dtype or backends.platform_facts(machine.platform).dtype
    step = "" if weights.step is None else f" of step {weights.step}"
    parameters = format_count(num_parameters(config))
    say(f"weights  {weights.path} ({weights.kind}{step}), {parameters} parameters")
    say(f"machine  {machine.platform}, {machine.device_kind}; mesh {sharding.describe(mesh)}")
    for line in backends.machine_warnings(machine):
        say(line)
    model = weights.load(abstract_model(config, mesh, dtype=jnp.dtype(dtype)))
    return LoadedModel(machine=machine, mesh=mesh, dtype=dtype, model=model)
