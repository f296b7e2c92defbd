"""Cross-entropy of a language model's head, without ever holding the logits of all tokens.

The head and the loss are one function with one derivative: logits exist for a chunk of local tokens
at a time (dims: N chunks of C tokens), and their gradient is computed with them, in the forward
pass.
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


class TokenScores(NamedTuple):
    """Of each target (B, T): how probable it is, and whether nothing is more probable."""

    nll: jax.Array  # negative log-likelihood, nats, float32
    greedy: jax.Array  # bool


class _Settings(NamedTuple):
    vocab_size: int
    z_weight: float
    dtype: jnp.dtype
    split_tokens: bool  # the gradient of x stays this device's part of a sum over `tensor`


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
    """Sum the losses of the tokens where `mask` is true.

    `head_VD` is the float32 head as it is stored: this device's part, V over `tensor` and D over
    `fsdp`. It is gathered over `fsdp` once, in the dtype of `x`; its gradient is accumulated over
    chunks in float32 and reduced once. Maximum, sum and target logit are reduced over `tensor`.
    Rows of the head from `vocab_size` on are padding: their logits are -inf. With `split_tokens`,
    T of `x` alone is split over `tensor`: all are gathered first.
    """
    if split_tokens:
        x_BTD = collectives.enter_tensor(x_BTD, split_tokens=True)
    x_NCD, targets_NC, mask_NC = _in_chunks(
        x_BTD, targets_BT, mask_BT.astype(jnp.float32), chunk_tokens=chunk_tokens
    )
    settings = _Settings(vocab_size, z_weight, x_BTD.dtype, split_tokens)
    return LossTerms(*_sum_losses(x_NCD, head_VD, targets_NC, mask_NC, settings))


def token_scores(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
    split_tokens: bool = False,
) -> TokenScores:
    """Score each target; for measuring, not training.

    The terms that `cross_entropy` sums, with the same arguments and the same chunks of logits.
    """
    if split_tokens:
        x_BTD = collectives.enter_tensor(x_BTD, split_tokens=True)
    x_NCD, targets_NC = _in_chunks(x_BTD, targets_BT, chunk_tokens=chunk_tokens)
    settings = _Settings(vocab_size, 0.0, x_BTD.dtype, split_tokens)
    head = _gather_head(head_VD, settings)

    def body(carry, part):
        log_partition, target, (odds, _, is_target) = _chunk_logs(part[0], head, part[1], settings)
        # The odds of the most probable tokens are exactly 1.
        top = collectives.psum(jnp.sum(jnp.where(is_target, odds, 0.0), axis=1), "tensor") == 1.0
        return carry, TokenScores(log_partition - target, top)

    _, found = jax.lax.scan(body, None, (x_NCD, targets_NC))
    return jax.tree.map(
        lambda x_NC: x_NC.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape), found
    )


def _in_chunks(*arrays: jax.Array, chunk_tokens: int) -> list[jax.Array]:
    """(B, T, ...) -> (N, C, ...), padded with zeros to a multiple of C."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunk = min(chunk_tokens, tokens)
    found = []
    for array in arrays:
        rest = array.shape[2:]
        padding = [(0, -tokens % chunk)] + [(0, 0)] * len(rest)
        found.append(jnp.pad(array.reshape(tokens, *rest), padding).reshape(-1, chunk, *rest))
    return found


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


def _chunk_sums(x_CD, head_VD, targets_C, mask_C, settings: _Settings):
    """Sums (nll, z) of one chunk, and what its gradient is made of."""
    log_partition, target, parts = _chunk_logs(x_CD, head_VD, targets_C, settings)
    nll = jnp.sum((log_partition - target) * mask_C)
    z = jnp.sum(log_partition * log_partition * mask_C)
    return (nll, z), (log_partition, *parts)


def _gather_head(head_VD: jax.Array, settings: _Settings) -> jax.Array:
    return collectives.all_gather(head_VD.astype(settings.dtype), "fsdp", dim=1)


def _zero(x: jax.Array) -> jax.Array:
    """Initial value of the sums, which are the same along `tensor`."""
    axes = tuple(collectives.varying_axes(x) - {"tensor"})
    return collectives.pcast_varying(jnp.float32(0), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_losses(x_NCD, head_VD, targets_NC, mask_NC, settings: _Settings):
    head = _gather_head(head_VD, settings)

    def body(sums, part):
        x_CD, targets_C, mask_C = part
        (nll, z), _ = _chunk_sums(x_CD, head, targets_C, mask_C, settings)
        return (sums[0] + nll, sums[1] + z), None

    zero = _zero(x_NCD)
    (nll, z), _ = jax.lax.scan(body, (zero, zero), (x_NCD, targets_NC, mask_NC))
    return nll + settings.z_weight * z, nll, z


def _sum_losses_forward(x_NCD, head_VD, targets_NC, mask_NC, settings: _Settings):
    """The sums and, chunk by chunk, the gradients of the objective: no logits are kept.

    A head that is frozen (not differentiated) has no gradient, nor a buffer for one.
    """
    train_head = head_VD.perturbed
    x_NCD, head_VD, targets_NC, mask_NC = (a.value for a in (x_NCD, head_VD, targets_NC, mask_NC))
    head = _gather_head(head_VD, settings)

    def body(carry, part):
        nll, z, grad_head = carry
        x_CD, targets_C, mask_C = part
        sums, (log_partition, odds, partition, is_target) = _chunk_sums(
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

    zero, zeros = _zero(x_NCD), None
    if train_head:
        zeros = collectives.pcast_varying_like(jnp.zeros(head.shape, jnp.float32), head, x_NCD)
    carry, parts = (zero, zero, zeros), (x_NCD, targets_NC, mask_NC)
    (nll, z, grad_head), grad_x = jax.lax.scan(body, carry, parts)
    return (nll + settings.z_weight * z, nll, z), (grad_x, grad_head)


def _sum_losses_backward(settings: _Settings, saved, grads):
    grad_x, grad_head = saved
    scale = grads[0]  # of the objective; nll and z are for the log
    if grad_head is not None:
        grad_head = collectives.psum_scatter(grad_head * scale, "fsdp", dim=1)
    return grad_x * scale.astype(grad_x.dtype), grad_head, None, None


_sum_losses.defvjp(_sum_losses_forward, _sum_losses_backward, symbolic_zeros=True)
