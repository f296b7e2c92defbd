"""SIGKILL at any file operation of a save or a removal leaves the newest complete one usable."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import warm
from tiny_state import checkpointer

from llamajax.checkpoint import newest_checkpoint, restore_state

# A different remainder of the 145 operations each: 1 walks through all of them, by hand.
_STRIDE = 9


def test_killed_at_any_file_operation(tmp_path: Path):
    script = Path(__file__).with_name("kill_saves.py")
    result = warm.run(
        [sys.executable, str(script), str(tmp_path), str(_STRIDE)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    children = [json.loads(line) for line in result.stdout.splitlines()]
    assert [child["killed"] for child in children] == [True] * (len(children) - 1) + [False]
    wanted = jax.eval_shape(lambda: {"w": jnp.zeros(1000), "step": jnp.int32(0)})
    newest, leftovers = set(), 0
    for child in children:
        directory = Path(child["directory"])
        leftovers += any("." in path.name for path in directory.glob("*"))
        with checkpointer(directory, keep=1) as loader:
            assert not any("." in path.name for path in directory.glob("*"))
            found = newest_checkpoint(directory)
            step = None if found is None else found.step
            newest.add(step)
            if found is not None:
                state = restore_state(found, wanted)
                assert found.meta == {"step": step}
                assert (state["w"] == step).all()
                assert state["step"] == step
            loader.save(9, {"x": np.int32(1)}, meta={}, wait=True)
            assert loader.steps() == [9]
    # The test has seen something only if children died in the middle of different saves.
    assert {None, 2, 3, 4} <= newest
    assert leftovers > len(children) // 2
