"""What the machine is: starting JAX on it, and what is known of its devices."""

from llamajax.backends.devices import attention_preferences, peak_flops
from llamajax.backends.runtime import Machine, peak_memory_bytes, start

__all__ = ["Machine", "attention_preferences", "peak_flops", "peak_memory_bytes", "start"]
