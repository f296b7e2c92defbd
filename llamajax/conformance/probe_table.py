"""Every probe of the doctor, and what follows from their results: verdict, repairs, advice.

A probe's function is named `module:function`, and imported in the process that runs it alone.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

from llamajax.backends import PlatformVerdict, ProbeResult
from llamajax.backends.repairs import NOT_READY, READY, READY_WITH_REPAIRS
from llamajax.errors import combine, did_you_mean, nearest

NOT_TRIED = "not tried: "  # begins the message of a probe that the ones before made pointless


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One probe. why: what for; otherwise: what happens where it does not pass.

    needed: "always": it must pass; "if_there": it may be missing, and must not be wrong; "never":
    the verdict does not depend on it. repair: name in `backends.repairs` of what is applied where
    it does not pass, provided that probe `by` (if any) passed. With `instead_of` the probe is tried
    where that other one did not pass, with the repair forced, which is applied where it passes.
    keeps_programs: it gets a folder for compiled programs.
    """

    name: str
    group: str
    function: str
    needed: Literal["always", "if_there", "never"]
    why: str
    otherwise: str
    repair: str | None = None
    by: str | None = None
    instead_of: str | None = None
    keeps_programs: bool = False

    @property
    def repaired(self) -> bool:
        """Whether it runs with all repairs applied, as training does."""
        return self.group == "training"


# The probes of a group and the module of their functions. Rows: name, needed, why; otherwise where
# it is not the usual one; further fields.
_USUALLY = {"always": "nothing trains on it", "never": "llamajax does without"}
_GROUPS = {
    "machine": ("machine_probes", [
        ("program", "always", "compiling and running the smallest program", "nothing runs on it"),
        ("compiler_options", "never", "what the step of a run is compiled with"),
        ("device", "never", "the facts that a report to the vendor needs"),
        ("dtypes", "always", "float32, int32, uint32 and bool are in every step"),
        ("float64", "never", "llamajax never computes in it"),
        ("transfers", "always", "batches go to the device, metrics and checkpoints come back"),
    ]),
    "arithmetic": ("arithmetic_probes", [
        ("matmul_float32", "always", "the dtype of master weights, of reductions and of parity"),
        ("matmul_bfloat16", "if_there", "the dtype of training on accelerators",
         "train with train.dtype=float32 and --dtype=float32"),
        ("matmul_float16", "never", "some checkpoints are stored in it", "nothing computes in it"),
        ("matmul_float8", "never", "train.dtype=float8 multiplies in it",
         "train with train.dtype=bfloat16"),
    ]),
    "operations": ("operation_probes", [
        ("indexing", "always", "gathers, scatters, slices and choices are in every step"),
        ("scan", "always", "layers and chunks are scanned, and recomputed backward"),
        ("embedding", "always", "tokens are looked up, their gradients scattered and added"),
        ("rms_norm", "always", "before every attention and feed-forward"),
        ("rope", "always", "positions turn queries and keys"),
        ("feed_forward", "always", "two thirds of a model's weights"),
        ("attention", "always", "plain attention over packed documents"),
        ("attention_kernel", "never", "the fastest attention that the platform has",
         "plain attention takes its place", {"repair": "plain_attention", "by": "attention"}),
        ("cross_entropy", "always", "the loss and its gradient, in chunks"),
        ("adamw", "always", "the update of every weight"),
        ("sampling", "never", "sorting and cumulative sums choose generated tokens",
         "generate with --temperature=0"),
    ]),
    "random numbers": ("arithmetic_probes", [
        ("random_bits", "always", "the same seed gives the same weights and data on every platform",
         "a run would start from other weights than elsewhere"),
        ("random_sharded", "if_there", "the same seed gives the same weights on every mesh",
         "a run would start from other weights on another mesh"),
    ]),
    "memory": ("machine_probes", [
        ("memory_stats", "never", "knowing how much memory there is and was used",
         "reports do not show memory in use; name the size in a backend.device_table"),
        ("out_of_memory", "never", "a model that is too large should be an error, not a crash",
         "trust `plan`, and leave room"),
        ("donation", "never", "weights and optimizer are updated in their own memory",
         "a step takes their memory twice; `plan` counts it"),
        ("donation_by_name", "never", "the same where JAX does not know the platform",
         "a step takes the memory of weights and optimizer twice; `plan` counts it",
         {"function": "machine_probes:donation", "instead_of": "donation", "repair": "donation"}),
        ("host_offload", "never", "the optimizer's moments may be kept in the host's memory",
         "leave optim.offload and train.remat_offload off"),
    ]),
    "collectives": ("collective_probes", [
        ("all_reduce", "if_there", "sums gradients over `data`, partial products over `tensor`",
         "use one device"),
        ("all_gather", "if_there", "brings weights together over `fsdp`", "use one device"),
        ("reduce_scatter", "if_there", "sums gradients into shards over `fsdp`", "use one device"),
        ("all_to_all", "if_there", "exchanges embeddings over `fsdp`", "leave mesh.fsdp at 1"),
        ("permute", "if_there", "passes activations to the next pipeline stage",
         "leave mesh.stage at 1"),
    ]),
    "execution": ("execution_probes", [
        ("asynchronous_dispatch", "never", "hides the host's work behind the device's",
         "steps wait for the host; choose larger batches"),
        ("endurance", "always", "a run executes millions of programs",
         "the run would end; launch with --max_restarts and save often"),
        ("compile_cache", "never", "the second start of a run does not compile",
         "every start compiles anew", {"keeps_programs": True}),
        ("compile_cache_by_name", "never", "the same where JAX does not know the platform",
         "every start compiles anew",
         {"function": "execution_probes:compile_cache", "instead_of": "compile_cache",
          "repair": "compile_cache", "keeps_programs": True}),
        ("profiler", "never", "shows where a step's time goes", "no profiles"),
        ("topology", "never", "`plan` compiles for devices that are not here",
         "`plan` needs the device itself"),
    ]),
    "training": ("training_probes", [
        ("train_float32", "always", "twenty steps whose losses are known"),
        ("train_bfloat16", "if_there", "the same in the dtype of accelerators",
         "train with train.dtype=float32"),
        ("reproducible", "never", "the same steps twice, bit for bit",
         "a resumed run follows the undisturbed one within rounding only"),
        ("checkpoint_synchronous", "always", "a checkpoint restores the bits that were saved",
         "nothing can be resumed"),
        ("checkpoint_asynchronous", "never", "saves while training goes on",
         "a checkpoint is on disk before the next step",
         {"repair": "synchronous_checkpoints", "by": "checkpoint_synchronous"}),
    ]),
}  # fmt: skip


def _probe(group: str, module: str, row: Sequence[Any]) -> Probe:
    name, needed, why, otherwise, fields = (*row, None, None)[:5]
    named = {"name": name, "group": group, "function": f"{module}:{name}"} | (fields or {})
    named["function"] = f"{__package__}.{named['function']}"
    return Probe(**named, needed=needed, why=why, otherwise=otherwise or _USUALLY[needed])


START = Probe(
    name="start",
    group="machine",
    function="",
    needed="always",
    why="a backend that does not come up can do nothing",
    otherwise="nothing runs on it",
)
PROBES = tuple(
    _probe(group, module, row) for group, (module, rows) in _GROUPS.items() for row in rows
)


def probe(name: str) -> Probe:
    """Return the probe of this name."""
    return next(p for p in (START, *PROBES) if p.name == name)


def chosen(names: str | None) -> list[Probe]:
    """Return the probes of a list with commas, in the table's order; all where it is None.

    The smallest program is always among them. Raises UserError with every name that is none.
    """
    if names is None:
        return list(PROBES)
    wanted = [name.strip() for name in names.split(",")]
    known = [p.name for p in PROBES]
    problems = [
        f"--only: there is no probe {name!r}{did_you_mean(nearest(name, known))}"
        for name in wanted
        if name not in known
    ]
    if problems:
        raise combine(problems, title=f"the probes are {', '.join(known)}; but:")
    return [p for p in PROBES if p.name in {"program", *wanted}]


def repairs_for(results: Sequence[ProbeResult]) -> tuple[str, ...]:
    """Return the names in `backends.repairs` of what llamajax applies after these results."""
    passed = {r.name for r in results if r.status == "pass"}
    return tuple(probe(r.name).repair for r in results if _is_repaired(r, passed))


def verdict_on(
    machine: dict[str, Any] | None, results: Sequence[ProbeResult], *, asked_for: str | None
) -> PlatformVerdict:
    """Return the verdict to store. machine: facts of `backends.Machine`; None: it did not start.

    asked_for: the platform's name in the command, if any.
    """
    repairs = repairs_for(results)
    word = READY_WITH_REPAIRS if repairs else READY
    facts = machine or {"platform": asked_for or "unknown", "device_kind": "unknown"}
    return PlatformVerdict(
        platform=facts["platform"],
        platform_version=facts.get("platform_version", ""),
        device_kind=facts["device_kind"],
        jax=importlib.metadata.version("jax"),
        verdict=NOT_READY if any(map(_blocks, results)) else word,
        repairs=repairs,
        probes=tuple(results),
    )


def _blocks(result: ProbeResult) -> bool:
    """Return whether this result alone makes a backend not ready."""
    needed = probe(result.name).needed
    if needed == "always":
        return result.status != "pass"
    return needed == "if_there" and result.status == "fail"


def _is_repaired(result: ProbeResult, passed: set[str]) -> bool:
    """Return whether this result calls for a repair that was seen to work."""
    asked = probe(result.name)
    if asked.repair is None:
        return False
    if asked.instead_of is not None:
        return result.status == "pass"
    return result.status != "pass" and (asked.by is None or asked.by in passed)


def consequences(results: Sequence[ProbeResult]) -> list[tuple[ProbeResult, str]]:
    """Return every result that is no pass with what follows from it, the worst first."""
    tried = [r for r in results if not r.message.startswith(NOT_TRIED)]
    passed = {r.name for r in tried if r.status == "pass"}
    rows = [(_consequence(r, passed), r) for r in tried if r.status != "pass"]
    return [(r, text) for (_, text), r in sorted(rows, key=lambda row: row[0][0])]


def _consequence(result: ProbeResult, passed: set[str]) -> tuple[int, str]:
    """Return how much a failure matters (0 is the most), and what follows from it."""
    asked = probe(result.name)
    if _blocks(result):
        return 0, f"not ready: {asked.why}; {asked.otherwise}"
    if _is_repaired(result, passed):
        return 1, f"repaired: {asked.otherwise}"
    instead = [p for p in PROBES if p.instead_of == result.name and p.name in passed]
    if instead:
        return 1, f"repaired: {instead[0].repair}, see {instead[0].name}"
    return 2, asked.otherwise
