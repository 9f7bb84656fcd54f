"""The training loop, on accelerate for device and processes; finetune.scale.engines has how the model lies on them.

One optimizer step: sequences t = step * G .. (step + 1) * G - 1 of the plan (this rank takes every world-th) ->
micro-batches -> sums of weighted loss divided by the global weight -> clip -> optimizer -> EMA. Everything random is
keyed by the step, so a resumed run repeats the uninterrupted one bit for bit at the same world size.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.loss import TokenLoss, position_weights, sums
from finetune.optim import build_optimizer, learning_rate, tables
from finetune.order.pack import Batch, Sequence, collate
from finetune.order.plan import Plan
from finetune.recipe import FinetuneRecipe
from finetune.scale.engines import Engine, engine_for
from finetune.scale.ranks import Ranks
from finetune.suspects import not_finite, suspect_rows
from finetune.watching.measure import SOURCES, count
from jam.errors import RunError
from jam.models.load import Bundle


@dataclass
class StepReport:
    """What one step did, over all ranks; ``loss`` is without ``z``, the z-loss times its weight; ``sums`` as in
    :func:`finetune.loss.sums`."""

    step: int
    steps: int
    tokens: int
    loss: float
    z: float
    grad_norm: float
    lr: float
    seconds: float
    sums: Tensor
    counts: list[float] = field(default_factory=list)
    mfu: float | None = None


def hold_frozen_in_bf16(model: nn.Module) -> None:
    """Frozen matrices as autocast uses them, kept instead of made in every pass; only those that lose no bit by it.
    Tables and norms stay: they carry the residual stream."""
    shared = tables(model)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.Linear) or any(p.requires_grad or id(p) in shared for p in own):
            continue
        if all(torch.equal(p, p.to(torch.bfloat16).to(p.dtype)) for p in own):
            module.to(torch.bfloat16)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Only states between layers are kept; backward makes the rest again."""
    # transformers 5.23 renamed it and warns about the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the reentrant kind loses gradients where a layer's input has none: adapters


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generators in one step of one rank. A CPU's reads the lower 32 bits alone, in which ranks must differ;
    the factor is odd."""
    return (seed * 1_000_003 + step + rank * 0x9E3779B9) % 2**63


@dataclass
class Trainer:
    """Model, optimizer and position of one run; ``read`` are the tokens of each source so far, padding not counted."""

    bundle: Bundle
    plan: Plan
    recipe: FinetuneRecipe
    accelerator: Accelerator
    steps: int
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    tokens: int = 0
    read: Tensor | None = None
    ema: dict[str, Tensor] | None = None
    engine: Engine = field(init=False)
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    counts: Tensor = field(init=False)  # of this rank's last batch

    def __post_init__(self) -> None:
        recipe, network = self.recipe, self.bundle.model
        network.train()
        if recipe.train.checkpointing:
            checkpoint_layers(network)
        self.engine = engine_for(self.accelerator, recipe.train.precision == "bf16")
        self._check()
        loss = TokenLoss(self.bundle, recipe.loss, recipe.objective.own_codes)
        self.model, self.optimizer = self.engine.wrap(loss, self._build)
        if recipe.train.ema is not None and self.ema is None:
            self.start_average()

    def _check(self) -> None:
        """Raises RunError for what cannot be shared out over these ranks, or does not hold for shards."""
        recipe, world = self.recipe, self.accelerator.num_processes
        if recipe.train.global_batch_size % world:
            raise RunError(
                f"train.global_batch_size is {recipe.train.global_batch_size} for {world} processes; a multiple of "
                "them is required, so that every rank makes as many passes; change one of the two"
            )
        if not self.engine.shards:
            return
        rows = any(group.rows is not None for group in recipe.optim.groups)
        found = {
            "lora": recipe.lora is not None,
            "optim.groups with rows": rows,
            "optim.name: muon": recipe.optim.name == "muon",
            "train.ema": recipe.train.ema is not None and not self.engine.averages,
        }
        if wrong := [name for name, asked in found.items() if asked]:
            raise RunError(
                f"{wrong[0]} over {self.engine.name}, which shards the weights that it needs whole; run on one device "
                "or under DDP, or remove it"
            )

    def start_average(self) -> None:
        """The average of the weights begins with those that the model has."""
        named = self.bundle.model.named_parameters()
        self.ema = {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _build(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.bundle.model, self.recipe.optim, self.recipe.lora is not None)
        if self.recipe.train.precision == "bf16" and not self.engine.shards:
            hold_frozen_in_bf16(self.bundle.model)
        return optimizer

    def batch(self, step: int) -> Batch:
        """This rank's sequences of a step."""
        size = self.recipe.train.global_batch_size
        first, world = step * size, self.accelerator.num_processes
        numbers = range(first + self.accelerator.process_index, first + size, world)
        owners, sequences = zip(*(self.plan.sequence(t) for t in numbers), strict=True)
        sequences, conditioned = list(sequences), [one.source.conditioned for one in self.plan.sources]
        self.counts = count(sequences, owners, conditioned, self.recipe.data.seq_len, self.bundle.vocabulary)
        return self.lay_out(sequences, list(owners))

    def lay_out(self, sequences: list[Sequence], owners: list[int]) -> Batch:
        """Sequences as a batch on this rank's device."""
        controls = self.bundle.vocabulary.controls
        pad = controls.get("pad", controls["eos"])  # of a row's unused end, which nobody reads
        batch = collate(sequences, owners, self.recipe.data.seq_len, pad)
        return batch.to(self.accelerator.device)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the global loss; returns (loss and z-loss on this rank's share [2], sums for the log, bool [B]:
        the rows whose loss is not finite)."""
        recipe, size = self.recipe, self.recipe.train.micro_batch_size
        weights = position_weights(batch, recipe.loss)
        # every rank divides by the weight of all ranks; DDP averages, hence the factor
        total = self.accelerator.reduce(weights.double().sum(), "sum").clamp_min(1e-9)
        scale = self.accelerator.num_processes / total
        logged = torch.zeros(2 + len(self.plan.sources), 2, dtype=torch.float64, device=weights.device)
        loss = torch.zeros(2, dtype=torch.float64, device=weights.device)
        count, suspects = len(batch.ids), []
        for start in range(0, count, size):
            part, last = batch.rows(start, start + size), start + size >= count
            with self.engine.micro_batch(self.model, last):
                found = self.model(part)
                terms = (found.double() * weights[start : start + size]).sum((1, 2)) * scale
                terms = terms * terms.new_tensor([1.0, recipe.loss.z])
                self.engine.backward(terms.sum(), last)
            loss += terms.detach()
            logged += sums(found[0], part, len(self.plan.sources))
            suspects.append(suspect_rows(found))
        return loss / self.accelerator.num_processes, logged, torch.cat(suspects)

    def advance(self) -> StepReport:
        """One optimizer step.

        Raises:
            RunError: the loss or the gradient is not finite; names the documents, and takes no step.
        """
        began = time.perf_counter()
        torch.manual_seed(step_seed(self.recipe.seed, self.step, self.accelerator.process_index))
        rate = learning_rate(self.recipe.optim, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with self.ranks.together():  # a document that cannot be used is on one rank alone
            batch = self.batch(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        local_loss, logged, suspects = self.backward(batch)
        loss, z = self.accelerator.reduce(local_loss, "sum").tolist()
        if not math.isfinite(loss + z):
            raise not_finite(self, f"the loss is {loss + z}", suspects)
        norm = self.engine.clip(self.model, self.recipe.optim.clip)
        if not math.isfinite(norm):
            raise not_finite(self, f"the loss is {loss + z:.4g}, its gradient's norm {norm}", None)
        self.optimizer.step()
        self._average()
        self.tokens += int(self.accelerator.reduce(torch.tensor(batch.tokens, device=batch.ids.device), "sum"))
        self.step += 1
        logged = self.accelerator.reduce(logged, "sum").cpu()
        counts = self.accelerator.reduce(self.counts.to(batch.ids.device), "sum").cpu()
        self.read = counts[SOURCES:] if self.read is None else self.read + counts[SOURCES:]
        seconds = time.perf_counter() - began
        return StepReport(self.step, self.steps, self.tokens, loss, z, norm, rate, seconds, logged, counts.tolist())

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        decay = min(self.recipe.train.ema, (1 + self.step) / (10 + self.step))  # a short memory while weights move fast
        for name, parameter in self.bundle.model.named_parameters():
            if name in self.ema:
                self.ema[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Puts the averaged weights into the model (at the end of a run)."""
        for name, parameter in self.bundle.model.named_parameters():
            if self.ema is not None and name in self.ema:
                parameter.copy_(self.ema[name])
