"""The finetune recipe: what is trained, on which mix, with which objective and arithmetic.

Used for continued pretraining and for instruction tuning alike; they differ in the mix. Relations between keys are
checked here (one of tokens and steps, batch sizes that divide); whether files exist and fit the model is the run's
matter. Imports no torch.
"""

import difflib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from jam.recipe import Pattern, Recipe, Section

MOST_SEQUENCES = 1 << 20  # of a step: one rank looks all of its own up before it computes
LAST_SEED = 1 << 43  # times 1,000,003, plus step and rank, it stays within the 64 bits of torch's seeds


def _weighs(value: float) -> float:
    if value != 0.0 and not 1e-4 <= value <= 1e4:  # products of three stay in float32, sums of them far above rounding
        raise ValueError(f"found {value:g}; required: 0, or from 0.0001 to 10000; only ratios count, scale them all")
    return value


def _named(value: object) -> object:
    if value == "":  # pathlib would take it for the working directory
        raise ValueError("found an empty path; required: a folder; write . for the working directory")
    return value


Weight = Annotated[float, AfterValidator(_weighs)]
Folder = Annotated[Path, BeforeValidator(_named)]


class ModalityWeights(Section):
    """Loss weights of a source by modality."""

    text: Weight = Field(1.0, ge=0.0, description="weight of text tokens in the loss")
    image: Weight = Field(1.0, ge=0.0, description="weight of image codes in the loss")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "ModalityWeights":
        if self.text == 0.0 and self.image == 0.0:
            raise ValueError("text and image are both 0; required: one weight above 0; raise one or remove the source")
        return self


class Source(Section):
    """One source of documents in the mix."""

    kind: Literal["text", "captions", "conversations", "scenes", "shards"] = Field(
        description="how lines become documents: text, captions, conversations or scenes (composed image pairs); "
        "shards are prepared (jam data prepare)"
    )
    path: str = Field(
        min_length=1, description='"mini" for the shipped data, else a file or folder of rows, or a prepared folder'
    )
    weight: float = Field(
        gt=0.0,
        le=1e9,
        description="share of this source in the mix, in packed sequences, to a hundredth; shares are normalised",
    )
    loss: ModalityWeights = Field(ModalityWeights(), description="loss weights within this source")
    limit: int | None = Field(None, ge=1, description="use only the first so many documents; null is all")
    skip: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="documents left out, by their number from 0, as errors name them"
    )
    max_epochs: float | None = Field(
        None, gt=0.0, description="refuse a run that reads the documents more often than this; null only says so"
    )
    joined: int = Field(
        1,
        ge=1,
        description="up to so many conversations one after another as one, where data.seq_len holds them: a user who "
        "changes the subject",
    )

    @model_validator(mode="after")
    def _joins_conversations(self) -> "Source":
        if self.joined > 1 and self.kind != "conversations":
            raise ValueError(f"joined is {self.joined} with kind {self.kind}; only conversations are joined, remove it")
        return self


class DataSection(Section):
    """What is read, and in which order."""

    seq_len: int = Field(512, ge=8, description="tokens of a training sequence")
    seed: int = Field(0, ge=0, description="seed of the order of documents and of their masks")
    mix: dict[str, Source] = Field(min_length=1, description="sources by a name of your choice, at least one")


class ObjectiveSection(Section):
    """The CM3 objective (spans moved to the end, to be filled in from both sides), and noise on what is read."""

    cm3: float = Field(0.0, ge=0.0, le=1.0, description="share of documents turned into infilling instances")
    spans: Literal["poisson", "one"] = Field("poisson", description="number of spans: Poisson(1) or always one")
    clamp_min: Literal[0, 1] = Field(
        1,
        description="least number of spans: 1 masks every chosen document (CM3's paper), 0 leaves 36.8 % of them whole "
        "(its code in metaseq)",
    )
    clamp_max: int = Field(16, ge=1, description="greatest number of spans")
    condition_drop: float = Field(
        0.1, ge=0.0, le=1.0, description="share of captions masked as a whole, which guidance needs"
    )
    code_noise: float = Field(
        0.0, ge=0.0, le=1.0, description="share of documents that read some image codes replaced by random ones"
    )
    own_codes: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="share of sequences that read some image codes replaced by the model's own draws",
    )


class LossSection(Section):
    """Loss weights of the whole run, and over which ids the softmax runs."""

    text: Weight = Field(1.0, ge=0.0, description="weight of text tokens")
    image: Weight = Field(1.0, ge=0.0, description="weight of image codes")
    softmax: Literal["restricted", "joint"] = Field(
        "restricted", description="restricted: over the ids that the grammar allows in this state; joint: over all ids"
    )
    z: float = Field(
        0.0, ge=0.0, le=1e4, description="weight of log(Z)^2, which keeps logits from drifting (1e-5: Chameleon)"
    )
    chunk: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="positions that a head scores at a time, so that the scores of a large vocabulary never stand "
        "whole in memory; auto: as many as make 2^26 scores (1,024 of 65,536 ids); null is all at once (softmax: "
        "restricted)",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossSection":
        if self.text == 0.0 and self.image == 0.0:
            raise ValueError("text and image are both 0; required: one weight above 0; raise one of them")
        return self


class ParameterGroup(Section):
    """Parameters whose learning rate differs."""

    match: Pattern = Field(min_length=1, description="regular expression searched in the parameter's name")
    lr_mul: float = Field(ge=0.0, le=1e6, description="factor on the learning rate; 0 freezes the parameters")
    rows: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="of a table or head, the ids that learn, as [first, one past the last] each; the others stay as "
        "they are, undecayed (one process or DDP)",
    )

    fresh: Literal["mean", "normal", "zero", "he"] | None = Field(
        None,
        description="how these rows begin: mean of the other rows; normal around it with their deviation, column by "
        "column; zero; he: normal with variance 2 / width; null leaves them as the model has them",
    )

    @model_validator(mode="after")
    def _fresh_rows(self) -> "ParameterGroup":
        if self.fresh is not None and self.rows is None:
            raise ValueError(f"fresh is {self.fresh} without rows; required: which rows begin anew; add rows")
        return self

    @field_validator("rows")
    @classmethod
    def _ranges(cls, rows: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        if rows is not None and (not rows or any(not 0 <= first < stop for first, stop in rows)):
            raise ValueError(f"found {[list(pair) for pair in rows]}; required: [first, stop] with 0 <= first < stop")
        return rows


class LoraSection(Section):
    """Adapters instead of the weights themselves (peft); ``optim.groups`` then speak of the adapters' parameters."""

    method: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="lora; rslora: scaled by alpha / sqrt(r); dora: directions, with lengths of their own"
    )
    r: int = Field(16, ge=1, description="rank of an adapter")
    alpha: int = Field(32, ge=1, description="an adapter's product counts alpha / r times")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of an adapter's inputs dropped")
    targets: Pattern | None = Field(
        None,
        description="regular expression searched in the names of linear maps; null is all but heads",
    )
    new_rows: bool = Field(
        False, description="the rows of controls and image codes, of every table and head, learn with the adapters"
    )


Setting = bool | int | float | str | None


class ScratchSection(Section):
    """A network of new weights: ``model`` gives vocabulary and tokenizers, this section shape and initialisation."""

    num_hidden_layers: int = Field(ge=1, description="layers")
    hidden_size: int = Field(ge=1, description="width of a token's state")
    num_attention_heads: int = Field(ge=1, description="attention heads of a layer")
    intermediate_size: int = Field(ge=1, description="width of the feed-forward layer (OPT's ffn_dim)")
    max_position_embeddings: int = Field(ge=1, description="positions; data.seq_len may be as long")
    num_key_value_heads: int | None = Field(None, ge=1, description="key and value heads; null is as many as heads")
    head_dim: int | None = Field(None, ge=1, description="width of a head; null is hidden_size / num_attention_heads")
    config: dict[str, Setting] = Field(
        {}, description="other settings of the model's config.json, laid over those of the folder"
    )
    init: Literal["class", "cm3leon"] = Field(
        "class",
        description="class: as transformers' class draws its weights; cm3leon: truncated normal cut at 3 deviations, "
        "zero where a layer adds to the state, positions at 1/30 of the deviation",
    )
    init_std: float | None = Field(
        None, gt=0.0, description="standard deviation of the weights; null is the config's, or 0.006 for cm3leon"
    )


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised updates for the matrices inside the network, AdamW for the rest"
    )
    lr: float = Field(3e-4, gt=0.0, le=1e3, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="two decay rates of Adam's means, each in [0, 1)")
    eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled weight decay of matrices")
    warmup: int | float = Field(0.05, ge=0, description="steps (an integer) or a share of all steps (below 1)")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape of the decay after warmup")
    final_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="learning rate at the end over the peak")
    clip: float = Field(1.0, gt=0.0, description="greatest norm of the gradient")
    groups: tuple[ParameterGroup, ...] = Field((), description="factors on the rate by name; the first match counts")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"found {list(betas)}; required: two numbers in [0, 1); write for example [0.9, 0.95]")
        return betas

    @field_validator("warmup")
    @classmethod
    def _warmup_is_steps_or_share(cls, warmup: int | float) -> int | float:
        if isinstance(warmup, float) and warmup >= 1.0:
            raise ValueError(
                f"found {warmup}; required: an integer number of steps or a share below 1; "
                f"write {round(warmup)} for steps"
            )
        return warmup


class TrainSection(Section):
    """How long, in which batches, and in which arithmetic."""

    tokens: int | None = Field(None, ge=1, description="length of the run in tokens; give this or steps")
    steps: int | None = Field(None, ge=1, description="length of the run in optimizer steps; give this or tokens")
    micro_batch_size: int = Field(8, ge=1, le=MOST_SEQUENCES, description="sequences in one forward pass on one device")
    global_batch_size: int = Field(
        8, ge=1, le=MOST_SEQUENCES, description="sequences in one optimizer step, a multiple of the micro batch"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of forward and backward passes")
    attention: Literal["auto", "documents", "sdpa", "eager"] = Field(
        "auto",
        description="documents attends inside each document of a packed sequence alone (auto); the others to the whole "
        "sequence under a mask",
    )
    checkpointing: bool = Field(
        False, description="keep the states between layers alone and make the rest again in the backward pass"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; null leaves them to torch")
    random_offset: bool = Field(
        True, description="draw a start position per document, so that all positions are trained"
    )
    ema: float | None = Field(None, gt=0.0, lt=1.0, description="decay of an average of the weights; null is none")

    @model_validator(mode="after")
    def _one_length_and_whole_batches(self) -> "TrainSection":
        if self.tokens is None and self.steps is None:
            raise ValueError("neither tokens nor steps is given; required: exactly one; add for example steps: 1000")
        if self.tokens is not None and self.steps is not None:
            raise ValueError(
                f"both tokens ({self.tokens}) and steps ({self.steps}) are given; required: exactly one; remove one "
                f"of them (on the command line: train.tokens=null or train.steps=null)"
            )
        micro, whole = self.micro_batch_size, self.global_batch_size
        if whole % micro:
            raise ValueError(
                f"global_batch_size is {whole} and micro_batch_size {micro}; required: a multiple of it; "
                f"set global_batch_size to {-(-whole // micro) * micro}"
            )
        return self


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(200, ge=1, description="steps between two checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, the newest ones")


class LogSection(Section):
    """What is written to log.jsonl, and how often."""

    every: int = Field(10, ge=1, description="steps between two lines of the log")
    tensorboard: bool = Field(False, description="also event files in output_dir/tensorboard (pip: jam[tensorboard])")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="also a run of this W&B project, offline unless WANDB_MODE says otherwise (pip: jam[wandb])",
    )
    peak_tflops: float | None = Field(
        None, gt=0.0, description="what one device can do in this precision, for the MFU; null: jam's table, by name"
    )


class WatchSection(Section):
    """What is measured and shown of the model while it is trained; the training does not notice."""

    every: int = Field(200, ge=1, description="steps between two looks; there is one before the first and at the end")
    retention: int = Field(
        64, ge=0, description="held-out texts, and as many captioned images, whose loss is set against both parents'"
    )
    texts: str | None = Field(None, min_length=1, description="jsonl of held-out texts; null: the shipped ones")
    captions: str | None = Field(
        None, min_length=1, description="jsonl of held-out captioned images; null: the shipped ones"
    )
    samples: int = Field(2, ge=0, description="prompts that get a picture and a reply; models that draw alone")
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="of these the first so many; none: captions to draw and questions of the shipped held-out data"
    )

    @model_validator(mode="after")
    def _something_to_see(self) -> "WatchSection":
        if not self.retention and not self.samples:
            raise ValueError("retention and samples are both 0; required: one above 0; raise one or remove watch")
        if self.prompts and not self.samples:
            raise ValueError("prompts are given and samples is 0, which would ignore them; raise samples")
        return self


class FinetuneRecipe(Recipe):
    """Train a model on a mix of text and images. Paths are relative to the working directory."""

    aliases: ClassVar[dict[str, str]] = {
        "lr": "optim.lr",
        "learning_rate": "optim.lr",
        "weight_decay": "optim.weight_decay",
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "adam_epsilon": "optim.eps",
        "max_grad_norm": "optim.clip",
        "grad_clip": "optim.clip",
        "gradient_clip": "optim.clip",
        "lr_scheduler": "optim.schedule",
        "lr_scheduler_type": "optim.schedule",
        "warmup_steps": "optim.warmup",
        "warmup_ratio": "optim.warmup",
        "min_lr_ratio": "optim.final_lr_ratio",
        "per_device_train_batch_size": "train.micro_batch_size",
        "batch_size": "train.micro_batch_size",
        "local_batch_size": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.global_batch_size",
        "train_batch_size": "train.global_batch_size",
        "num_train_epochs": "train.tokens",
        "epochs": "train.tokens",
        "max_tokens": "train.tokens",
        "max_steps": "train.steps",
        "num_steps": "train.steps",
        "bf16": "train.precision",
        "gradient_checkpointing": "train.checkpointing",
        "activation_checkpointing": "train.checkpointing",
        "fp16": "train.precision",
        "mixed_precision": "train.precision",
        "torch_dtype": "train.precision",
        "lora_r": "lora",
        "lora_rank": "lora",
        "lora_alpha": "lora",
        "lora_dropout": "lora",
        "lora_target": "lora",
        "target_modules": "lora",
        "use_dora": "lora",
        "use_rslora": "lora",
        "cutoff_len": "data.seq_len",
        "max_length": "data.seq_len",
        "max_seq_len": "data.seq_len",
        "max_seq_length": "data.seq_len",
        "sequence_len": "data.seq_len",
        "model_max_length": "data.seq_len",
        "dataset": "data.mix",
        "datasets": "data.mix",
        "train_dataset": "data.mix",
        "data_seed": "data.seed",
        "save_steps": "save.every",
        "save_total_limit": "save.keep",
        "logging_steps": "log.every",
        "report_to": "log.tensorboard",
        "wandb_project": "log.wandb",
        "eval_steps": "watch",
        "base_model": "model",
        "model_name_or_path": "model",
        "out": "output_dir",
        "output_path": "output_dir",
        "resume_from_checkpoint": "resume",
    }

    kind: Literal["finetune"] = Field("finetune", description="the schema that this file follows")
    model: Folder = Field(description="folder of the model to train")
    output_dir: Folder = Field(description="folder of the run: checkpoints, log, plots and the final model")
    seed: int = Field(0, ge=0, le=LAST_SEED, description="seed of the run")
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="auto goes on from the newest whole checkpoint, never starts afresh, must refuses to start afresh",
    )
    resume_allow: tuple[str, ...] = Field(
        (),
        description="what a resumed run may have otherwise than its checkpoint, by dotted name: a setting (optim.lr), "
        "or what the checkpoint was made from (content.data.mix.NAME)",
    )
    data: DataSection = Field(description="what is read: at least data.mix with one source")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="the CM3 objective")
    loss: LossSection = Field(LossSection(), description="loss weights")
    scratch: ScratchSection | None = Field(
        None, description="train new weights of this shape; null trains the model's own"
    )
    lora: LoraSection | None = Field(None, description="train adapters over a frozen model; null trains the model")
    optim: OptimSection = Field(OptimSection(), description="optimizer and schedule")
    train: TrainSection = Field(description="length, batches and arithmetic: at least train.tokens or train.steps")
    save: SaveSection = Field(SaveSection(), description="checkpoints")
    log: LogSection = Field(LogSection(), description="the log")
    watch: WatchSection | None = Field(
        None, description="held-out losses and samples during the run (one process or DDP); null is none"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        return max(1, round(self.train.tokens / (self.train.global_batch_size * self.data.seq_len)))

    @model_validator(mode="after")
    def _what_may_differ_is_a_setting(self) -> "FinetuneRecipe":
        tree: dict[str, object] = self.model_dump() | {"order": None, "content": None}
        tree["data"] = tree["data"] | {"mix": None}  # its sources may have gone
        for name in self.resume_allow:
            node: object = tree
            for part in name.split("."):
                if not isinstance(node, dict):
                    break
                if part not in node:
                    near = difflib.get_close_matches(part, node, n=1)
                    raise ValueError(
                        f"resume_allow names {name}, and {part!r} is no setting{f', {near[0]} is' if near else ''}; "
                        "required: dotted names such as optim.lr, data.mix.NAME or content.data.mix.NAME; mend it"
                    )
                node = node[part]
        return self

    @model_validator(mode="after")
    def _adapters_lie_over_something(self) -> "FinetuneRecipe":
        if self.scratch is not None and self.lora is not None:
            raise ValueError("scratch draws new weights, and lora trains adapters over old ones; remove one of the two")
        return self

    @model_validator(mode="after")
    def _adapters_have_no_rows(self) -> "FinetuneRecipe":
        if self.lora is not None and any(group.rows is not None for group in self.optim.groups):
            raise ValueError(
                "optim.groups name rows, and lora trains adapters; required: one of the two; "
                "remove rows and write lora.new_rows: true"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "FinetuneRecipe":
        steps, warmup = self.steps, self.optim.warmup
        if isinstance(warmup, int) and warmup >= steps > 1:
            raise ValueError(
                f"optim.warmup is {warmup} steps of a run of {steps}; required: fewer than the run has; lower "
                f"optim.warmup or write a share such as 0.05"
            )
        return self
