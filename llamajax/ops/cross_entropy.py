"""Cross-entropy of a language model's head, without ever holding the logits of all tokens.

The head and the loss are one function with one derivative: logits exist for a chunk of local tokens
at a time, and their gradient is formed right where they are, in the forward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llamajax.sharding import collectives


class LossTerms(NamedTuple):
    """Sums over this device's targets, float32 scalars; `objective` alone is differentiable."""

    objective: jax.Array  # nll + z_weight * z
    nll: jax.Array  # negative log-likelihood, nats
    z: jax.Array  # squared log-partition (z-loss, PaLM, arXiv:2204.02311)


class _Settings(NamedTuple):
    vocab_size: int
    chunk: int
    z_weight: float
    dtype: jnp.dtype
    split_tokens: bool  # the gradient of x is left as this device's part of a sum over tensor


def cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
    z_weight: float,
    split_tokens: bool = False,
) -> LossTerms:
    """Summed losses of the tokens where `mask` is true.

    `head_VD` is the float32 head as it is stored: this device's part, V over `tensor` and D over
    `fsdp`; it is gathered over `fsdp` once, in the dtype of `x`. Maximum, sum and target logit are
    reduced over `tensor`. The head's gradient is accumulated over chunks in float32 and reduced
    once. Rows of the head from `vocab_size` on are padding: their logits are -inf. With
    `split_tokens`, T of `x` alone is split over `tensor`: all are gathered first.
    """
    if split_tokens:
        x_BTD = collectives.enter_tensor(x_BTD, split_tokens=True)
    tokens, width = targets_BT.size, x_BTD.shape[-1]
    chunk = min(chunk_tokens, tokens)
    pad = -tokens % chunk
    x = jnp.pad(x_BTD.reshape(tokens, width), ((0, pad), (0, 0)))
    targets = jnp.pad(targets_BT.reshape(tokens), (0, pad))
    mask = jnp.pad(mask_BT.reshape(tokens).astype(jnp.float32), (0, pad))
    settings = _Settings(vocab_size, chunk, z_weight, x_BTD.dtype, split_tokens)
    return LossTerms(*_summed(x, head_VD, targets, mask, settings))


def token_nll(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 (B, T); for measuring, not training.

    Arguments as for `cross_entropy`: the same numbers before they are summed, and like there no
    more logits at one time than those of a chunk.
    """
    tokens, width = targets_BT.size, x_BTD.shape[-1]
    chunk = min(chunk_tokens, tokens)
    pad = -tokens % chunk
    x = jnp.pad(x_BTD.reshape(tokens, width), ((0, pad), (0, 0)))
    targets = jnp.pad(targets_BT.reshape(tokens), (0, pad))
    settings = _Settings(vocab_size, chunk, 0.0, x_BTD.dtype, False)
    head = _gathered_head(head_VD, settings)

    def body(carry, part):
        log_partition, target, _ = _chunk_logs(part[0], head, part[1], settings)
        return carry, log_partition - target

    _, nll = jax.lax.scan(body, None, [_chunks(a, chunk) for a in (x, targets)])
    return nll.reshape(tokens + pad)[:tokens].reshape(targets_BT.shape)


def _chunk_terms(x_CD, head_VD, targets_C, mask_C, settings: _Settings):
    """Sums of one chunk, and what its gradient is made of."""
    log_partition, target, (odds, partition, is_target) = _chunk_logs(
        x_CD, head_VD, targets_C, settings
    )
    nll = jnp.sum((log_partition - target) * mask_C)
    z = jnp.sum(log_partition * log_partition * mask_C)
    return (nll, z), (odds, partition, log_partition, is_target)


def _chunk_logs(x_CD, head_VD, targets_C, settings: _Settings):
    """Log-partition and logit of the target (C,) of one chunk, and what they were made of."""
    num_rows = head_VD.shape[0]
    logits = jnp.dot(x_CD, head_VD.T, preferred_element_type=jnp.float32)
    rows = collectives.axis_index("tensor") * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    if num_rows * collectives.axis_size("tensor") != settings.vocab_size:
        logits = jnp.where((rows < settings.vocab_size)[None, :], logits, -jnp.inf)
    top = collectives.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=1)), "tensor")
    odds = jnp.exp(logits - top[:, None])
    partition = collectives.psum(jnp.sum(odds, axis=1), "tensor")
    is_target = rows[None, :] == targets_C[:, None]
    target = collectives.psum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=1), "tensor")
    return jnp.log(partition) + top, target, (odds, partition, is_target)


def _gathered_head(head_VD: jax.Array, settings: _Settings) -> jax.Array:
    return collectives.all_gather(head_VD.astype(settings.dtype), "fsdp", dim=1)


def _chunks(array: jax.Array, chunk: int) -> jax.Array:
    return array.reshape(array.shape[0] // chunk, chunk, *array.shape[1:])


def _zero(x: jax.Array) -> jax.Array:
    """What sums start from: of whole rows of logits, they are the same along `tensor`."""
    return collectives.pcast_varying(
        jnp.float32(0), tuple(collectives.varying_axes(x) - {"tensor"})
    )


def _objective(nll: jax.Array, z: jax.Array, settings: _Settings) -> tuple[jax.Array, ...]:
    return nll + settings.z_weight * z, nll, z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(x, head_VD, targets, mask, settings: _Settings):
    head = _gathered_head(head_VD, settings)

    def body(sums, part):
        (nll, z), _ = _chunk_terms(part[0], head, part[1], part[2], settings)
        return (sums[0] + nll, sums[1] + z), None

    parts = [_chunks(a, settings.chunk) for a in (x, targets, mask)]
    zero = _zero(x)
    (nll, z), _ = jax.lax.scan(body, (zero, zero), parts)
    return _objective(nll, z, settings)


def _summed_forward(x, head_VD, targets, mask, settings: _Settings):
    """The sums and, chunk by chunk, the gradients of the objective: no logits are kept.

    A head that is frozen (not differentiated) has no gradient, nor a buffer for one.
    """
    train_head = head_VD.perturbed
    x, head_VD, targets, mask = (primal.value for primal in (x, head_VD, targets, mask))
    head = _gathered_head(head_VD, settings)

    def body(carry, part):
        nll, z, grad_head = carry
        x_CD, targets_C, mask_C = part
        sums, (odds, partition, log_partition, is_target) = _chunk_terms(
            x_CD, head, targets_C, mask_C, settings
        )
        scale = (1.0 + 2.0 * settings.z_weight * log_partition) / partition * mask_C
        grad = odds * scale[:, None] - jnp.where(is_target, mask_C[:, None], 0.0)
        grad = grad.astype(settings.dtype)
        grad_x = jnp.dot(grad, head, preferred_element_type=settings.dtype)
        if not settings.split_tokens:
            grad_x = collectives.psum(grad_x, "tensor")
        if train_head:
            grad_head += jnp.dot(grad.T, x_CD, preferred_element_type=jnp.float32)
        return (nll + sums[0], z + sums[1], grad_head), grad_x

    parts = [_chunks(a, settings.chunk) for a in (x, targets, mask)]
    zero = _zero(x)
    zeros = None
    if train_head:
        zeros = collectives.pcast_varying_like(jnp.zeros(head.shape, jnp.float32), head, x)
    (nll, z, grad_head), grad_x = jax.lax.scan(body, (zero, zero, zeros), parts)
    return _objective(nll, z, settings), (grad_x.reshape(x.shape), grad_head)


def _summed_backward(settings: _Settings, saved, grads):
    grad_x, grad_head = saved
    scale = grads[0]  # of the objective; nll and z are for the log
    if grad_head is not None:
        grad_head = collectives.psum_scatter(grad_head * scale, "fsdp", dim=1)
    return grad_x * scale.astype(grad_x.dtype), grad_head, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
