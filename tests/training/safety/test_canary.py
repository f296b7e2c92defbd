"""The canary is silent on healthy devices, and names the one whose bits differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from stepping import COMPUTE, MODEL, OPTIM, TRAIN, T, drawn_state

import llamajax.models.llama
import llamajax.models.lora
import llamajax.training.safety.canary
from llamajax import optim
from llamajax.backends import CompilerOptions
from llamajax.backends.platforms import UNKNOWN
from llamajax.models import replicas
from llamajax.training.safety.canary import Canary
from llamajax.training.safety.guard_stops import BadDevice
from llamajax.training.state import StateSpec

FAULTY = 3  # the position along the first replica axis of the device with a fault


def built(**sizes):
    """(canary, state) of a small model in bfloat16 on a mesh of the first devices."""
    mesh, optimizer = mesh_of(**sizes), optim.build(OPTIM, steps=TRAIN.steps)
    state = drawn_state(StateSpec(model=MODEL, optimizer=optimizer, mesh=mesh))
    attention = "split" if mesh.shape["sequence"] > 1 else "blocked"
    split = mesh.shape["tensor"] > 1
    compute = dataclasses.replace(
        COMPUTE, dtype=jnp.dtype("bfloat16"), attention=attention, split_tokens=split
    )
    return Canary(state, mesh, compute, rows=2, seq_len=T, options=CompilerOptions()), state


def flipped(x, axis):
    """`x` with the lowest bit of its first number flipped, on one device along `axis`."""
    kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind)
    first = (jnp.arange(x.size) == 0).reshape(x.shape)
    here = first & (jax.lax.axis_index(axis) == FAULTY)
    return jax.lax.bitcast_convert_type(bits ^ here.astype(kind), x.dtype)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "stage": 2, "data": 2}],
    ids=str,
)
def test_healthy_devices_agree(sizes):
    canary, state = built(**sizes)
    canary.check(10, state)


def test_one_flipped_bit_of_an_activation_names_the_device(monkeypatch):
    norm = llamajax.models.llama.rms_norm

    def faulty(x, scale, *, eps):
        return flipped(norm(x, scale, eps=eps), "fsdp")

    monkeypatch.setattr(llamajax.models.llama, "rms_norm", faulty)
    canary, state = built(fsdp=8)
    with pytest.raises(BadDevice, match=rf"device {FAULTY} .*computes other bits.*blocks") as told:
        canary.check(10, state)
    assert str(told.value).count("computes other bits") == 1
    assert told.value.exit_code == 80


def test_one_flipped_bit_of_a_weight_gradient_names_the_device(monkeypatch):
    """Before it is summed over the replicas, where it would be everyone's."""
    linear = llamajax.models.lora.linear

    @jax.custom_vjp
    def product(x, w):
        return linear(x, w)

    def backward(saved, grad):
        dx, dw = jax.vjp(linear, *saved)[1](grad)
        return dx, flipped(dw, "fsdp")

    product.defvjp(lambda x, w: (linear(x, w), (x, w)), backward)

    def faulty(x, w, contract=1):
        return product(x, w) if contract == 1 else linear(x, w, contract=contract)

    monkeypatch.setattr(llamajax.models.lora, "linear", faulty)
    canary, state = built(fsdp=8)
    with pytest.raises(BadDevice, match=rf"device {FAULTY} .*computes other bits.*\(blocks\)"):
        canary.check(10, state)


def test_one_flipped_bit_of_a_stored_weight_names_the_device_and_the_weight():
    canary, state = built(data=8)
    canary.check(5, state)
    weight = state.model.blocks.mlp.gate
    value = weight.get_value()
    copies = [(np.array(s.data), s.device) for s in value.addressable_shards]
    copies[FAULTY][0].reshape(-1).view(np.uint32)[7] ^= 1 << 20
    parts = [jax.device_put(*copy) for copy in copies]
    damaged = jax.make_array_from_single_device_arrays(value.shape, value.sharding, parts)
    state.model.blocks.mlp.gate = weight.replace(damaged)
    with pytest.raises(BadDevice) as told:
        canary.check(10, state)
    message = str(told.value)
    assert f"device {FAULTY} (cpu, process 0) holds other bits than its copies" in message
    assert "blocks/mlp/gate" in message
    assert "all was well at step 5" in message


def test_one_replica_is_asked_twice(monkeypatch):
    canary, state = built()
    real, calls = canary._tables, []

    def fails_the_second_time(model, tokens):
        computed, stored = real(model, tokens)
        calls.append(1)
        return computed ^ np.uint32(len(calls) == 2), stored

    monkeypatch.setattr(canary, "_tables", fails_the_second_time)
    with pytest.raises(BadDevice, match="the second time"):
        canary.check(10, state)
    canary.check(11, state)  # a fault that repeats, or none: the two runs agree


def test_a_digest_sees_every_bit_and_every_place():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7)).astype(np.float32)
    whole = int(replicas.digest(jnp.asarray(x)))
    for place, bit in [(0, 0), (3, 31), (34, 12)]:
        other = x.copy()
        other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1) << np.uint32(bit)
        assert int(replicas.digest(jnp.asarray(other))) != whole
    swapped = x[::-1].copy()
    assert int(replicas.digest(jnp.asarray(swapped))) != whole


def test_one_of_two_devices_that_does_not_repeat_its_bits_is_no_fault_of_the_backend():
    first, second = np.zeros((2, 1), np.uint32), np.array([[0], [1]], np.uint32)
    assert llamajax.training.safety.canary._most_repeat(first, second)
    assert not llamajax.training.safety.canary._most_repeat(first, second + 1)


@pytest.mark.parametrize(("odd", "raises"), [(range(1, 8), False), ([FAULTY], True)], ids=str)
def test_a_backend_that_never_repeats_its_bits_is_asked_before_a_device_is_named(
    monkeypatch, capsys, odd, raises
):
    """On a platform of which nothing is known; at the first check all devices run twice."""
    monkeypatch.setattr(llamajax.training.safety.canary, "platform_facts", lambda _: UNKNOWN)
    canary, state = built(fsdp=8)
    run, calls = canary._run, []

    def unsteady(state):
        computed, stored = run(state)
        computed = np.array(computed)
        calls.append(0)
        computed.reshape(8, -1)[list(odd), 0] += np.uint32(len(calls)) * np.array(odd, np.uint32)
        return computed, stored

    monkeypatch.setattr(canary, "_run", unsteady)
    if raises:
        with pytest.raises(BadDevice, match=rf"device {FAULTY} .*computes other bits"):
            canary.check(10, state)
    else:
        canary.check(10, state)
        canary.check(20, state)
    assert capsys.readouterr().err.count("they give other bits each time") == (not raises)
