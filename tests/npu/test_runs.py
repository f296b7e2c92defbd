"""Whole runs on the test NPU: as on the CPU, there and back, with what JAX takes away repaired.

Each child is one process that carries out several commands one after the other, as a process has
one NPU; compiled programs are kept in a folder of this module, so that only the first of a kind
compiles.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import warm
from shell import train_command
from workdirs import prepare_texts, read_rows

from llamajax.backends import PlatformVerdict, ProbeResult, write_verdict
from llamajax.backends.plugin import typed_options

_CHILD = """
import importlib, json, sys
for line in sys.stdin:
    verb, arguments = json.loads(line)
    code = importlib.import_module(f"llamajax.{verb}").main(arguments)
    assert code == 0, (verb, code)
"""
_EIGHT = "num_devices=8,memory_gib=2.5"
_MESH = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared text, runs and caches of this module."""
    folder = tmp_path_factory.mktemp("npu_runs")
    texts = (f"line {i} of a small corpus {'abcdefgh' * (i % 7)}." for i in range(300))
    return prepare_texts(folder, texts, held_out=0.1).parent


def train(folder: Path, run: str, steps: int, **keys: object) -> tuple[str, list[str]]:
    """A command of `train` that goes on to `steps`, whatever the number it began with."""
    keys |= {"train.steps": steps, "optim.schedule": "constant", "train.eval_every": 0}
    keys |= {"checkpoint.every_steps": 3}
    return "train", train_command(folder / "data", folder / run, keys)[3:]


def carry_out(folder: Path, cache: str, *commands: tuple[str, list[str]]) -> tuple[str, str]:
    """Stdout and stderr of one process that carries out these commands."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / cache)}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # that of all tests
    done = warm.run(
        [sys.executable, "-c", _CHILD],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def on_npu(library: Path, options: str) -> dict[str, str]:
    return {"backend.name": "npu", "backend.plugin": str(library), "backend.options": options}


def losses(folder: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_rows(folder / run / "metrics.jsonl") if "loss" in row]


def facts(folder: Path, run: str) -> dict:
    return json.loads((folder / run / "run.json").read_text())


@pytest.fixture(scope="module")
def first(folder, npu):
    """Three steps on 8 NPUs, with donation and cache forced."""
    repairs = {"backend.repairs": "donation,compile_cache"}
    command = train(folder, "npu", 3, **on_npu(npu, _EIGHT), **_MESH, **repairs)
    stderr = carry_out(folder, "cache", command)[1]
    # the same command as a plan: without its workdir
    plan = [*(a for a in command[1] if "--workdir" not in a), "--devices=npu:8"]
    carry_out(folder, "plan_cache", ("plan", [*plan, f"--json={folder / 'plan.json'}"]))
    kept = sorted(path.name for path in (folder / "cache").rglob("*.program"))
    for copy in ("npu_then_cpu", "npu_then_one"):
        shutil.copytree(folder / "npu", folder / copy)
    return stderr, kept, facts(folder, "npu")


@pytest.fixture(scope="module")
def cpu(folder, first):
    """Three steps on 8 CPU devices, and the NPUs' run continued there."""
    machine = {"backend.name": "cpu", "backend.num_cpu_devices": 8, **_MESH}
    here = train(folder, "cpu", 3, **machine)
    stderr = carry_out(folder, "cpu_cache", here, train(folder, "npu_then_cpu", 5, **machine))[1]
    shutil.copytree(folder / "cpu", folder / "cpu_then_npu")
    return stderr


@pytest.fixture(scope="module")
def second(folder, npu, first, cpu, monkeypatch_module):
    """The same command again, to step 5, after the doctor was there; and the CPU's run."""
    monkeypatch_module.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    profile = first[2]["profile"]
    write_verdict(
        PlatformVerdict(
            **{name: profile[name] for name in ("platform", "platform_version", "device_kind")},
            jax=first[2]["versions"]["jax"],
            verdict="ready with repairs",
            repairs=("donation", "compile_cache", "synchronous_checkpoints"),
            probes=(ProbeResult(name="donation", status="fail", message="", time_s=0.0),),
        )
    )
    machine = on_npu(npu, _EIGHT) | _MESH
    again = train(folder, "npu", 5, **machine)
    apart = {"backend.compile_cache": folder / "apart"}  # jax 0.12 lowers twice in two ways
    other = train(folder, "cpu_then_npu", 5, **machine, **apart)
    return carry_out(folder, "cache", again, other)[1]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def one_device(folder, npu, first):
    """On one NPU that nobody examined: the run continued, evaluated, and text made of it."""
    (folder / "devices.toml").write_text(
        '[[device]]\nkind = "Test NPU"\nbfloat16 = 2e12\nfloat32 = 1e12\nmemory_gib = 2.5\n'
        'hbm_bytes_per_s = 1e11\nfast_bytes_per_s = 1e10\nsource = "a data sheet"\n'
    )
    table = {"backend.device_table": folder / "devices.toml"}
    own = {"train.attention": "own_attention:attend"}  # beside the config
    command = train(folder, "npu_then_one", 5, **on_npu(npu, "num_devices=1"), **table, **own)
    machine = ["--backend=npu", f"--plugin={npu}", "--options=num_devices=1", "--dtype=float32"]
    weights = f"--checkpoint={folder / 'npu_then_one'}"
    prompt = ["--prompt=line 1", "--max_new_tokens=4", "--ignore_eos", "--json"]
    return carry_out(
        folder,
        "other_cache",
        command,
        ("evaluate", [weights, f"--data={folder / 'data'}", *machine]),
        ("generate", [weights, *prompt, *machine]),
    )


def test_the_losses_are_those_of_the_cpu(folder, first, cpu):
    assert first[2]["reused_bytes"] == first[2]["donated_bytes"] > 0
    assert len(losses(folder, "npu")) >= 3
    assert losses(folder, "npu")[:3] == pytest.approx(losses(folder, "cpu"), rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_from_there_to_the_cpu_and_back(folder, second):
    expected = losses(folder, "npu")
    assert len(expected) == 5
    assert losses(folder, "npu_then_cpu") == pytest.approx(expected, rel=1e-5)
    assert losses(folder, "cpu_then_npu") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_one_device_goes_on_with_the_run_of_eight(folder, second, one_device):
    assert losses(folder, "npu_then_one") == pytest.approx(losses(folder, "npu"), rel=2e-5)


@pytest.mark.slow
def test_the_step_reuses_the_whole_state_once_donation_is_repaired(folder, first, one_device):
    repaired, plain = first[2], facts(folder, "npu_then_one")
    parameters, moments = 4 * repaired["num_parameters"], 8 * repaired["num_parameters"]
    assert repaired["reused_bytes"] == repaired["donated_bytes"] > (parameters + moments) / 8
    assert plain["donated_bytes"] > parameters + moments
    assert plain["reused_bytes"] == 0
    assert plain["profile"]["donates"] is False
    assert "in memory twice" in one_device[1]
    assert "in memory twice" not in first[0]


@pytest.mark.slow
def test_the_program_of_the_plan_is_that_of_the_run(first, folder):
    plan = json.loads((folder / "plan.json").read_text())
    for key in ("program", "attention", "attention_reason", "compiler_options"):
        assert plan[key] == first[2][key]
    assert "no fused kernel is known for npu" in plan["attention_reason"]
    assert "warning: attention blocked, because no fused kernel" in first[0]


@pytest.mark.slow
def test_the_second_start_compiles_neither_step_again(folder, first, second):
    kept = {path.name for path in (folder / "cache").rglob("*.program")}
    before = set(first[1])
    assert before < kept  # what restores is new
    steps = {name for name in before if name.startswith("jit_step-")}
    assert len(steps) == 2  # of training and of evaluation
    assert {name for name in kept if name.startswith("jit_step-")} == steps


@pytest.mark.slow
def test_the_profile_is_said_and_stored(first, second, one_device, folder):
    assert "llamajax test NPU 1.0; 2.50 GiB a device" in first[0]
    assert "repairs  donation, compile_cache (doctor: none)" in first[0]
    assert "(doctor: ready with repairs)" in second
    assert "was not examined: run `python -m llamajax.doctor`" in one_device[1]
    assert "donation OFF; programs not kept" in one_device[1]
    found = facts(folder, "npu")["profile"]
    assert found["repairs"] == ["donation", "compile_cache", "synchronous_checkpoints"]
    assert found["saves_asynchronously"] is False
    assert found["doctor"] == "ready with repairs"
    assert facts(folder, "npu_then_one")["profile"]["device"]["source"] == "a data sheet"
    assert facts(folder, "npu_then_one")["peak_flops"] == 1e12


@pytest.mark.slow
def test_attention_of_the_users_own_is_proven_there(one_device, folder):
    found = facts(folder, "npu_then_one")
    assert found["attention"] == "own_attention:attend"
    assert "float32 error " in found["attention_reason"]
    assert "changed since step 3: train.attention: auto -> own_attention" in one_device[1]


@pytest.mark.slow
def test_evaluate_and_generate_run_there(one_device, folder):
    evaluated, generated = map(json.loads, one_device[0].splitlines()[-2:])
    because = "attention blocked, because no fused kernel is known for npu"
    assert one_device[1].count(f"warning: {because}") == 2  # of each verb
    assert one_device[1].count("warning: decoding does not reuse") == 1
    assert evaluated["attention"] == "blocked"
    assert "no fused kernel" in evaluated["attention_reason"]
    assert (evaluated["platform"], evaluated["num_devices"]) == ("npu", 1)
    assert 0 < evaluated["loss"] < 6
    assert len(generated["output_ids"]) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("memory_gib=2", "option memory_gib is of type float, not int"),
        ("levle=1", "the NPU has no option levle"),
        ("num_devices=0", "no NPU was found on this host"),
        ("donation=maybe", "option donation is honor, ignore or refuse, not maybe"),
    ],
)
def test_options_are_typed_and_checked(npu, options, words):
    """A client of its own each; JAX itself is not needed to make one."""
    assert words in create_client(npu, options)


def create_client(library: Path, options: str) -> str:
    """The message of the error with which the plugin answers these options."""
    from jax._src.lib import xla_client

    name = f"npu_of_{library.parent.name}"
    if not xla_client.pjrt_plugin_loaded(name):
        xla_client.load_pjrt_plugin_dynamically(name, str(library))
        xla_client.initialize_pjrt_plugin(name)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        xla_client.make_c_api_client(name, typed_options(options), None)
    return str(raised.value)
