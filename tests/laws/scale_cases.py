"""What the ranks of tests/laws/test_scale_laws.py do: steps in float64 on batches of which one rank has no image."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.data.sources import open_source
from finetune.loop import Trainer
from finetune.order.plan import PackedSource
from finetune.recipe import FinetuneRecipe
from finetune.scale.engines import asks_fsdp2, start_processes, whole
from jam.models.load import load_bundle

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu"}
REPLICAS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
HSDP = FSDP | REPLICAS | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
ENGINES = {"ddp": {}, "fsdp2": FSDP, "hsdp": HSDP, "zero-3": ZERO}
STEPS = 3


@dataclass
class Turns:
    """A plan whose even sequences are of the first source and whose odd ones are of the second: under an even number
    of ranks each rank meets one kind alone."""

    sources: list[PackedSource]

    def sequence(self, t: int):
        return t % 2, self.sources[t % 2].sequence(t // 2)


@contextmanager
def engine(name: str) -> Iterator[None]:
    """The variables that accelerate launch sets."""
    os.environ.update(ENGINES[name])
    try:
        yield
    finally:
        for variable in ENGINES[name]:
            del os.environ[variable]


def trainer_of(recipe: FinetuneRecipe) -> Trainer:
    accelerator = start_processes()
    dtype = torch.float64 if recipe.train.precision == "fp32" else torch.float32
    bundle = load_bundle(recipe.model, dtype, hollow=asks_fsdp2(accelerator) and not accelerator.is_main_process)
    opened = [open_source(name, entry, bundle) for name, entry in recipe.data.mix.items()]
    context = bundle.model.config.max_position_embeddings
    plan = Turns([PackedSource(source, number, bundle, recipe, context) for number, source in enumerate(opened)])
    return Trainer(bundle, plan, recipe, accelerator, STEPS)


def steps_of(recipe: FinetuneRecipe, out: Path, expected: str = "ddp") -> None:
    """Gradients of the first step and loss, norm, weights and average of three, into ``out`` by the first rank."""
    trainer = trainer_of(recipe)
    assert trainer.engine.shards == (expected != "ddp")  # the variables were understood
    named = dict(trainer.bundle.model.named_parameters())
    torch.manual_seed(0)
    loss, _, _ = trainer.backward(trainer.batch(0))
    found = {f"gradient.{name}": whole(p.grad).read() for name, p in named.items() if p.requires_grad}
    reports = [trainer.advance() for _ in range(STEPS)]
    found |= {f"weight.{name}": whole(p).read() for name, p in named.items()}
    found |= {f"ema.{name}": whole(average).read() for name, average in (trainer.ema or {}).items()}
    found["loss"] = trainer.accelerator.reduce(loss, "sum")
    figures = [(r.loss, r.z, r.grad_norm, r.tokens) for r in reports]
    found["figures"] = torch.tensor(figures, dtype=torch.float64)
    if trainer.accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in found.items()}, out)


def steps(cases: str) -> None:
    """Args: cases: a JSON list of [engine, recipe file, file to write]."""
    for name, recipe, out in json.loads(cases):
        with engine(name):
            steps_of(FinetuneRecipe.model_validate_json(Path(recipe).read_text()), Path(out), name)
