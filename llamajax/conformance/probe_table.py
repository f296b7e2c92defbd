"""Every probe: what it needs to be for llamajax, and what llamajax does where it does not pass.

Imports no JAX: the parent reads it. A probe's function is named `module:function`.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

from llamajax.backends import PlatformVerdict
from llamajax.backends import ProbeResult as Outcome
from llamajax.backends.stored_verdict import NOT_READY, READY, READY_WITH_REPAIRS
from llamajax.config import did_you_mean, nearest
from llamajax.errors import combine

_HERE = __name__.rpartition(".")[0]

# always: neither wrong nor missing may it be. if_there: it may be missing, and must not be wrong.
# never: the verdict does not depend on it.
Needed = Literal["always", "if_there", "never"]
NOT_TRIED = "not tried: "  # begins the message of a probe that the ones before made pointless


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One probe. why: what for; otherwise: what happens where it does not pass.

    repair: name in `backends.repairs` of what is then made up for, provided that probe `by` (if
    any) passed. With `instead_of` it is the other way round: the probe is tried where that other
    one did not pass, with the repair in force, and the repair is made where it passes. repaired:
    tried with all repairs in force. keeps_programs: with a folder for compiled programs. alone: in
    a process of its own, as it may well end it.
    """

    name: str
    group: str
    function: str
    needed: Needed
    why: str
    otherwise: str
    repair: str | None = None
    by: str | None = None
    instead_of: str | None = None
    repaired: bool = False
    keeps_programs: bool = False
    alone: bool = False


def _probes(group: str, module: str, *rows: tuple) -> list[Probe]:
    """Rows: name, needed, why, otherwise, and further fields as a dict."""
    found = []
    for name, needed, why, otherwise, *more in rows:
        fields = {"name": name, "needed": needed, "why": why, "otherwise": otherwise}
        fields |= {"group": group, "function": f"{_HERE}.{module}:{name}"}
        found.append(Probe(**fields | (more[0] if more else {})))
    return found


START = Probe(
    name="start",
    group="machine",
    function="",
    needed="always",
    why="a backend that does not come up can do nothing",
    otherwise="nothing runs on it",
)

_MACHINE = _probes(
    "machine", "machine_probes",
    ("program", "always", "compiling and running the smallest program", "nothing runs on it"),
    ("device", "never", "the facts that a report to the vendor needs", "llamajax does without"),
    ("dtypes", "always", "float32, int32, uint32 and bool are in every step",
     "nothing trains on it"),
    ("float64", "never", "llamajax never computes in it", "llamajax does without"),
    ("transfers", "always", "batches go to the device, metrics and checkpoints come back",
     "nothing trains on it"),
)  # fmt: skip

_ARITHMETIC = _probes(
    "arithmetic", "arithmetic_probes",
    ("matmul_float32", "always", "the dtype of master weights, of reductions and of parity",
     "nothing trains on it"),
    ("matmul_bfloat16", "if_there", "the dtype of training on accelerators",
     "train with train.dtype=float32 and --dtype=float32"),
    ("matmul_float16", "never", "some checkpoints are stored in it", "nothing computes in it"),
    ("matmul_float8", "never", "llamajax does not train in it yet", "llamajax does without"),
)  # fmt: skip

_OPERATIONS = _probes(
    "operations", "operation_probes",
    ("indexing", "always", "gathers, scatters, slices and choices are in every step",
     "nothing trains on it"),
    ("scan", "always", "layers and chunks are scanned, and recomputed backward",
     "nothing trains on it"),
    ("embedding", "always", "tokens are looked up, their gradients scattered and added",
     "nothing trains on it"),
    ("rms_norm", "always", "before every attention and feed-forward", "nothing trains on it"),
    ("rope", "always", "positions turn queries and keys", "nothing trains on it"),
    ("feed_forward", "always", "two thirds of a model's weights", "nothing trains on it"),
    ("attention", "always", "plain attention over packed documents", "nothing trains on it"),
    ("attention_kernel", "never", "the fastest attention that the platform has",
     "plain attention takes its place", {"repair": "plain_attention", "by": "attention"}),
    ("cross_entropy", "always", "the loss and its gradient, in chunks", "nothing trains on it"),
    ("adamw", "always", "the update of every weight", "nothing trains on it"),
    ("sampling", "never", "sorting and cumulative sums choose generated tokens",
     "generate with --temperature=0"),
)  # fmt: skip

_MEMORY = _probes(
    "memory", "machine_probes",
    ("memory_stats", "never", "knowing how much memory there is and was used",
     "reports do not show memory in use; name the size in a backend.device_table"),
    ("out_of_memory", "never", "a model that is too large should be an error, not a crash",
     "trust `plan`, and leave room"),
    ("donation", "never", "weights and optimizer are updated where they lie",
     "a step takes their memory twice; `plan` counts it"),
    ("donation_by_name", "never", "the same where JAX does not know the platform",
     "a step takes the memory of weights and optimizer twice; `plan` counts it",
     {"function": f"{_HERE}.machine_probes:donation", "instead_of": "donation",
      "repair": "donation"}),
    ("host_offload", "never", "the optimizer's moments may rest in the host's memory",
     "leave optim.offload and train.remat_offload off"),
)  # fmt: skip

_RANDOM = _probes(
    "random numbers", "arithmetic_probes",
    ("random_bits", "always", "the same seed gives the same weights and data on every platform",
     "a run would start from other weights than elsewhere"),
    ("random_sharded", "if_there", "the same seed gives the same weights on every mesh",
     "a run would start from other weights on another mesh"),
)  # fmt: skip

_COLLECTIVES = _probes(
    "collectives", "collective_probes",
    ("all_reduce", "if_there", "sums gradients over `data`, partial products over `tensor`",
     "use one device"),
    ("all_gather", "if_there", "brings weights together over `fsdp`", "use one device"),
    ("reduce_scatter", "if_there", "sums gradients into shards over `fsdp`", "use one device"),
    ("all_to_all", "if_there", "exchanges embeddings over `fsdp`", "leave mesh.fsdp at 1"),
    ("permute", "if_there", "passes activations to the next pipeline stage",
     "leave mesh.stage at 1"),
)  # fmt: skip

_EXECUTION = _probes(
    "execution", "execution_probes",
    ("asynchronous_dispatch", "never", "hides the host's work behind the device's",
     "steps wait for the host; choose larger batches"),
    ("endurance", "always", "a run executes millions of programs",
     "the run would end; launch with --max_restarts and save often"),
    ("compile_cache", "never", "the second start of a run does not compile",
     "every start compiles anew", {"keeps_programs": True}),
    ("compile_cache_by_name", "never", "the same where JAX does not know the platform",
     "every start compiles anew",
     {"function": f"{_HERE}.execution_probes:compile_cache", "instead_of": "compile_cache",
      "repair": "compile_cache", "keeps_programs": True}),
    ("profiler", "never", "shows where a step's time goes", "no profiles"),
    ("callbacks", "never", "Python functions called by a program; training calls none",
     "llamajax does without"),
    ("debug_print", "never", "jax.debug.print; training prints nothing so",
     "llamajax does without"),
    ("pallas", "never", "hand-written kernels", "plain operations take their place"),
    ("topology", "never", "`plan` compiles for devices that are not here",
     "`plan` needs the device itself"),
)  # fmt: skip

_TRAINING = _probes(
    "training", "training_probes",
    ("train_float32", "always", "twenty steps whose losses are known", "nothing trains on it",
     {"repaired": True}),
    ("train_bfloat16", "if_there", "the same in the dtype of accelerators",
     "train with train.dtype=float32", {"repaired": True}),
    ("reproducible", "never", "the same steps twice, bit for bit",
     "a resumed run follows the undisturbed one within rounding only",
     {"repaired": True}),
    ("checkpoint_synchronous", "always", "what is saved is what comes back",
     "nothing can be resumed", {"repaired": True}),
    ("checkpoint_asynchronous", "never", "saves while training goes on",
     "a checkpoint is on disk before the next step",
     {"repair": "synchronous_checkpoints", "by": "checkpoint_synchronous", "repaired": True}),
)  # fmt: skip

PROBES = (
    *_MACHINE, *_ARITHMETIC, *_OPERATIONS, *_RANDOM, *_MEMORY, *_COLLECTIVES, *_EXECUTION,
    *_TRAINING,
)  # fmt: skip


def probe(name: str) -> Probe:
    """The probe of this name."""
    return next(p for p in (START, *PROBES) if p.name == name)


def chosen(names: str | None) -> list[Probe]:
    """The probes of a list with commas, in their order; all where it is None.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """`word` is one of the three of a verdict.

    repairs: names in `backends.repairs` of what llamajax makes up for on this backend.
    """

    word: str
    repairs: tuple[str, ...]


def judge(outcomes: Sequence[Outcome]) -> Judgement:
    """The judgement on a backend whose probes came out like this, so far."""
    passed = {o.name for o in outcomes if o.status == "pass"}
    blocked = any(blocks(probe(o.name), o) for o in outcomes)
    repairs = tuple(
        asked.repair for o in outcomes if makes_repair(asked := probe(o.name), o, passed=passed)
    )
    word = NOT_READY if blocked else READY_WITH_REPAIRS if repairs else READY
    return Judgement(word=word, repairs=repairs)


def blocks(asked: Probe, outcome: Outcome) -> bool:
    """Whether this outcome alone makes a backend not ready."""
    if asked.needed == "always":
        return outcome.status != "pass"
    return asked.needed == "if_there" and outcome.status == "fail"


def makes_repair(asked: Probe, outcome: Outcome, *, passed: set[str]) -> bool:
    """Whether this outcome says that a repair is to be made, one that was seen to work."""
    if asked.repair is None:
        return False
    if asked.instead_of is not None:
        return outcome.status == "pass"
    return outcome.status != "pass" and (asked.by is None or asked.by in passed)


def consequence(outcome: Outcome, *, passed: set[str]) -> tuple[int, str]:
    """What follows from an outcome that is no pass, after how much it matters: 0 is the most."""
    asked = probe(outcome.name)
    if blocks(asked, outcome):
        return 0, f"not ready: {asked.why}; {asked.otherwise}"
    if makes_repair(asked, outcome, passed=passed):
        return 1, f"repaired: {asked.otherwise}"
    instead = [p for p in PROBES if p.instead_of == outcome.name and p.name in passed]
    if instead:
        return 1, f"repaired: {instead[0].repair}, see {instead[0].name}"
    return 2, asked.otherwise


def verdict_on(
    machine: dict[str, Any] | None, outcomes: Sequence[Outcome], *, asked_for: str | None
) -> PlatformVerdict:
    """What is kept of an examination. machine: facts of `backends.Machine`; None: it did not start.

    asked_for: the platform's name in the command, if any.
    """
    judgement = judge(outcomes)
    facts = machine or {"platform": asked_for or "unknown", "device_kind": "unknown"}
    return PlatformVerdict(
        platform=facts["platform"],
        platform_version=facts.get("platform_version", ""),
        device_kind=facts["device_kind"],
        jax=importlib.metadata.version("jax"),
        verdict=judgement.word,
        repairs=judgement.repairs,
        probes=tuple(outcomes),
    )
