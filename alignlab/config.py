"""The shape of a configuration: one dataclass a config group.  Closed: a key that is not here does not exist.

A component gets its own section, never the root.  An objective's section is its own ``Config`` dataclass (in its
file), chosen by the registry.  The string under a field is its documentation; reference pages are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """What to train."""

    name_or_path: str = "???"
    """A folder or a Hugging Face name; ``tiny`` and ``smollm2`` are made or converted locally."""
    revision: str | None = None
    """Commit of a hub model."""
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer comes from when it is not the model's own."""
    chat_template: str | None = None
    """A template's path, or its text; default: the tokenizer's."""
    dtype: str = "auto"
    """auto (fp32 on a CPU, bf16 with fp32 master weights on a GPU) | fp32 | bf16 | fp64 (engine=local only)."""
    attn_implementation: str = "sdpa"
    """Attention kernel of the layout ``rows``; the packed layouts bring their own."""
    layout: str = "auto"
    """auto | tree (shared prefixes once) | packed (no padding) | rows (padded). Proved exact before it is used."""
    use_liger_kernel: bool = False
    """Liger's Triton kernels for norms, gated MLPs and rotary positions (GPU; extra ``liger``; a speed key)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask."""
    head_init_std: float | None = None
    """Deviation of a reward model's new head; default 1 / sqrt(hidden size + 1). Small: all rewards start near zero."""


@dataclass
class SourceConfig:
    """One source of a mixture."""

    path: str = "???"
    weight: float = 1.0
    """How often its rows are seen, relative to once: 0.5 takes a seeded half, 2.0 takes every row twice."""
    split: str = "train"
    """Split of a hub data set."""
    format: str = "auto"
    absolute: bool = False
    """Eurus objective: the absolute terms apply to this source's pairs."""
    columns: dict[str, str] = field(default_factory=dict)
    group_by: str | None = None
    rating: list[str] = field(default_factory=list)


@dataclass
class ConditionConfig:
    """How scored completions become conditioned rows (CPO, arXiv 2402.19085, section 2; papers' buckets)."""

    dimensions: list[str] = field(default_factory=list)
    """Which ratings can be conditions, in the order they are written; empty: every dimension the rows have."""
    levels: dict[str, list[float]] = field(default_factory=dict)
    """``{dimension: [1, 2, 3, 4, 5]}``: ratings are taken as the nearest of these; one beyond them is an error."""
    weights: dict[str, float] = field(default_factory=dict)
    """omega_i of the preference value R, 1 where not named."""
    buckets: list[dict[str, Any]] = field(default_factory=list)
    """Each ``{condition: {dimension: level | any}, max_count: n}``; empty: one condition drawn for every row."""
    position: str = "user"
    """Where the condition is written: before the last user turn (user) or in the system turn (system)."""
    value: str = "correct"
    """correct: R = sum_i omega_i g_i, g_i = -|P_i - c_i| if i is controlled, else P_i; released: the code's form."""
    drop: float = 0.0
    """Share of rows whose condition is left out, so that the model can also be used without one."""
    seed: int = 0


@dataclass
class DataConfig:
    """What to train on, and how a row becomes tokens."""

    path: str | None = None
    """A .jsonl(.gz), .json or .parquet file, a folder, a hub data set, or ``sums`` (the built-in world)."""
    eval_path: str | None = None
    """Held-out rows of the same kind."""
    eval_fraction: float = 0.0
    """Without ``eval_path``: share of the rows held out, chosen by a hash of the prompt."""
    split: str = "train"
    eval_split: str = "test"
    format: str = "auto"
    """auto (from the columns) or a format's name."""
    columns: dict[str, str] = field(default_factory=dict)
    """``{our name: the file's name}``, e.g. ``{prompt: question, completion: answer}``."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture instead of ``path``."""
    absolute: bool = False
    """Eurus objective: the absolute terms apply to these pairs."""
    group_by: str | None = None
    """A column: rows with equal values of it are one row, for formats that read such (UltraInteract's trees)."""
    rating: list[str] = field(default_factory=list)
    """Ratings whose mean orders completions, e.g. ``[helpfulness]``; empty: all aspects, ``overall`` without any."""
    max_length: str = "auto"
    """Longest sequence in tokens: auto (the model's positions) or a number."""
    overlong: str = "drop"
    """drop | cut (the end of the completion) | error."""
    history_reasoning: str = "keep"
    """keep: one path for all turns, with the reasoning the template keeps; drop: one path for each target turn."""
    merge_prompts: str = "false"
    """true: rows of one step with equal prompts share it (a speed key). global: they come together in every epoch, and
    so into the same step, which changes the order (a key of the numbers)."""
    max_reject_fraction: float = 0.0
    """Share of rows that may be unreadable or of the wrong schema; above it the run stops at the first."""
    leaks: str = "error"
    """Examples to train on that are held out too: error | drop (they do not train) | keep (they do, counted)."""
    limit: int | None = None
    """Use only the first rows."""
    num_proc: int | None = None
    """Processes that turn rows into tokens; default: one a core, and one alone for small inputs (a speed key)."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """For built-in sources: e.g. ``{rows: 2000, seed: 0}`` of the world ``sums``."""


@dataclass
class OptimConfig:
    """The optimizer and its learning rate, a function of the step."""

    name: str = "adamw"
    """adamw | rmsprop | adamw_8bit"""
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    alpha: float = 0.99
    """rmsprop's decay of the squared gradient."""
    lr_scheduler_type: str = "cosine"
    """cosine | linear | constant"""
    warmup_ratio: float = 0.1
    warmup_steps: int | None = None
    """Overrides ``warmup_ratio``."""
    max_grad_norm: float = 1.0
    """0 switches clipping off."""


@dataclass
class EngineConfig:
    """Who holds parameters, gradients and optimizer state."""

    name: str = "auto"
    """auto | local (plain torch, one process) | zero0 .. zero3 (DeepSpeed)"""
    offload_optimizer: bool = False
    """Optimizer state in host memory (zero1 .. zero3)."""
    timeout: float = 600.0
    """Seconds before a collective counts as hung."""


@dataclass
class PeftConfig:
    """Train a low-rank adapter instead of all weights."""

    name: str = "none"
    """none | lora | qlora"""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str = "all-linear"
    """``all-linear`` or names joined by commas."""


@dataclass
class TrainConfig:
    """How long, how much at once, what is kept."""

    global_batch_size: int = 32
    """Examples in one optimizer step, over all ranks and micro-batches; a pair is one example."""
    per_device_train_batch_size: int | None = None
    """At most so many examples in a micro-batch (a speed key)."""
    token_budget: int | None = None
    """At most so many tokens in a micro-batch (a speed key); a longer row makes a micro-batch of its own."""
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    """Overrides ``num_train_epochs``."""
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    """Compile the model's layers with torch.compile (a speed key; not with engine=zero3)."""
    eval_steps: int | None = None
    """Evaluate every so many steps; before the first and after the last step always."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps; after the last step always."""
    save_total_limit: int | None = 3
    export_steps: int | None = None
    logging_steps: int = 1
    nonfinite: str = "stop"
    """stop | skip: what a loss or gradient that is not finite does."""


@dataclass
class EvalConfig:
    """Held-out loss, and what a verifier says of generated text."""

    batch_size: int = 16
    limit: int | None = None
    generate: int = 0
    """So many held-out prompts are answered (greedy) and given to the verifier."""
    max_new_tokens: int = 256
    verifier: str | None = None
    """A verifier's name; default: the one each row names."""
    shadow: list[str] = field(default_factory=list)
    """Objectives, or loss types of dpo, that do not train and are measured at every evaluation: ``[sft,dpo,simpo]``."""
    shadow_options: dict[str, Any] = field(default_factory=dict)
    """Options of theirs, e.g. ``{dpo: {beta: 0.5}}``; what is not named keeps its default, whatever is trained."""
    probe_path: str | None = None
    """The pairs that ``shadow`` is measured on, recognised from their columns; default: the held-out rows."""
    prompt: str | None = None
    """``sample``: answer this instead of the rows' prompts."""
    temperature: float = 0.0
    """``sample``: 0 is greedy."""
    top_p: float = 1.0
    num_samples: int = 1
    """``sample``: answers to each prompt."""
    backend: str = "hf"
    """``sample``, ``evaluate judge=``: hf (Hugging Face generate) | vllm (extra ``vllm``)"""


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl and the console."""

    names: list[str] = field(default_factory=lambda: ["jsonl"])
    project: str = "alignlab"


@dataclass
class LaunchConfig:
    """How the workers are started."""

    name: str = "auto"
    """auto | inline | torchrun | slurm | sbatch"""
    nproc: str = "auto"
    nnodes: int = 1
    dry_run: bool = False
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    extra: list[str] = field(default_factory=list)
    """More ``#SBATCH`` lines, without the prefix."""


@dataclass
class ReferenceConfig:
    """The frozen policy that preference objectives are measured against."""

    name_or_path: str | None = None
    """Default: the policy as loaded."""
    compute: bool = False
    """``prepare`` computes its numbers too (short form: ``reference=true``)."""


@dataclass
class RunConfig:
    name: str | None = None
    """Default: objective-model-data-<hash of every key that can change numbers>."""


@dataclass
class DebugConfig:
    name: str = "none"


@dataclass
class RootConfig:
    """Everything; only the command line, the launcher and the worker see this."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    run: RunConfig = field(default_factory=RunConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    seed: int = 0
    output_dir: str = "runs"
    resume: str = "auto"
    """auto | never | a checkpoint's path"""
    resume_allow: list[str] = field(default_factory=list)
    """Keys in which the run that a checkpoint comes from may differ from this one, e.g. ``[optim.learning_rate]``."""
    overwrite: bool = False
    plugins: list[str] = field(default_factory=list)
