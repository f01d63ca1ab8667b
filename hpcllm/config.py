"""The run file: a TOML file of typed sections, every key with its unit, and the checks that need several keys.

`load` reads a file and `key=value` overrides; unknown keys, wrong types and impossible combinations are a
`UsageError` that names them. Checks against the data (sequence length, samples) stand where the data is opened.
"""

import datetime
import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from . import deadline, names, run_file
from .errors import UsageError

# What says the same in another way, of which a run file has but one.
_INSTEAD = {"train.max_steps": "num_train_epochs", "train.num_train_epochs": "max_steps"}
_INSTEAD |= {"train.warmup_steps": "warmup_ratio", "train.warmup_ratio": "warmup_steps"}

# As file systems of Linux have it, with room for the names of what a run writes.
_LIMIT_NAME_BYTES, _LIMIT_PATH_BYTES = 200, 3500


def _a_path(text):
    """Control characters in a path would break lines of logs and job scripts apart."""
    if not text.strip() or any(character < " " or character == "\x7f" for character in text):
        raise ValueError("a path has no line breaks and other control characters, and is not empty")
    if (
        max(len(part.encode()) for part in text.split("/")) > _LIMIT_NAME_BYTES
        or len(text.encode()) > _LIMIT_PATH_BYTES
    ):
        raise ValueError(f"a path has at most {_LIMIT_PATH_BYTES} bytes, and each name in it {_LIMIT_NAME_BYTES}")
    return text


def _as_text(value):
    """11:30:00 without quotes is a time of day to TOML."""
    return value.isoformat() if isinstance(value, datetime.time) else value


def _a_duration(text):
    deadline.seconds(text)
    return text


PathText = Annotated[str, AfterValidator(_a_path)]
Duration = Annotated[str, BeforeValidator(_as_text), AfterValidator(_a_duration)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def numbers_that_are_meant(cls, value, handler, info):
        """true is no 1, and a whole number beyond 64 bits counts nothing that there is."""
        takes = get_args(kind := cls.model_fields[info.field_name].annotation) or (kind,)
        if isinstance(value, bool) and bool not in takes and {int, float} & set(takes):
            raise ValueError("a number is wanted, not true or false")
        result = handler(value)
        if isinstance(result, int) and result.bit_length() > 63:
            raise ValueError("a whole number of at most 63 bits is wanted")
        return result


class Run(Section):
    output_dir: PathText
    """Folder for everything that the run writes: config.toml, metrics.jsonl, checkpoint-<step>/."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Decides initial weights, sample order, masking and dropout; the same at any number of ranks."""
    time_limit: Duration | None = None
    """Save and end, with exit code 75, before so much time has passed since the start: 11:30:00, 1-12:00:00. The limit
    of a Slurm or PBS job is known without."""
    max_fruitless_starts: int = Field(5, ge=0)
    """Starts with --resume in a row without a new checkpoint after which the next is refused, with exit code 93, since
    it would burn the allocation; 0: never."""


class Data(Section):
    train: PathText
    """Folder of training shards that `hpcllm prepare` wrote."""
    validation: PathText | None = None
    """Folder of validation shards; no evaluation without it."""
    test: PathText | None = None
    """Folder of labelled shards that the model of the run's end, or the best one, is evaluated on, once."""
    tokenizer: PathText | None = None
    """Tokenizer folder in Hugging Face's layout; by default `tokenizer` beside the training folder."""
    reader: Literal["mapped", "mpio"] = "mapped"
    """mapped: each rank maps the shards itself; mpio: collective reads through an h5py built with MPI."""
    quarantine: bool = False
    """Text: training shards that are not what was written are left out, by name, instead of refused. For that all are
    read once at the start. A run goes on with the same shards left out; with others it is one on other data."""
    attention: Literal["row", "document"] = "row"
    """What a token of a row attends to: the row, which runs across documents, or its own document alone, in which its
    position counts from 0, too. Rows and their order are the same."""
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    """masked_lm, and seq2seq_lm on text: fraction of the tokens that are hidden, which are the targets."""

    @property
    def tokenizer_dir(self):
        return self.tokenizer or str(Path(self.train).parent / "tokenizer")


def _no_json(value, name):
    """Of a value from TOML the first that config.json cannot hold, in words; None where there is none."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return next(filter(None, (_no_json(one, f"{name}.{key}") for key, one in inner)), None)
    if isinstance(value, datetime.date | datetime.time):
        return f"{name} is a date or a time, which no model has"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} ({value}) is not a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{name} is a whole number beyond 64 bits"
    return None


class Model(Section):
    task: Literal[names.TASKS]
    """What is learnt: masked_lm (BERT and its kin), causal_lm (GPT-2, Llama and their kin) or seq2seq_lm (T5: spans are
    filled in) from text; sequence_classification (of texts, pairs of texts; also numbers), token_classification
    (entities, parts of speech), question_answering (where in a text the answer stands), seq2seq_lm (a text from
    another) or dialogue (what an assistant says) from labelled data."""
    config: dict[str, Any] | None = None
    """A transformers configuration: model_type and any of its arguments. Weights start at random."""
    init_from: PathText | None = None
    """Folder in Hugging Face's layout whose weights to start from, instead of config."""
    freeze: list[str] = []
    """Names of parameters that are not trained, as shell patterns: ["bert.embeddings.*"]."""

    @model_validator(mode="after")
    def one_source(self):
        if (self.config is None) == (self.init_from is None):
            raise ValueError("give either config (a new model) or init_from (a folder with weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('config needs a model_type, e.g. { model_type = "bert", hidden_size = 256 }')
        if self.config is not None and (odd := _no_json(self.config, "config")):
            raise ValueError(odd)
        return self


class Lora(Section):
    """Arguments of PEFT's LoraConfig, by its names and with its defaults."""

    r: int = Field(8, ge=1)
    """Rank of what is learnt for each adapted layer: how wide it is between its two matrices."""
    lora_alpha: int = Field(8, ge=1)
    """What is learnt is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what enters the two matrices."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (rank-stabilised, arXiv 2312.03732)."""
    target_modules: list[str] | Literal["all-linear"] | None = None
    """Names of the layers to adapt, or their ends: ["query", "value"]; all-linear: all but the output layer; by default
    those that PEFT knows as usual for the family of models."""


class Parallel(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that share each layer."""
    sequence: bool = False
    """Between what tensor cuts of a layer, each of its ranks holds a slice of every sequence instead of all of it."""
    pipeline: int = Field(1, ge=1)
    """Ranks that share the stack of layers."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """In which order a pipeline's ranks compute: 1f1b; interleaved, with several stages a rank; zero_bubble, where
    weights' gradients fill what would be idle time."""
    stages_per_rank: int = Field(1, ge=1)
    """Stages that each rank of a pipeline has: 1, except for interleaved, which needs 2 or more."""
    context: int = Field(1, ge=1)
    """Ranks that share each sequence; twice as many divide train.sequence_length."""
    sharding: Literal["auto", "none", "optimizer", "gradients", "full", "hybrid", "host"] = "auto"
    """What data-parallel ranks divide between them (ZeRO 0 to 3): nothing, optimizer state, gradients too, weights too;
    hybrid: as full within each host, whole models across hosts; host: ranks of a host have one copy of the weights in
    memory that they share, and all divide the rest; auto: host where that can be (CPUs, no other axis), else none."""
    offload: bool = False
    """Shards, their gradients and the optimizer's state stay in host memory, where the optimizer runs: less GPU memory
    for a slower step. With a sharding of "optimizer", "gradients", "full" or "hybrid"."""
    backend: Literal["mpi", "gloo", "nccl"] = "mpi"
    """Who carries gradients and parameters: MPI, or PyTorch's own Gloo or NCCL; ranks always come from MPI."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients travel as. bf16: half of the bytes within a host, three quarters between; added up in fp32."""

    @model_validator(mode="after")
    def sums_that_are_rounded_once(self):
        if self.sharding == "optimizer" and self.reduce_dtype == "bf16":
            raise ValueError(
                'reduce_dtype = "bf16" goes with any sharding but "optimizer", where FSDP2 adds micro-batches up in it'
            )
        return self

    @model_validator(mode="after")
    def shards_that_can_stay_in_host_memory(self):
        if self.offload and self.sharding in ("auto", "none", "host"):
            raise ValueError(
                f'offload = true keeps shards in host memory, of which sharding = "{self.sharding}" has none: take '
                '"optimizer", "gradients", "full" or "hybrid"'
            )
        if self.offload and self.backend == "nccl" and (self.sequence or self.pipeline > 1):
            raise ValueError(
                'offload = true with sequence or a pipeline adds up gradients in host memory, which backend = "nccl" '
                'does not carry; take "mpi"'
            )
        return self

    @model_validator(mode="after")
    def slices_that_somebody_shares(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence = true slices sequences between the ranks of tensor, of which there is 1")
        return self

    @model_validator(mode="after")
    def stages_that_a_schedule_takes(self):
        several, plural = self.stages_per_rank > 1, self.pipeline_schedule == "interleaved"
        if plural != several:
            raise ValueError(
                f'pipeline_schedule = "{self.pipeline_schedule}" and stages_per_rank = {self.stages_per_rank}: '
                "interleaved, and no other, has 2 or more stages a rank"
            )
        if self.pipeline == 1 and (several or self.pipeline_schedule != "1f1b"):
            raise ValueError(f'pipeline_schedule = "{self.pipeline_schedule}" needs a pipeline of 2 ranks or more')
        if self.pipeline_schedule == "zero_bubble" and self.sharding not in ("none", "auto"):
            raise ValueError(
                f'pipeline_schedule = "zero_bubble" goes with sharding = "none", not "{self.sharding}": FSDP2 takes '
                "gradients away before those that are put off are there"
            )
        return self


class Train(Section):
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run, restarts included."""
    num_train_epochs: float | None = Field(None, gt=0)
    """Instead of max_steps: how often every sample is seen; the last global batch is filled up from the next epoch."""
    global_batch_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = Field(ge=1)
    """Sequences per forward and backward of one rank; what is missing to the global batch is accumulated."""
    sequence_length: int = Field(ge=8)
    """Tokens per sequence, special tokens included."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero between warm-up and max_steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Instead of warmup_steps: the same as a fraction of all steps."""
    layerwise_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate of a block for each block above it, of the embeddings for all of them."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Labelled data: part of each target that is spread evenly over all names."""
    class_weights: Literal["balanced"] | list[float] | None = None
    """Labelled data: how much a target of each name counts; balanced: as much less as it is more frequent."""
    metric_for_best_model: str | None = None
    """Labelled data: the evaluation's number by which checkpoints are compared, such as f1, accuracy or loss; the best
    one is kept, and is the run's result."""
    early_stopping_patience: int = Field(0, ge=0)
    """Evaluations in a row without a better metric_for_best_model after which the run ends; 0: never."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay per step (times the learning rate); biases and norms are exempt."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    sgd_momentum: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest global 2-norm of the gradient; beyond it the gradient is scaled down. 0 switches it off."""
    max_nonfinite_steps: int = Field(3, ge=0)
    """Steps in a row whose loss or gradient is no number before the run ends with exit code 93. Such gradients change
    nothing: the step is left out, on all ranks."""
    max_loss_spike: float = Field(0.0, ge=0)
    """A loss so many standard deviations (robust ones, of the last 100 steps' losses) above their median is a spike: a
    run goes back to a checkpoint and leaves out the samples that led there; 0: never. Start with 10."""
    max_spike_steps: int = Field(3, ge=1)
    """Spikes in a row for which the run goes back to the newest checkpoint before the first of them."""
    max_rollbacks: int = Field(3, ge=1)
    """How often a run goes back, for spikes or steps that are no number, before it ends with exit code 93."""
    check_replicas_every_steps: int = Field(0, ge=0)
    """Steps between comparisons of the bits that several ranks hold alike (weights and optimizer state of replicas),
    which find a broken processor or memory, and before every checkpoint; 0: never. One costs a pass over 12 bytes a
    parameter with adamw, at 4.5 GB/s a core."""
    slow_rank_ratio: float = Field(1.5, ge=0)
    """A rank that computes so many times as long as the median of all, over 50 steps, is named with its host; 0: never.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; weights, gradients' sum and optimizer state stay fp32."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Keep only what enters each block and compute the rest again in backward: less memory, a third more work. auto:
    where a step would not fit into the memory that is free at the start."""
    compile: bool = False
    """torch.compile of each block, in the first step: a quicker step on GPUs, needs a C++ compiler on the nodes."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between lines in a batch log; metrics.jsonl has every step."""
    eval_every_steps: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates after the last step only."""
    device: Literal["auto", "cpu", "cuda", "xpu"] = "auto"

    @model_validator(mode="after")
    def steps_and_batches(self):
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either max_steps or num_train_epochs")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give either warmup_steps or warmup_ratio")
        if self.early_stopping_patience and not (self.metric_for_best_model and self.eval_every_steps):
            raise ValueError("early_stopping_patience needs metric_for_best_model and eval_every_steps")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        return self

    def with_steps(self, samples):
        """The same for a data set of so many samples: with max_steps and warmup_steps, whatever they were given as."""
        steps = self.max_steps or math.ceil(self.num_train_epochs * samples / self.global_batch_size)
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * steps)
        told = {"max_steps": steps, "warmup_steps": min(warmup, steps), "num_train_epochs": None, "warmup_ratio": 0.0}
        return self.model_copy(update=told)

    def accumulation(self, size):
        """Micro-batches per rank and optimizer step on `size` data-parallel ranks. Raises UsageError."""
        if self.global_batch_size % (self.micro_batch_size * size):
            raise UsageError(
                f"train: global_batch_size ({self.global_batch_size}) is not divisible by micro_batch_size "
                f"({self.micro_batch_size}) x {size} ranks = {self.micro_batch_size * size}"
            )
        return self.global_batch_size // (self.micro_batch_size * size)


class Checkpoint(Section):
    every_steps: Literal["auto"] | int = 0
    """Steps between checkpoints; 0 saves after the last step only; auto: as many as lose the least time, by what a
    checkpoint is measured to cost and by mtbf."""
    mtbf: Duration = "24:00:00"
    """Time between failures of the whole job, on average, for every_steps = "auto": 24:00:00, 3-00:00:00."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints to keep, two or more, since one may be damaged; older ones are deleted once a newer one
    has been read back, whole."""
    asynchronous: bool = True
    """Write checkpoints while training goes on. Needs memory, on the host, for a copy of what a rank writes: its part
    of 12 bytes a parameter with adamw."""

    @field_validator("every_steps")
    @classmethod
    def no_negative_steps(cls, steps):
        if steps != "auto" and steps < 0:
            raise ValueError("take 0 or more steps")
        return steps

    @field_validator("mtbf")
    @classmethod
    def a_duration(cls, text):
        if not deadline.seconds(text):
            raise ValueError("a job that fails at once saves nothing")
        return text


class Resilience(Section):
    shrink: Literal["auto"] | bool = "auto"
    """When ranks die, the others go on without them: auto, where the MPI can (Open MPI 5, mpirun --with-ft ulfm --mca
    coll ^han); true, which refuses to start where it cannot; false, the job ends."""
    min_ranks: int = Field(1, ge=1)
    """With fewer ranks left the run is saved and ends with exit code 75."""
    spares: int = Field(0, ge=0)
    """So many of the last ranks of the job wait, and take the places of ranks that die. Needs what shrink needs."""

    @model_validator(mode="after")
    def spares_that_may_come_in(self):
        if self.spares and self.shrink is False:
            raise ValueError(
                f"spares = {self.spares} take the places of ranks that die, and shrink = false has a death end the "
                "job; leave out one of them"
            )
        return self


class Config(Section):
    """A whole run file."""

    run: Run
    data: Data
    model: Model
    lora: Lora | None = None
    """Narrow matrices are trained, beside layers of a model that stays as it is; without the section, all of it is."""
    parallel: Parallel = Parallel()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    resilience: Resilience = Resilience()

    @model_validator(mode="after")
    def a_model_that_lora_can_adapt(self):
        if self.lora and not self.model.init_from:
            raise ValueError("[lora] adapts a model that has learnt something: give model.init_from, not model.config")
        for axis in ("tensor", "pipeline"):
            size = getattr(self.parallel, axis)
            if self.lora and size > 1:
                raise ValueError(
                    f"[lora] goes with parallel.{axis} = 1, not {size}: a model that one rank cannot hold is divided "
                    'by parallel.sharding = "full"'
                )
        return self

    @model_validator(mode="after")
    def a_checkpoint_to_go_back_to(self):
        if self.train.max_loss_spike and not self.checkpoint.every_steps:
            raise ValueError(
                "train.max_loss_spike has the run go back to a checkpoint: give checkpoint.every_steps, a number or "
                '"auto"'
            )
        return self

    @model_validator(mode="after")
    def sequences_that_can_be_shared(self):
        length, context = self.train.sequence_length, self.parallel.context
        if context > 1 and length % (2 * context):
            raise ValueError(
                f"parallel.context ({context}) shares a sequence out in {2 * context} chunks, which do not divide "
                f"train.sequence_length ({length})"
            )
        if context > 1 and self.data.attention == "document":
            raise ValueError(
                f'parallel.context ({context}) shares out rows, in which data.attention = "document" keeps documents '
                "apart; there is no way to do both: set context to 1 or attention to row"
            )
        slices = context * self.parallel.tensor
        if self.parallel.sequence and length % slices:
            raise ValueError(
                f"parallel.sequence slices a sequence for context ({context}) x tensor ({self.parallel.tensor}) = "
                f"{slices} ranks, which does not divide train.sequence_length ({length})"
            )
        return self

    @model_validator(mode="after")
    def blocks_that_can_be_compiled(self):
        parallel = self.parallel
        if self.train.compile and parallel.tensor > 1:
            raise ValueError(
                f"train.compile goes with parallel.tensor = 1, not {parallel.tensor}, whose ranks set states of random "
                "numbers inside of blocks: torch.compile cannot, and leaves blocks that it should recompute as they are"
            )
        if self.train.compile and parallel.pipeline_schedule == "zero_bubble":
            raise ValueError(
                'train.compile goes with any parallel.pipeline_schedule but "zero_bubble", which takes the products '
                "of blocks apart itself"
            )
        return self

    @model_validator(mode="after")
    def what_labelled_data_have(self):
        try:  # of a task that learns from both only the data tell
            if self.model.task not in names.OF_EXAMPLES:
                self.check_text()
            if self.model.task not in names.OF_TEXT:
                self.check_examples()
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def check_text(self):
        """Raise UsageError for what a run that learns from text has no use for."""
        given = {"data.test": self.data.test, "train.metric_for_best_model": self.train.metric_for_best_model}
        given |= {
            "train.class_weights": self.train.class_weights,
            "train.label_smoothing": self.train.label_smoothing,
        }
        wrong = [name for name, value in given.items() if value]
        if wrong:
            raise UsageError(f'{wrong[0]} is for labelled data, model.task = "{self.model.task}" learns from text')

    def check_examples(self):
        """Raise UsageError for what a run that learns from labelled data cannot be."""
        parallel = self.parallel
        given = {"pipeline": parallel.pipeline > 1, "context": parallel.context > 1, "sequence": parallel.sequence}
        wrong = [f"parallel.{name}" for name, there in given.items() if there]
        if wrong:
            raise UsageError(f"{wrong[0]}: {self.model.task} goes with the data and tensor axes, and any sharding")
        if self.data.reader == "mpio" or self.data.attention == "document":
            raise UsageError('labelled data are read with data.reader = "mapped" and data.attention = "row"')
        if self.data.quarantine:
            raise UsageError("data.quarantine leaves out shards of text; labelled data are prepared again in no time")
        if self.train.metric_for_best_model and not self.data.validation:
            raise UsageError("train.metric_for_best_model compares evaluations; name data.validation")

    def toml(self):
        """The resolved run file, defaults filled in."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load(path, overrides=()):
    """Read the run file at `path` (or take a dict) and apply "section.key=value" overrides; returns a Config."""
    values = path if isinstance(path, dict) else run_file.read(path)
    for override in overrides:
        _override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n  ".join(_sentence(detail) for detail in error.errors())) from None


def _override(values, override):
    if any("\ud800" <= character < "\ue000" for character in override):
        raise UsageError(f"{override!r} is not UTF-8")
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise UsageError(f'"{override}" is not of the form section.key=value')
    if parts[0] not in Config.model_fields:
        raise UsageError(_unknown(parts[0], "", Config))
    value = run_file.word(text)
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UsageError(f'"{override}": {part} is a value, not a section')
    values[parts[-1]] = value
    instead = _INSTEAD.get(".".join(parts[:-1]) + "." + parts[-1])
    if instead:
        values.pop(instead, None)  # the run file's, which the override is given instead of


def _section_of(location):
    """The Section class that a pydantic error location lies in."""
    section = Config
    for part in location:
        field = section.model_fields.get(part)
        for kind in (field.annotation, *get_args(field.annotation)) if field else ():
            if isinstance(kind, type) and issubclass(kind, Section):
                section = kind
    return section


def _unknown(key, where, section):
    known = list(section.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    return f'{where}unknown key "{key}"{hint}; known: {", ".join(known)}'


def _sentence(detail):
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        where = ".".join(location[:-1])
        return _unknown(location[-1], f"{where}: " if where else "", _section_of(location[:-1]))
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = f" (given: {_short(given)})" if isinstance(given, str | int | float | bool) else ""
    where = ".".join(location)
    return f"{where}: {message}{shown}" if where else message


def _short(given):
    """What was given, for a sentence; a number or text of thousands of digits is not repeated."""
    if isinstance(given, int) and given.bit_length() > 256:
        return f"a number of {given.bit_length()} bits"
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:200]}..."
