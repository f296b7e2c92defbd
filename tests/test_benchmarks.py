"""The benchmarks run as a user runs them, small; how fast they are is not looked at."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from compilers import HAS_CUDA

REPOSITORY = Path(__file__).resolve().parents[1]


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    """Return the finished script, run on one CPU device."""
    return warm.run(
        [sys.executable, f"benchmarks/{script}", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Return the rows of the one table that a script prints."""
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", done.stdout, re.MULTILINE))


def number(text: str) -> float:
    """Return the number that a cell begins with."""
    return float(text.split()[0].replace(",", ""))


def test_train_step_prints_one_table_and_writes_it_as_json(tmp_path):
    file = tmp_path / "step.json"
    done = run(
        "train_step.py", "--preset=tiny", "--batch=2", "--seq_len=16", "--steps=3",
        "--num_cpu_devices=2", "--mesh=data=2", "--accumulation=1", f"--json={file}",
        "--documents=3", "--remat=full", "--remat_keep=gate,up", "--moment_dtype=bfloat16",
        "--compiler_options=xla_cpu_enable_fast_math=false", "--dtype=float8",
    )  # fmt: skip
    rows = rows_of(done)
    assert "warning: train.dtype=float8: 'cpu' is not known to multiply in 8 bits" in done.stderr
    assert rows["compute"].startswith("float8, ")
    assert rows["machine"] == "cpu, cpu, data 2 (2 devices)"
    assert "of 3 steps" in rows["step time"]
    assert "of 3 steps" in rows["step time, waited for"]
    assert rows["batch"].endswith("3 document(s) a row")
    assert "remat full, keeping gate, keeping up" in rows["compute"]
    assert rows["compute"].endswith("first moment bfloat16")
    assert rows["compiler options"] == "xla_cpu_enable_fast_math=False"
    found = json.loads(file.read_text())
    assert found["compiler_options"] == {"xla_cpu_enable_fast_math": False}
    assert found["attention_reason"] == "the first choice on cpu"
    assert found["loss_last"] < found["loss_first"]
    assert found["tokens_per_s"] == 32 / found["step_s"]
    assert rows["MFU, causal half of it"].startswith("null, peak unknown")
    assert rows["peak memory"].endswith("(process peak RSS)")
    assert number(rows["tokens/s"]) > 0


_CPU = """
[[device]]
kind = "cpu"
bfloat16 = 1e12
float32 = 1e12
memory_gib = 8
hbm_bytes_per_s = 1e10
fast_bytes_per_s = 1e9
source = "this test"
"""
# What a machine with a card may not have; the script needs jax, flax, optax and orbax alone.
_ABSENT = ("array_record", "grain", "ml_collections", "pyarrow", "sentencepiece", "tensorboardX",
           "tiktoken", "tokenizers", "tqdm")  # fmt: skip


def test_accelerator_goes_on_where_it_was_killed_or_out_of_time(tmp_path):
    (tmp_path / "cpu.toml").write_text(_CPU)
    for name in _ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    output = tmp_path / "output"

    def accelerator(*flags: str) -> tuple[int, dict]:
        command = [sys.executable, "benchmarks/accelerator.py", f"--output={output}", *flags]
        paths = f"{tmp_path}{os.pathsep}{REPOSITORY}"
        done = subprocess.run(
            [*command, f"--device_table={tmp_path / 'cpu.toml'}"], cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}, timeout=300,
            stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        assert not done.stderr, done.stderr
        found = json.loads((output / "results.json").read_text())
        return done.returncode, {(row["part"], row["name"]): row for row in found["rows"]}

    code, first = accelerator("--parts=parity")
    assert code == 0
    assert {part for part, _ in first} == {"environment", "parity"}
    assert all(row["right"] and row["same_bits_twice"] for row in [*first.values()][1:])

    with (output / "results.jsonl").open("a") as file:
        file.write('{"part": "32m", "na')  # killed while it wrote
    code, second = accelerator("--parts=parity,32m", "--minutes=0.01")
    (name,) = {key for key in second if key not in first}
    assert code == 1
    assert second[name]["status"] == "skipped"
    assert "s of --minutes=0.01 were left" in second[name]["reason"]

    code, third = accelerator("--parts=parity,32m")
    assert code == 0
    assert {key: third[key] for key in first} == first  # kept, not measured again
    assert third[name]["predicted_step_s"] > 0
    assert third[name]["tokens_per_s"] > 0
    table = json.loads((output / "results.json").read_text())["table"]
    assert re.search(rf"\| predicted \| {name[1]} \| .* ms predicted, .* measured", table)

    code, virtual = accelerator("--parts=environment", "--num_cpu_devices=2", "--restart")
    assert [(code, row["num_devices"]) for row in virtual.values()] == [(0, 2)]


def test_published_runs_are_compared_or_what_is_missing_is_named():
    done = run("published.py", "--only=h200:1")
    if HAS_CUDA:
        assert re.search(r"^\| KempnerForge, .* \| 10,471 \| [+-]\d+% \|$", done.stdout, re.M)
    else:
        assert done.returncode == 2
        assert "needs JAX's CUDA plugin" in done.stderr


def test_decode_prints_one_table():
    rows = rows_of(
        run("decode.py", "--preset=tiny", "--batch=2", "--prompt_len=4", "--new_tokens=4",
            "--rounds=1", "--dtype=float32")
    )  # fmt: skip
    assert rows["machine"] == "cpu, cpu, one device (1 device)"
    assert rows["work"] == "2 prompts of 4 tokens, 4 new ones each, float32, median of 1 rounds"
    assert rows["compiling"].endswith("for 2 programs")
    assert number(rows["decoding, tokens/s"]) > 0
    assert number(rows["time to first token"]) > 0
    assert "transformers, tokens/s" not in rows


def test_data_path_reads_what_it_prepared():
    done = run("data_path.py", "--tokens=300000", "--seq_len=256", "--batch_size=2", "--steps=1")
    assert done.returncode == 0, done.stderr
    for reader in ("llamajax", "plain grain"):
        assert re.search(rf"^{reader}, 2 threads +[\d.]+ ", done.stdout, re.MULTILINE)


def test_bytes_of_a_stack_are_those_of_the_slice_alone():
    program = REPOSITORY / "tests" / "planning" / "programs" / "stack_update.hlo"
    done = run("program_bytes.py", f"--hlo={program}", "--unit=kB")
    assert done.returncode == 0, done.stderr
    assert "| copies | 64.0 |  | copy.1 |" in done.stdout
    assert "| slices of stacks, read or written | 8.0 |  | write |" in done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_step.py", "--batch=3 --accumulation=2", "data.global_batch_size = 3"),
        ("train_step.py", "--documents=513", "--documents=513: 0 to --seq_len=512"),
        ("train_step.py", "--compiler_options=fast", "'fast' is not k=v"),
        ("accelerator.py", "--parts=7b,8b", "no part '8b'; parts: environment,parity,7b"),
        ("versus.py", "--systems=torch", "--systems=torch: llamajax comes first"),
        ("versus.py", "--systems=llamajax,jaxtext", "no system 'jaxtext'"),
        ("decode.py", "--preset=tiny --prompt_len=4096", "are more than the"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(script, flags, words):
    done = run(script, *flags.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.live
def test_torch_does_the_same_work(tmp_path):
    file = tmp_path / "found.json"
    done = run("versus.py", "--systems=llamajax,torch", "--preset=tiny", "--batch=2",
               "--seq_len=16", "--rounds=2", "--steps=2", "--no_compile",
               f"--json={file}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| torch \| [\d.]+ \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", done.stdout, re.M)
    found = json.loads(file.read_text())
    ours, theirs = (found["systems"][name]["losses"] for name in ("llamajax", "torch"))
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]


def test_other_source_is_a_system_of_its_own(tmp_path):
    file = tmp_path / "found.json"
    done = run("versus.py", "--systems=llamajax,same,litgpt", f"--source=same:{REPOSITORY}",
               f"--python=litgpt:{shutil.which('false')}", "--preset=tiny", "--batch=2",
               "--seq_len=16", "--rounds=1", "--steps=1", f"--json={file}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "litgpt is left out" in done.stderr
    found = json.loads(file.read_text())
    assert list(found["systems"]) == ["llamajax", "same"]
    assert found["systems"]["llamajax"]["losses"] == found["systems"]["same"]["losses"]
    assert found["llamajax_by_other"]["same"].keys() == {"wall", "processor"}
