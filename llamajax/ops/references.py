"""The operations of a Llama step in plain float64 NumPy, for the doctor and for tests.

Arguments are those of the operation in this package, differentiable ones first, as float64.
"""

import numpy as np

Array = np.ndarray


def embedding(table_VD: Array, *, tokens_BT: Array) -> Array:
    """Look up rows of the table."""
    return table_VD[tokens_BT]


def rms_norm(x_BTD: Array, scale_D: Array, *, eps: float) -> Array:
    """Divide by the root mean square; multiply by the scale."""
    return x_BTD / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + eps) * scale_D


def rope(x_BTNH: Array, *, positions_BT: Array, frequency: Array, factor: float) -> Array:
    """Rotate dimension i together with i + H / 2, by float32 angles; multiply by the factor."""
    angle = positions_BT[..., None].astype(np.float32) * frequency
    cos, sin = (factor * f(angle[:, :, None, :].astype(np.float64)) for f in (np.cos, np.sin))
    a, b = np.split(x_BTNH, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *, segment_ids_BT: Array) -> Array:
    """Attend causally within each document; several query heads share one of keys and values."""
    share = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = np.repeat(k_BSKH, share, axis=2), np.repeat(v_BSKH, share, axis=2)
    # matmul, as einsum does not use BLAS for batched products
    scores = q_BTNH.transpose(0, 2, 1, 3) @ k_BSNH.transpose(0, 2, 3, 1)
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    allowed = same & np.tri(q_BTNH.shape[1], dtype=bool)
    scores = np.where(allowed[:, None], scores * q_BTNH.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v_BSNH.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def feed_forward(x_BTD: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
    """Compute SwiGLU."""
    gate = x_BTD @ gate_DF
    return (gate / (1 + np.exp(-gate)) * (x_BTD @ up_DF)) @ down_FD


def cross_entropy(x_BTD: Array, head_VD: Array, *, targets_BT: Array, mask_BT: Array) -> Array:
    """Sum the negative log-likelihoods of the targets that the mask keeps."""
    logits = x_BTD @ head_VD.T
    top = logits.max(axis=-1, keepdims=True)
    log_partition = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    target = np.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return np.sum((log_partition - target) * mask_BT)


def scan(x_LD: Array, start_D: Array) -> Array:
    """Return every state of a recurrence."""
    states, state = [], start_D
    for x_D in x_LD:
        state = np.tanh(0.9 * state + x_D) + 0.1 * state[::-1]
        states.append(state)
    return np.stack(states)


def indexing(x_VD: Array, y_ND: Array, *, rows_N: Array, start: int) -> Array:
    """Add rows to rows, some of them twice; overwrite a slice; roll; halve negative values."""
    out = x_VD.copy()
    np.add.at(out, rows_N, y_ND)
    out[start : start + 2] = y_ND[1:3] * 2
    out = np.concatenate([out[3:], out[:3]])
    return np.where(out < 0, out / 2, out)


def adamw(
    w: Array, grads: list[Array], *, rate: float, betas: tuple, eps: float, decay: float
) -> Array:
    """Return the weights after one update for each gradient (Loshchilov and Hutter 2019)."""
    first, second = np.zeros_like(w), np.zeros_like(w)
    for n, grad in enumerate(grads, start=1):
        first = betas[0] * first + (1 - betas[0]) * grad
        second = betas[1] * second + (1 - betas[1]) * grad**2
        update = first / (1 - betas[0] ** n)
        update = update / (np.sqrt(second / (1 - betas[1] ** n)) + eps)
        w = w - rate * (update + decay * w)
    return w
