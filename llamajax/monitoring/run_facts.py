"""`run.json`: what is known of a run beside its config and its metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.files import write_file
from llamajax.monitoring.events import is_running
from llamajax.monitoring.jsonl import read_object
from llamajax.monitoring.run_history import SUMMARY, History

RUN_FACTS = "run.json"


def write_run_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts`, and what events and rows say, to `workdir/run.json` atomically.

    Keys, all optional, null where unknown. What the last process found:
      platform             JAX platform, e.g. "cpu"
      device_kind          e.g. "NVIDIA H200"
      num_devices, num_processes
      profile              what is known and was decided of the machine: backends.machine_profile
      mesh                 {axis: size}
      attention, attention_reason   the kernel, and why it was taken
      compiler_options     {option: value} of XLA that the step was compiled with
      program              digest of the step's program; a plan of the same run has the same
      workdir_locked       whether a second run is kept out; false where the file system cannot
      lost_features        {feature: reason}: private parts of JAX or Orbax that have changed
      untested_versions    installed releases that the tests did not run with, ["jax 0.13.0"]
      versions             {"llamajax": ..., "jax": ..., "python": ...}
      num_parameters       integer
      peak_flops, peak_source   FLOP/s of one device, and who says so
      float8_products      "in 8 bits", or "rounded only" where the device is not known to have them
      packing              how instructions become samples in the first stage that has them:
                           `packing`, examples or windows; `efficiency`, the share of the positions
                           that hold tokens; shares of what is cut. Empty without instructions
      packing_problem      why many positions of that stage are padding; null where few are
      unigram_entropy      nats a token of the corpus: the loss of knowing frequencies only
      program_bytes        memory of one device that the compiled step asks for
      donated_bytes, reused_bytes   of the state on one device, given to the step, and used again
    And those of `History.summary`. Raises OSError where the disk refuses.
    """
    merged = read_run_facts(workdir) | dict(facts)
    write_file(Path(workdir) / RUN_FACTS, json.dumps(merged, indent=1))


def write_report_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Bring `run.json` up to date with what a report computed of the run; raises OSError.

    The rest of `facts` was read before the rows, and a start may have written it anew since.
    """
    computed = {key: facts[key] for key in (*SUMMARY, "price_per_hour") if key in facts}
    path = Path(workdir) / RUN_FACTS
    write_file(path, json.dumps(read_object(path) | computed, indent=1))


def read_run_facts(workdir: Path) -> dict[str, Any]:
    """Return the facts of a run as they are now; empty where nothing can be read."""
    return facts_of(History.read(Path(workdir)))


def facts_of(history: History) -> dict[str, Any]:
    """Return what `run.json` says, and what a history, read already, says now."""
    facts = read_object(history.workdir / RUN_FACTS)
    return facts | history.summary(running=is_running(history.workdir))
