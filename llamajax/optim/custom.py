"""An optimizer of the user's own: `optim.chain=module:function`."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from llamajax.config.schema import OptimConfig
from llamajax.config.user_code import errors_of_function, import_function
from llamajax.errors import UserError
from llamajax.sharding import is_weight

_SMALL = 1024  # elements of an array that every device may hold whole


def custom_chain(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return what the function in `optim.chain` makes of the config's optim section and the rate.

    rate: learning rate by the number of earlier updates. The chain is the whole optimizer: decay,
    clipping and learning rate are its own. Raises UserError where there is no such function, or it
    returns no optax transformation.
    """
    text = f"optim.chain = {config.chain}"
    function = import_function(config.chain, key="optim.chain")
    try:
        inspect.signature(function).bind(config, rate)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{text}: {error}; it must be a function of the optim section and the learning rate"
        ) from None
    with errors_of_function(config.chain, key="optim.chain"):
        chain = function(config, rate)
    if not isinstance(chain, optax.GradientTransformation):
        raise UserError(
            f"{text}: the function returned {type(chain).__name__}; return an "
            "optax.GradientTransformation"
        )
    return chain


def check_state(
    config: OptimConfig,
    optimizer: optax.GradientTransformation,
    shapes: Callable[[], Any],
) -> None:
    """Raise UserError unless the state of a user's chain is split over devices as weights are.

    shapes: returns those of the weights. Arrays as large as weights must be in a tree of weights,
    in their shapes. An update must keep the shapes and dtypes of weights and state.
    """
    if config.chain is None:
        return
    text = f"optim.chain = {config.chain}"
    weights = shapes()
    leaves = jax.tree.leaves(weights, is_leaf=is_weight)
    known = {(w.axes, w.get_value().shape) for w in leaves if is_weight(w)}
    with errors_of_function(config.chain, key="optim.chain", case=" where it makes its state"):
        state = jax.eval_shape(optimizer.init, weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_weight):
        where = f"{text}: its state{jax.tree_util.keystr(path)}"
        if is_weight(leaf) and (leaf.axes, leaf.get_value().shape) not in known:
            raise UserError(
                f"{where} has shape {list(leaf.get_value().shape)}, and the weight another: "
                "moments are split over devices by the dims of their weights; choose an optimizer "
                "whose moments have the shapes of the weights"
            )
        if not is_weight(leaf) and leaf.size > _SMALL:
            raise UserError(
                f"{where} is an array {list(leaf.shape)} outside of a tree like the weights: every "
                "device would hold all of it; make it with optax.tree.zeros_like(weights)"
            )

    def update(weights: Any, state: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, new = optimizer.update(weights, state, weights, step=jax.numpy.int32(0))
            optax.apply_updates(weights, updates)
            return new

    with errors_of_function(config.chain, key="optim.chain", case=" in an update"):
        after = jax.eval_shape(update, weights, state)
    found = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (state, after)]
    if found[0] != found[1] or jax.tree.structure(state) != jax.tree.structure(after):
        raise UserError(
            f"{text}: an update changes the shapes or dtypes of its state; a step must return what "
            "it takes"
        )
