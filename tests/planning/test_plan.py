"""Plans for the virtual CPU devices, from the command line to the JSON, against hand formulas."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llamajax import plan, sharding
from llamajax.backends import absent_devices, compiler_options
from llamajax.backends.platforms import platform_facts
from llamajax.config import load
from llamajax.config.data_schema import DataStage
from llamajax.errors import UserError
from llamajax.models.counts import flops_per_token
from llamajax.planning import planner, printed_plan
from llamajax.planning.compilation import compiled_facts, refusal, temporary_bytes
from llamajax.planning.planner import make_plan
from llamajax.planning.roofline import pipeline_facts
from llamajax.training.feed import abstract_batch
from llamajax.training.state import StateSpec

CONFIG = str(Path(__file__).with_name("small_run.py"))
COMMAND = [f"--config={CONFIG}", "--devices=cpu:8"]
CONTRACT = {
    "config", "devices", "num_devices", "mesh", "params_bytes", "optimizer_bytes", "peak_bytes",
    "limit_bytes", "fits", "flops_per_step_full", "flops_per_step_causal", "collective_bytes",
    "step_time_s", "tokens_per_s", "compile_s", "compiled_product_flops", "expected_product_flops",
    "attention", "attention_reason", "compiler_options",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The directory of stored plans, in a user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "llamajax" / "plans"


@pytest.fixture(scope="module")
def planned(cache, tmp_path_factory):
    """The JSON of the plan of the small run on cpu:8."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    assert plan.main([*COMMAND, f"--json={out}"]) == 0
    return json.loads(out.read_text())


def sent(planned, kind, axes):
    return sum(
        row["sent_bytes"]
        for row in planned["collectives"]
        if row["kind"] == kind and row["axes"] == axes and row["dtype"] == "f32"
    )


def test_the_json_has_the_keys_of_the_contract(planned, config):
    assert set(planned) >= CONTRACT
    assert planned["config"] == CONFIG
    assert (planned["devices"], planned["num_devices"]) == ("cpu:8", 8)
    assert planned["mesh"] == {"data": 1, "stage": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    for key, causal in (("flops_per_step_full", False), ("flops_per_step_causal", True)):
        assert planned[key] == 16 * 64 * flops_per_token(config.model, 64, causal=causal)
    for unknowable in ("peak_bytes", "limit_bytes", "fits", "step_time_s", "tokens_per_s"):
        assert planned[unknowable] is None  # of a CPU


def test_arguments_are_the_bytes_of_the_real_state_and_batch(planned, config):
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    state = StateSpec.of(config, mesh).init(0)

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert planned["params_bytes"] == held(state.model)
    assert planned["optimizer_bytes"] == held(state.opt_state)
    batch = abstract_batch(config.data, mesh, batch_size=16)
    tokens = sum(16 * 64 * x.dtype.itemsize for x in batch.values()) // 4  # rows on fsdp 4
    assert planned["arguments_bytes"] == held(state) + tokens


def test_collectives_send_what_a_hand_formula_says(planned):
    rows, T, D, F, L, heads, V = 16 / 4, 64, 48, 88, 3, (6 + 2) * 2 * 10, 256
    # fsdp scatters every gradient once a microbatch
    layer = D * (heads + 3 * F) / 2 + 2 * D  # matrices on tensor 2, two norms
    once = L * layer + V * D / 2 + D  # and the head with its norm
    # 2 microbatches, 4 bytes, 3 of 4 parts; the embedding's table has gradients of its own device
    assert sent(planned, "reduce-scatter", ["fsdp"]) == 2 * 4 * 3 / 4 * once
    # tensor moves the residual eleven times a block, and four times around
    moved = sent(planned, "all-gather", ["tensor"]) + sent(planned, "reduce-scatter", ["tensor"])
    assert moved == (11 * L + 4) * rows * T * D * 4 / 2


def test_products_as_compiled_are_those_of_the_formula(planned, config, capsys, monkeypatch):
    # by hand: 1024 tokens; q, k, v, o, gate, up and twice down; xla's 8 products of T x T; the head
    m, tokens = config.model, 16 * 64
    heads = m.head_size * (2 * m.num_heads + 2 * m.num_kv_heads)
    matrices = m.hidden_size * (heads + 3 * m.intermediate_size)
    again = matrices - m.hidden_size * m.intermediate_size
    scores = 8 * 64 * m.num_heads * m.head_size
    layers = m.num_layers * (3 * matrices + again + scores)
    by_hand = 2 * tokens * (layers + 3 * m.hidden_size * 256)
    assert planned["expected_product_flops"] == pytest.approx(by_hand)
    assert planned["compiled_product_flops"] == pytest.approx(by_hand, rel=1e-3)
    assert not any("products" in note for note in planned["notes"])
    # a compiler that does products twice is named
    monkeypatch.setattr(planner, "expected_product_flops", lambda *_, **__: by_hand / 1.28)
    assert plan.main(COMMAND) == 0
    assert "multiplies 28.0% more than" in capsys.readouterr().out


def test_the_same_program_is_not_compiled_twice(planned, cache, monkeypatch, capsys):
    assert list(cache.glob("*.json"))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("again"))
    assert plan.main(COMMAND) == 0
    assert "stored from an earlier plan" in capsys.readouterr().out


def test_what_does_not_fit_is_no_error(planned, cache, config, known_devices):
    arguments = planned["arguments_bytes"]
    assert make_plan(config, known_devices(arguments - 1), cache=cache).fits is False
    # the rest of a CPU's memory is unknown, so that more than the arguments proves nothing
    roomy = make_plan(config, known_devices(arguments), cache=cache)
    assert roomy.fits is None
    assert roomy.prediction.step_time_s > 0


def test_all_stages_of_a_run_are_planned_and_must_fit(cache, config, known_devices):
    stages = (DataStage(from_step=5, global_batch_size=64),)
    staged = dataclasses.replace(config, data=dataclasses.replace(config.data, stages=stages))
    first = make_plan(config, known_devices(), cache=cache)
    made = make_plan(staged, known_devices(first.facts.arguments_bytes), cache=cache)
    assert (made.fits, [plan.fits for _, plan in made.stages]) == (False, [None, False])
    assert made.config.data.global_batch_size == 64  # the larger one
    told = printed_plan.to_json(made, config_file="")
    assert [(s["first_step"], s["program"]) for s in told["stages"]] == [
        (0, first.facts.digest),
        (5, told["program"]),
    ]
    table = list(printed_plan.text_lines(made))[:3]
    assert [line.split()[:4] for line in table[1:]] == [
        ["0", "0", "16", "64"],
        ["1", "5", "64", "64"],
    ]


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
def test_8_bits_on_a_device_without_such_products_are_noted(planned, cache, config, kind):
    made = make_plan(config, absent_devices("cpu:8", config.backend), cache=cache)
    train = dataclasses.replace(config.train, dtype="float8")
    target = made.step.target
    machine = dataclasses.replace(target.machine, device_kind=kind)
    step = dataclasses.replace(
        made.step,
        config=dataclasses.replace(config, train=train),
        target=dataclasses.replace(target, machine=machine),
    )
    notes = planner.plan_notes(dataclasses.replace(made, step=step))
    assert any("not known to multiply in 8 bits" in note for note in notes) == ("A100" in kind)


def test_options_that_need_the_device_are_left_out_and_named(monkeypatch, cache, config):
    option = "xla_backend_optimization_level"
    facts = dataclasses.replace(platform_facts("cpu"), deterministic_options=({option: 1},))
    for module in (compiler_options, planner):
        monkeypatch.setattr(module, "platform_facts", lambda _: facts)
    backend = dataclasses.replace(config.backend, deterministic=True)
    asked = dataclasses.replace(config, backend=backend)
    made = make_plan(asked, absent_devices("cpu:8", backend), cache=cache)
    told = printed_plan.to_json(made, config_file="")
    assert told["compiler_options"] == {}
    assert any(f"compiled without its {option}" in note for note in told["notes"])

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: cannot enumerate configs in deviceless mode")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(UserError, match=r"cpu:8: with the options given .* needs the device"):
        compiled_facts(made.step, cache=None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=cpu:4"], r"mesh: fsdp 4 x tensor 2 does not make 4 devices"),
        (["--devices=cpu:8", "--json=not/there/b.json"], "no directory"),
        (["--devices=cpu:8", "--search"], "device table"),
        (
            [
                "--devices=cpu:8",
                "--search",
                '--config.data.stages=[{"from_step": 2, "seq_len": 64}]',
            ],
            "has one in each: search without data.stages",
        ),
    ],
)
def test_a_wrong_mesh_or_path_is_one_message(flags, message):
    with pytest.raises(UserError, match=message):
        plan.main([f"--config={CONFIG}", *flags])


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm. "
         "Exceeded hbm capacity by 2.25G.", 18 * 2**30, int(15.75 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (320.00G) exceeds available HBM (15.75G).", 320 * 2**30,
         int(15.75 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None, None),
    ],
)  # fmt: skip
def test_a_refusal_is_read(message, needed, limit):
    facts = refusal(message, 1.0)
    assert (facts.needed_bytes, facts.limit_bytes, facts.traffic) == (needed, limit, None)


def test_the_peak_of_a_tpu_is_its_compilers_own():
    memory = SimpleNamespace(
        argument_size_in_bytes=47, output_size_in_bytes=46, alias_size_in_bytes=45,
        temp_size_in_bytes=141, generated_code_size_in_bytes=3, peak_memory_in_bytes=152,
        host_argument_size_in_bytes=11,
    )  # fmt: skip
    assert temporary_bytes(memory, "tpu") == 152 - 47 - 11
    assert temporary_bytes(memory, "gpu") == 141 + 3 + 46 - 45
    memory.peak_memory_in_bytes = 0
    assert temporary_bytes(memory, "tpu") == 145


def test_the_idle_share_and_the_kept_inputs_of_a_pipeline():
    """70B as the ancestor splits it: 263 ticks of 16 MiB, ten times that without `remat_stage`."""
    config = load(str(Path(__file__).parents[2] / "configs/llama3_70b.py:pipeline"), {})
    sizes = {"data": 1, "stage": 8, "fsdp": 1, "sequence": 1, "tensor": 8}
    facts = pipeline_facts(config, sizes)
    assert facts.bubble == pytest.approx(7 / 263)
    assert facts.stage_inputs_bytes == 263 * 2**24
    assert facts.layer_inputs_bytes == 10 * facts.stage_inputs_bytes
    assert pipeline_facts(config, sizes | {"stage": 1}) is None
