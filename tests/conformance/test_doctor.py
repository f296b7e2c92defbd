"""The verb as a user runs it: on a plain CPU, and on the test NPU with each of its faults."""

import importlib.metadata
import json
import os
from types import SimpleNamespace

import pytest
from shell import shell

from llamajax.backends.repairs import read_verdict


@pytest.fixture
def doctor(tmp_path, monkeypatch):
    """Runs the verb; its exit code, what it printed, its JSON (None without), results by name."""

    def run(*flags: str) -> tuple[int, str, dict | None, dict[str, tuple[str, str]]]:
        out = tmp_path / "doctor.json"
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # that of all tests
        environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        done = shell("doctor", f"--json={out}", *flags, env=environ)
        found = json.loads(out.read_text()) if out.exists() else None
        probes = found["probes"] if found else []
        results = {p["name"]: (p["status"], p["message"]) for p in probes}
        return done.returncode, done.stdout + done.stderr, found, results

    return run


def test_some_probes_of_a_cpu(doctor, tmp_path):
    page = tmp_path / "page.html"
    names = (
        "compiler_options,dtypes,matmul_float32,cross_entropy,donation,all_reduce,random_sharded"
    )
    code, text, found, results = doctor(
        "--backend=cpu", "--num_cpu_devices=4", f"--only={names}", f"--html={page}"
    )
    assert code == 0, text
    assert (found["platform"], found["device_kind"], found["verdict"]) == ("cpu", "cpu", "ready")
    assert found["repairs"] == []
    assert found["compiler_options"] == {"values": {}, "refused": {}}
    assert [row["attention"] for row in found["attention"]] == ["blocked"] * 2
    assert "attention: blocked in bfloat16, float32: the first choice on cpu; split" in text
    assert "compiler options: none of ours" in text
    assert {status for status, _ in results.values()} == {"pass"}
    assert set(results) == {"start", "program", *names.split(",")}
    assert all(set(p) == {"name", "status", "message", "time_s"} for p in found["probes"])
    html = page.read_text()
    assert "cross_entropy" in html
    assert f"jaxlib {importlib.metadata.version('jaxlib')}" in html
    assert "<script" not in html
    assert not (tmp_path / "llamajax").exists()  # a part of a verdict is not kept


@pytest.mark.parametrize(
    "flag", ["--plugin=x.so", "--timeout_s=0", "--html=/not/there/x", "--only=ropes"]
)
def test_a_mistake_is_exit_code_2(doctor, flag):
    code, text, found, _ = doctor(flag)
    assert (code, found) == (2, None), text
    assert "Traceback" not in text
    assert flag.partition("=")[0] in text


def test_several_faults_at_once(doctor, npu):
    code, text, found, results = doctor(
        "--backend=npu", f"--plugin={npu}",
        "--options=memory_stats=false,wrong_matmul=bfloat16,refuse=sort,crash=tanh",
        "--only=memory_stats,matmul_float32,matmul_bfloat16,sampling,scan,donation,"
        "donation_by_name",
    )  # fmt: skip
    assert (code, found["verdict"], found["repairs"]) == (1, "not ready", ["donation"]), text
    assert results["memory_stats"] == ("unsupported", "the backend does not report its memory")
    assert results["matmul_float32"][0] == "pass"
    assert "times what products of bfloat16" in results["matmul_bfloat16"][1]
    assert "operation sort is not supported" in results["sampling"][1]
    assert "ended by SIGABRT" in results["scan"][1]
    assert results["donation"] == ("unsupported", "JAX does not donate on platform npu")
    assert "of the state" not in text


@pytest.mark.slow  # 5 s each on an idle machine
@pytest.mark.parametrize(
    ("options", "probe", "status", "said", "ready"),
    [
        ("float64=false", "float64", "unsupported", "float64 is not supported", True),
        ("asynchronous=false", "asynchronous_dispatch", "unsupported", "returned after", True),
        ("memory_gib=0.2", "out_of_memory", "pass", "RESOURCE_EXHAUSTED", True),
        ("donation=ignore", "donation_by_name", "fail", "ignores donation", True),
        ("donation=refuse", "donation_by_name", "unsupported", "donated arguments", True),
        ("newest_program=1.0.0", "program", "fail", "newest supported is 1.0.0", False),
        ("wrong_matmul=float32", "matmul_float32", "fail", "products of float32", False),
        ("refuse=scatter", "indexing", "unsupported", "scatter is not supported", False),
        ("refuse=scatter", "embedding", "unsupported", "scatter is not supported", False),
        ("wrong=all_reduce", "all_reduce", "fail", "wrong over fsdp", False),
        ("wrong=all_gather", "all_gather", "fail", "wrong over fsdp", False),
        ("wrong=reduce_scatter", "reduce_scatter", "fail", "wrong over fsdp", False),
        ("wrong=all_to_all", "all_to_all", "fail", "wrong over fsdp", False),
        ("wrong=collective_permute", "permute", "fail", "wrong over fsdp", False),
        ("wrong=sort", "sampling", "fail", "sort of", True),
        ("hang=scatter", "embedding", "fail", "did not come back within 9 s, at", False),
        ("crash=scatter", "embedding", "fail", "ended by SIGABRT, at", False),
        ("fail_after=500", "endurance", "fail", "NPU error 507035", False),
        ("hang_after=500", "endurance", "fail", "did not come back", False),
        ("crash_after=500", "endurance", "fail", "SIGABRT", False),
    ],
)
def test_a_fault_is_found_and_named(doctor, npu, options, probe, status, said, ready):
    only = f"{probe},donation,rope" if probe.startswith("donation") else f"{probe},rope"
    code, text, _, results = doctor(
        "--backend=npu", f"--plugin={npu}", f"--options=num_devices=2,{options}",
        f"--only={only}", "--timeout_s=9",
    )  # fmt: skip
    assert results[probe][0] == status, text
    assert said in results[probe][1], text
    assert (code == 0) == ready, text
    if probe != "program":
        assert results["rope"][0] == "pass", text


@pytest.mark.slow  # a minute and a half
def test_a_plain_cpu_is_ready(doctor):
    code, text, found, results = doctor("--backend=cpu", "--num_cpu_devices=1")
    assert (code, found["verdict"], found["repairs"]) == (0, "ready", []), text
    assert "fail" not in {status for status, _ in results.values()}, text


@pytest.mark.slow
def test_the_test_npu_is_ready_with_repairs_that_runs_then_make(doctor, npu, tmp_path, monkeypatch):
    code, text, found, results = doctor(
        "--backend=npu", f"--plugin={npu}", "--options=num_devices=8,memory_gib=2.0"
    )
    assert (code, found["verdict"]) == (0, "ready with repairs"), text
    assert found["repairs"] == ["donation", "compile_cache"]
    assert "100% of the state aliased" in results["train_float32"][1]
    assert "; plugin built for jax 0.11.2 (StableHLO 1.20, " in results["start"][1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_verdict(SimpleNamespace(**found)).repairs == ("donation", "compile_cache")
