"""The configuration of a run as frozen dataclasses: every key, its type, unit, range and meaning.

A key is declared only here, or in the `*_schema.py` of its section. A key without a default must be
set by the config file: no number that changes the loss has one. `check.py` has the constraints
between several keys.
"""

import dataclasses
from typing import Literal

from llamajax.config import forms
from llamajax.config.data_schema import SEED_LIMIT, DataConfig
from llamajax.config.model_schema import LORA_TARGETS, ModelConfig
from llamajax.config.monitoring_schema import MonitoringConfig
from llamajax.config.optim_schema import OptimConfig
from llamajax.config.values import key

ComputeDtype = Literal["bfloat16", "float32"]
TrainDtype = Literal["bfloat16", "float32", "float8"]
Remat = Literal["none", "full", "dots", "save_attention", "save_qkv"]
# Tensors of a block that train.remat_keep and train.remat_offload can name.
REMAT_NAMES = ("block_input", "qkv", "attention", "mlp_input", "gate", "up")
AttentionImpl = Literal["auto", "xla", "blocked", "split", "cudnn", "splash", "module:function"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; one may be -1: all remaining devices."""

    data: int = key("replicas that see different samples and hold the same weights", default=1)
    fsdp: int = key(
        "shards of parameters, gradients and optimizer state; also splits the batch", default=1
    )
    sequence: int = key(
        "shards of each sample (context parallelism), for long ones; weights are replicated",
        default=1,
    )
    tensor: int = key(
        "shards of heads, feed-forward and vocabulary; keep it inside a node", default=1
    )
    stage: int = key(
        "pipeline stages, each with a part of the layers; needs the least communication, so it may "
        "cross nodes",
        default=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the step computes, and how long it runs."""

    steps: int = key("optimizer steps of the whole run", at_least=1)
    seed: int = key(
        "seed of initial weights, of adapters and of their dropout", at_least=0, below=SEED_LIMIT
    )
    dtype: TrainDtype = key(
        "dtype of the matrix products; weights, moments, norms, softmax and loss stay fp32. "
        "float8: of the layers' matrices, the rest in bfloat16 (docs/float8.md)"
    )
    float8_targets: tuple[str, ...] = key(
        f"float8: matrices that are multiplied in 8 bits, among {','.join(LORA_TARGETS)}",
        default=tuple(LORA_TARGETS),
        check=forms.among(LORA_TARGETS),
    )
    float8_gradients: Literal["e5m2", "e4m3", "bfloat16"] = key(
        "float8: format of the gradients in both backward products", default="e5m2"
    )
    float8_scaling: Literal["tensor", "row"] = key(
        "float8: one scale for each operand, or for each of its rows; row is slower and gathers "
        "weights in bfloat16",
        default="tensor",
    )
    name: str | None = key(
        "name of the run in titles and logs; none: that of its --workdir", default=None
    )
    init_from: str | None = key(
        "weights to start from: a Hugging Face directory, a --workdir or one of its checkpoints; "
        "none: random weights",
        default=None,
        is_path=True,
        check=forms.not_empty("name a directory of weights, or set it to none"),
    )
    base_model: str | None = key(
        "name on the Hugging Face hub of what init_from holds, ORGANIZATION/NAME, for model cards "
        "and peft/; none: that of a snapshot in its cache, else unknown",
        default=None,
    )
    fork: str | None = key(
        "RUN@STEP: go on from a checkpoint of another --workdir, with its weights, moments, steps "
        "and place in the data, and this config; none: a run of its own",
        default=None,
        is_path=True,
        check=forms.parse_fork,
    )
    resume_step: int | None = key(
        "step of an older checkpoint to resume; later ones are set aside. It applies once: the "
        "same command again continues from the newest. none: the newest",
        default=None,
        at_least=1,
    )
    restart: bool = key(
        "whether to start over in a used --workdir; old rows and checkpoints are set aside. It "
        "applies once: the same command again continues",
        default=False,
    )
    accumulation_steps: int = key(
        "microbatches per step; the loss is that of the whole batch", default=1, at_least=1
    )
    microbatch_size: int = key(
        "pipeline: samples that a device computes at a time; a small number means less idle time, "
        "a large one faster matrix products",
        default=1,
        at_least=1,
    )
    pipeline_rounds: int = key(
        "pipeline: groups of layers per stage (interleaved schedule); more of them mean less idle "
        "time and more communication",
        default=1,
        at_least=1,
    )
    remat_stage: bool = key(
        "pipeline: whether a stage keeps only its input, at the cost of one more forward pass",
        default=True,
    )
    remat: Remat = key(
        "what a block keeps for the backward pass; changes memory and speed only", default="full"
    )
    remat_keep: tuple[str, ...] = key(
        f"further tensors of a block to keep, among {','.join(REMAT_NAMES)}",
        default=(),
        check=forms.among(REMAT_NAMES),
    )
    remat_offload: tuple[str, ...] = key(
        "such tensors to keep in host memory; for accelerators with a fast link to it",
        default=(),
        check=forms.among(REMAT_NAMES),
    )
    attention: AttentionImpl = key(
        "attention; auto: the best here; module:function: your own kernel", default="auto"
    )
    loss_chunk_tokens: int | None = key(
        "tokens whose logits are in the memory of a device at a time; none: 512, on a GPU as many "
        "as make 0.5 GiB of logits, up to 4096",
        default=None,
        at_least=1,
    )
    z_loss: float = key(
        "weight of the squared log-partition; logged as z_loss, never part of loss",
        default=0.0,
        at_least=0,
    )
    log_every: int = key("steps between rows of metrics", default=1, at_least=1)
    eval_every: int = key(
        "steps between evaluations on the validation split; 0: only at the end",
        default=0,
        at_least=0,
    )
    eval_batches: int | None = key(
        "batches of each validation set per evaluation; none: all", default=None, at_least=1
    )
    tasks: tuple[str, ...] = key(
        "multiple choice at each evaluation: files of JSON lines, as evaluate --tasks reads them; "
        "inputs are cut to data.seq_len",
        default=(),
        is_path=True,
    )
    sample_prompts: tuple[str, ...] = key(
        "texts that are continued at each evaluation, in samples.jsonl; one with a comma as JSON, "
        """'["Well, ", "So"]'""",
        default=(),
    )
    sample_tokens: int = key("most new tokens of a sample", default=64, at_least=1)
    sample_temperature: float = key(
        "of the samples; 0: the most probable token",
        default=0.0,
        at_least=0,
        check=forms.check_temperature,
    )

    @property
    def activation_dtype(self) -> ComputeDtype:
        """The dtype of activations, and of all products that are not in 8 bits."""
        return "bfloat16" if self.dtype == "float8" else self.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2021); needs train.init_from."""

    rank: int = key("rank of the adapters; 0: train all weights", default=0, at_least=0)
    alpha: float = key("adapters are scaled by alpha / rank", default=16.0, above=0)
    dropout: float = key(
        "probability that an input of an adapter is dropped", default=0.0, at_least=0, below=1
    )
    # All: at equal numbers of weights, a lower rank for every matrix gives better results than a
    # higher one for query and value alone (Dettmers et al. 2023, arXiv:2305.14314, section 4).
    targets: tuple[str, ...] = key(
        f"matrices with an adapter, among {','.join(LORA_TARGETS)}",
        default=tuple(LORA_TARGETS),
        check=forms.among(LORA_TARGETS),
    )
    base_dtype: ComputeDtype = key(
        "dtype of the frozen matrices; norms stay fp32", default="float32"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when an update looks wrong, or none is finished (docs/guards.md)."""

    nonfinite: Literal["skip", "stop", "off"] = key(
        "what to do with an update whose loss or gradient is not finite; off: apply it",
        default="skip",
    )
    # Off by default: which loss is too large depends on the data, and skipping changes the loss.
    spike_factor: float | None = key(
        "also skip updates whose loss or gradient norm is so many deviations above the median of "
        "the last applied ones; 10 is mild, 5 strict; none: never",
        default=None,
        above=0,
    )
    spike_window: int = key(
        "number of applied updates in that median; before, no spike is detected",
        default=128,
        at_least=8,
    )
    max_in_a_row: int | None = key(
        "skipped updates in a row after which `then` happens; none: never", default=8, at_least=1
    )
    then: Literal["rollback", "stop"] = key(
        "go back to the last checkpoint before them and leave out their data, or end the run",
        default="rollback",
    )
    max_rollbacks: int = key(
        "how often to go back to the same checkpoint before the run ends", default=3, at_least=0
    )
    hang_timeout_s: int | None = key(
        "seconds without a finished step or evaluation batch; then all stacks are written and the "
        "process ends; none: never",
        default=1800,
        at_least=1,
    )
    canary_every: int | None = key(
        "steps between checks that all replicas compute and hold the same bits; none: never",
        default=None,
        at_least=1,
    )
    blackbox_steps: int = key(
        "steps kept for blackbox/, written when something goes wrong", default=64, at_least=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and where the state is saved, and which checkpoints are kept."""

    directory: str | None = key(
        "where checkpoints are kept: a path shared by all processes, or gs:// or s3:// and "
        "BUCKET/FOLDER; none: WORKDIR/checkpoints",
        default=None,
        is_path=True,
        check=forms.check_store,
    )
    every_steps: int | None = key(
        "steps between checkpoints; none: by minutes and at the end", default=None, at_least=1
    )
    every_minutes: float | None = key(
        "minutes between checkpoints; none: by steps and at the end", default=15.0, above=0
    )
    keep: int = key("newest checkpoints to keep", default=3, at_least=1)
    keep_every: int | None = key(
        "also keep every checkpoint whose step is a multiple of this", default=None, at_least=1
    )
    asynchronous: bool = key("whether saving overlaps training", default=True)
    export_hf_every: int | None = key(
        "steps between exports in Hugging Face's format to hf/STEP, also at the end; none: never",
        default=None,
        at_least=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Which platform, devices and processes run it."""

    name: str | None = key(
        "JAX platform: cpu, cuda, tpu, or a plugin's; none: what JAX finds",
        default=None,
        check=forms.not_empty("name a platform, or set it to none"),
    )
    plugin: str | None = key(
        "path of a bare PJRT library that serves that platform", default=None, is_path=True
    )
    options: str | None = key(
        "options of that plugin, as k=v,k=v", default=None, is_path=True, check=forms.check_options
    )
    num_cpu_devices: int | None = key(
        "virtual devices of the cpu backend, to try a mesh without one", default=None, at_least=1
    )
    coordinator_address: str | None = key(
        "HOST:PORT of process 0, for all nodes", default=None, check=forms.parse_address
    )
    num_processes: int | None = key("number of processes of the run", default=None, at_least=1)
    process_id: int | None = key("rank of this process, from 0", default=None, at_least=0)
    timeout_s: int = key("seconds to wait for the other processes", default=300, at_least=1)
    device_table: str | None = key(
        "TOML file with entries for devices that llamajax does not know", default=None, is_path=True
    )
    repairs: str = key(
        "auto: what `doctor` found to work on a new platform; none; or names of repairs",
        default="auto",
        check=forms.not_empty("write auto, none or names"),
    )
    compiler_options: str | None = key(
        "options of XLA for the step, as k=v,k=v; before XLA_FLAGS and our own; a list is a+b",
        default=None,
        check=forms.check_options,
    )
    deterministic: bool = key("whether a GPU repeats the step's bits; slower", default=False)
    compile_cache: str | None = key(
        "folder of compiled programs; auto: in the user's cache directory; none: keep none",
        default="auto",
        is_path=True,
        check=forms.not_empty("write auto or none"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    mesh: MeshConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    lora: LoraConfig
    guard: GuardConfig
    checkpoint: CheckpointConfig
    backend: BackendConfig
    monitoring: MonitoringConfig
