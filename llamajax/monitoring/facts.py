"""`run.json`: what the loop knows about a run that stands neither in its config nor its metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FACTS = "run.json"


def write_run_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Atomically merge `facts` into `workdir/run.json`; may be called again as more is known.

    Keys, all optional, null where unknown:
      status               "running", "finished" or "stopped"
      platform             JAX platform, e.g. "cpu"
      device_kind          e.g. "NVIDIA H200"
      num_devices, num_processes
      profile              what is known and was decided of the machine: backends.machine_profile
      mesh                 {axis: size}
      workdir_locked       whether a second run is kept out; false where the file system cannot
      lost_features        {feature: reason}: private parts of JAX or Orbax that have changed
      untested_versions    installed releases that the tests did not run with, ["jax 0.13.0"]
      versions             {"llamajax": ..., "jax": ..., "python": ...}
      num_parameters       integer
      peak_flops, peak_source   FLOP/s of one device, and who says so
      unigram_entropy      nats a token of the corpus: the loss of knowing frequencies only
      initial_eval_loss    held-out loss before the first update
      time_breakdown       `StepTimer.breakdown()`: wall_s, steps_s, compile_s, ..., goodput
      tokens_per_s         mean over the steps of this process
      program_bytes        memory of one device that the compiled step asks for
      donated_bytes, reused_bytes   of the state on one device, given to the step, and used again
      peak_memory_bytes    most that one device has used
      samples              [{"prompt": ..., "text": ...}, ...] generated at the end

    Raises OSError where the disk refuses.
    """
    path = Path(workdir) / RUN_FACTS
    merged = read_run_facts(workdir) | dict(facts)
    temporary = path.with_name(f"{RUN_FACTS}.tmp")
    temporary.write_text(json.dumps(merged, indent=1), encoding="utf-8")
    temporary.replace(path)


def read_run_facts(workdir: Path) -> dict[str, Any]:
    """The facts of a run; empty where there are none or the file is not readable as such."""
    try:
        facts = json.loads((Path(workdir) / RUN_FACTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
