"""What is known of each platform of JAX, as data, and every decision that hangs on its name.

The rest of the code asks here for properties ("does its memory belong to the host?") and never for
a name; a contract test looks for that. Kinds of devices, with peaks and memory, are in `devices`.
"""

import dataclasses
from collections.abc import Mapping

import jax

from llamajax.config.schema import ComputeDtype

LAYER_BYTES = "bytes of a layer"  # in place of a number of a compiler option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """One platform of JAX, or what is assumed of one that is not known.

    names: what JAX calls it, the first being what its devices say. may_alias_host_memory: arrays
    may share memory with NumPy's, so that donated ones must be copied first. is_host: computes on
    the host itself, where virtual devices can be had and memory of programs predicts nothing.
    is_deterministic: the same program on the same arguments gives the same bits. fused_attention:
    kernels built for it, best first. dtype: what to compute in when nobody says. start_up: what
    joins several processes. compiler_options: of a step's program, in groups of which a release of
    the compiler must know all; LAYER_BYTES stands for the size of a layer. kind_options: more such
    groups, by name in the table of devices. deterministic_options: such a group, with which a
    program repeats its bits. says_peak: a program's `memory_analysis` has the most that is in use
    at any time, its arguments included.
    host_branches: a condition may hold arrays in the host's memory (compiled 2026-11-29; XLA for
    GPUs refuses the copies in one).
    logits_bytes: room for the float32 logits of the tokens whose loss is computed at a time, where
    the config leaves their number open; None: the least number of tokens.
    one_collective_at_a_time: of a program's collectives; those of activations, which products wait
    for, then leave no products beside which weights are gathered.
    slow_link: words for what leaves a node or slice. exact_options: of the compiler, with which
    the bits of an element do not depend on the shape of its array. tested: what of llamajax ran
    there. source: who says all this.
    """

    names: tuple[str, ...]
    fused_attention: tuple[str, ...] = ()
    dtype: ComputeDtype = "bfloat16"
    may_alias_host_memory: bool = False
    is_host: bool = False
    is_deterministic: bool = False
    is_known_to_jax: bool = True
    start_up: str = "llamajax.launch, or a scheduler that JAX knows; coordinator over TCP"
    compiler_options: tuple[Mapping[str, bool | int | str], ...] = ()
    kind_options: Mapping[str, tuple[Mapping[str, bool | int | str], ...]] = dataclasses.field(
        default_factory=dict
    )
    deterministic_options: tuple[Mapping[str, bool], ...] = ()
    says_peak: bool = False
    host_branches: bool = False
    one_collective_at_a_time: bool = False
    logits_bytes: int | None = None
    slow_link: str = "between nodes"
    exact_options: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tested: str = "no"
    source: str = ""

    @property
    def attention_preferences(self) -> tuple[str, ...]:
        """Attention implementations to try, best first."""
        return (*self.fused_attention, "blocked", "split", "xla")


# Of XLA for GPUs. Its own pass for rematerialization runs products again near the memory limit,
# which the remat policies have done already (Llama2-7B on one H200, 2 rows, `dots`, jax 0.10.2:
# 4.109e14 instead of 3.248e14 FLOPs of products for the same temporary memory). Pipelining moves
# the gathering of a layer's weights before the layer, and the reduction of its gradients behind
# it, beside the products of another one; a buffer for each of two layers in turn saves copies.
# By the program of Llama2-7B for 8 H100, jax 0.12.0, a step waits 0.019 s instead of 0.105, for 0.9
# GiB. In jax 0.10.2, where the options have other names, 0.131 s instead of 0.060, for 13.4 GiB.
_PIPELINED = "COLLECTIVE_PIPELINING_MODE_ON"
_GPU_OPTIONS = (
    {"xla_disable_hlo_passes": "rematerialization"},
    {
        "xla_gpu_pipeline_all_gather": _PIPELINED,
        "xla_gpu_pipeline_reduce_scatter": _PIPELINED,
        "xla_gpu_pipeline_all_reduce": _PIPELINED,
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": LAYER_BYTES,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": LAYER_BYTES,
        "xla_gpu_all_reduce_combine_threshold_bytes": LAYER_BYTES,
    },
)

# By programs that libtpu 0.0.50 compiled (2026-11-30): left to itself it runs the collectives of a
# v5p or v6e between products. Given to the SparseCores, which compute nothing else here, they run
# beside them: 64 of 72 in 8 feed-forward layers on v5p:2x2x2, for 0.7 GiB. The five options of
# "asynchronous collective fusion" in older recipes end a compilation on all but the v5e. There they
# change nothing: gathers are in such fusions anyway, and scattered sums stay between products. The
# options for sums over `data` and for the layout of scattered sums hide nothing.
_TPU_OPTIONS = ({"xla_tpu_scoped_vmem_limit_kib": 98304},)
_SPARSE_CORES = tuple(
    {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True}
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
)

# An unknown platform is taken for a plugin of an accelerator with memory of its own, of which
# nothing is sure: it may lend host memory, and it may not repeat its bits.
UNKNOWN = Platform(
    names=(),
    may_alias_host_memory=True,
    is_known_to_jax=False,
    start_up="node_id and num_nodes are passed to the plugin; checked that all came",
    source="nothing is known of it: run `python -m llamajax.doctor` there",
)
PLATFORMS = (
    Platform(
        names=("cpu",),
        dtype="float32",
        may_alias_host_memory=True,
        is_host=True,
        is_deterministic=True,
        # Else vectors and the rest of a loop may be computed by different formulas (jax 0.12.0.1
        # with AVX-512: log1p, and products fused with sums).
        exact_options={"xla_backend_optimization_level": 0},
        tested="everything, in every change",
        source="JAX's own backend",
    ),
    Platform(
        names=("gpu", "cuda"),
        fused_attention=("cudnn",),
        compiler_options=_GPU_OPTIONS,
        # without: cuDNN's backward kernel and scatters add in any order
        deterministic_options=({"xla_gpu_exclude_nondeterministic_ops": True},),
        one_collective_at_a_time=True,
        # 4,096 tokens of Llama-2's vocabulary. Each chunk reads the head and adds to its gradient,
        # 12 bytes a weight: with 512 tokens half as long as its products take on an H200.
        logits_bytes=2**29,
        tested="lowering and compilation; see LOG.md for runs on hardware",
        source="JAX's CUDA plugin",
    ),
    Platform(
        names=("tpu",),
        fused_attention=("splash",),
        compiler_options=_TPU_OPTIONS,
        kind_options=dict.fromkeys(("v5p", "v6e"), _SPARSE_CORES),
        says_peak=True,
        host_branches=True,
        slow_link="over DCN, the rest over ICI",
        tested="compilation for absent TPUs; no run on hardware",
        source="Cloud TPU documentation, libtpu",
    ),
    Platform(
        names=("rocm",),
        logits_bytes=2**29,
        source="AMD's jax-rocm7-plugin: platform `rocm`, its devices say `gpu`; read, not run",
    ),
    Platform(
        names=("sycl", "oneapi", "xpu"),
        is_known_to_jax=False,
        source="intel-extension-for-openxla 0.7.0 registers `sycl` with options allocator and "
        "visible_devices; jax 0.12 lists `oneapi`; read, not run",
    ),
    Platform(
        names=("tt",),
        is_known_to_jax=False,
        start_up="one process",
        source="tt-xla's jax_plugin_tt registers `tt`; read, not run",
    ),
    Platform(
        names=("neuron",),
        start_up="NEURON_RT_ROOT_COMM_ID, NEURON_PJRT_PROCESSES_NUM_DEVICES and "
        "NEURON_PJRT_PROCESS_INDEX in each process, set by whoever launches",
        source="AWS's libneuronxla: `neuron`, in JAX's lists of donation and cache; documentation "
        "read, not run",
    ),
    Platform(
        names=("METAL", "mps"),
        is_known_to_jax=False,
        may_alias_host_memory=True,
        dtype="float32",
        start_up="one process",
        source="jax-metal registers `METAL`; made for jax 0.4 only; not run",
    ),
)


def platform_facts(name: str) -> Platform:
    """Return what is known of a platform by its name in JAX; `UNKNOWN`, so named, of any other."""
    found = [entry for entry in PLATFORMS if name in entry.names]
    return found[0] if found else dataclasses.replace(UNKNOWN, names=(name,))


def platform_of_attention(impl: str) -> str | None:
    """Return the platform that an implementation is built for; None where it runs anywhere."""
    found = [entry for entry in PLATFORMS if impl in entry.fused_attention]
    return found[0].names[-1] if found else None


def exact_options(platform: str) -> dict[str, int]:
    """Return compiler options that give the same bits however the result is sharded.

    For what must not depend on the mesh, such as initial weights. None with jax 0.10, whose
    compiler gives them anyhow: a program made so runs more slowly.
    """
    return {} if jax.__version_info__ < (0, 11) else dict(platform_facts(platform).exact_options)
