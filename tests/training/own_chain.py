"""An optimizer of the user's own that fails where the environment says so: `own_chain:fails`."""

import os

import optax


def fails(config, rate):
    return optax.sgd({"1": rate}[os.environ.get("OWN_CHAIN", "rate")])
