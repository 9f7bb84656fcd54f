"""A run watched: every so many steps the retention table, and samples that the model makes.

A look leaves no trace in the training: it reads the averaged weights where there are any (and puts the others back, the
same tensors), restores the mode of every module and torch's random state; the next step draws from its own seed anyway.
The first rank looks alone while the others wait at their next exchange, so weights must be whole there.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from finetune.data import mini_data
from finetune.data.held_out import held_out_pictures, spread
from finetune.loop import Trainer
from finetune.recipe import FinetuneRecipe, WatchSection
from finetune.saving.checkpoint import discard
from finetune.watching.log import append_log, read_lines
from finetune.watching.retention import RETENTION, HeldOut, parents_of, reason, summary, table
from jam.decode.job import prepare
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import Reply, replies
from jam.document import CodesPart, Document, TextPart, from_messages
from jam.errors import JamError, RunError
from jam.models.load import Bundle, load_bundle

WORDS = 160  # tokens of a reply beside its image


def check_engine(recipe: FinetuneRecipe, shards: bool, name: str) -> None:
    """Raises RunError where an engine shards the weights, so that no rank could look alone."""
    if recipe.watch is not None and shards:
        raise RunError(
            f"watch over {name}, which shards the weights; a look needs them whole on one device: run on one device or "
            "under DDP, or set watch: null"
        )


@contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """The model as its average, to be looked at; on the way out everything is as it was."""
    model, device = trainer.bundle.model, trainer.accelerator.device
    modes = [(module, module.training) for module in model.modules()]
    weights = []
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=trainer.recipe.train.precision == "bf16")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), bf16:
        try:
            for name, parameter in model.named_parameters():
                if trainer.ema is not None and name in trainer.ema:
                    weights.append((parameter, parameter.data))
                    parameter.data = trainer.ema[name].to(parameter.device)
            model.eval()
            yield
        finally:
            for parameter, data in weights:
                parameter.data = data
            for module, mode in modes:
                module.training = mode


@dataclass(frozen=True)
class Prompts:
    """What the model is asked at each look: captions to draw, and questions to answer in text and images."""

    pictures: tuple[str, ...]
    questions: tuple[str, ...]

    @classmethod
    def of(cls, watch: WatchSection) -> "Prompts":
        if watch.prompts:
            return cls(watch.prompts[: watch.samples], watch.prompts[: watch.samples])
        rows = held_out_pictures("combination", watch.samples)
        talks = [row for row in mini_data.conversations("subject") if row["kind"] in ("draw", "explain")]
        first = [from_messages(row["messages"][:1], Path) for row in spread(talks, watch.samples)]
        return cls(tuple(map(mini_data.caption_for, rows)), tuple(one.parts[0].text for one in first))

    def asked(self, bundle: Bundle, seed: int) -> list[tuple[str, list[Document], SamplingOptions]]:
        """By kind, the prompts as documents and how they are answered."""
        role = "user" if bundle.vocabulary.converses else "document"
        pictures = [Document((TextPart(text),)) for text in self.pictures]
        talk = [Document((TextPart(text, role),)) for text in self.questions]
        codes = bundle.vocabulary.codes_per_image or 0
        return [
            ("picture", pictures, default_options(bundle, mode="image", max_images=1, seed=seed)),
            ("reply", talk, default_options(bundle, max_images=1, max_tokens=WORDS + codes, seed=seed)),
        ]


@dataclass
class Watch:
    """Looks at one run's model; only on the first rank."""

    run: Path
    trainer: Trainer
    watch: WatchSection
    stage: Callable[[str, int, int], None]
    say: Callable[[str], None]
    held_out: HeldOut | None = None
    prompts: Prompts | None = None
    rows: list[dict] = field(default_factory=list)

    @classmethod
    def open(
        cls, run: Path, trainer: Trainer, stage: Callable[[str, int, int], None], say: Callable[[str], None]
    ) -> "Watch":
        """Reads the data, measures the parents, and looks at a model that was not trained yet.

        Raises:
            JamError: data that cannot be read, prompts that the model cannot answer.
        """
        recipe, bundle = trainer.recipe, trainer.bundle
        self = cls(run, trainer, recipe.watch, stage, say)
        if recipe.watch.retention:
            self.held_out = HeldOut.open(recipe.watch, bundle, recipe.data.seq_len)
            if not self.held_out.captions:
                say(f"watch: {bundle.path} has no image codes, or no image tokenizer; texts alone are measured")
            self._references()
        if recipe.watch.samples:
            draws = bundle.vocabulary.image_span is not None and bundle.image is not None and bundle.image.makes_images
            if draws:
                self.prompts = Prompts.of(recipe.watch)
                for _, documents, options in self.prompts.asked(bundle, recipe.seed):
                    prepare(bundle, documents, options)  # what it cannot answer is said now
            else:
                say(f"watch: {bundle.path} cannot draw; no samples are made")
        if trainer.step == 0:
            self.look()
        return self

    def due(self, step: int) -> bool:
        return step % self.watch.every == 0 or step == self.trainer.steps

    def look(self) -> dict[str, float]:
        """Measures and samples the model as it is; returns what goes into the log."""
        step, began, figures = self.trainer.step, time.perf_counter(), {}
        with aside(self.trainer):
            self.stage("watching", 0, 2)
            if self.held_out is not None:
                row = self._measured(f"step {step}", self.trainer.bundle, step)
                figures = {f"retention/{side}": row[side] for side in ("text", "image") if row[side] is not None}
            self.stage("watching", 1, 2)
            if self.prompts is not None:
                self._sample(self.run / "samples" / f"step-{step:06d}")
            self.stage("watching", 2, 2)
        if self.held_out is not None:
            self.say(f"step {step}: {summary(row, self.rows)} [{time.perf_counter() - began:.1f} s]")
        return figures

    def _measured(self, name: str, bundle: Bundle, step: int) -> dict:
        found = {"step": step, "of": name} | self.held_out.losses(bundle) | {"held_out": self.held_out.digest}
        append_log(self.run, found, RETENTION)
        self._add(found)
        return found

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        temporary = self.run / ".retention.md.tmp"
        temporary.write_text(table(self.rows, self.held_out), encoding="utf-8")
        temporary.replace(self.run / "retention.md")

    def _references(self) -> None:
        """The parents, and the untrained model of a run that is resumed; what was measured on this data stands."""
        recipe, device = self.trainer.recipe, self.trainer.accelerator.device
        known = {row["of"]: row for row in read_lines(self.run, RETENTION) if row["held_out"] == self.held_out.digest}
        wanted = {f"{parent.side} parent": parent.load for parent in parents_of(recipe.model)}
        if self.trainer.step:
            wanted["step 0"] = lambda: load_bundle(recipe.model)
        for number, (name, load) in enumerate(wanted.items()):
            self.stage("measuring parents", number, len(wanted))
            if name in known:
                self._add(known[name])
                continue
            try:
                with aside(self.trainer):
                    bundle = load()
                    bundle.model.to(device)
                    self._measured(name, bundle, 0)
            except JamError as error:
                self._add({"step": 0, "of": name, "missing": reason(error)})
        if wanted:
            self.stage("measuring parents", len(wanted), len(wanted))
        self.rows += [row for row in known.values() if row["of"] not in wanted]

    def _sample(self, folder: Path) -> None:
        """``samples.json`` with the prompts, and PNG files, in a folder that appears when whole."""
        bundle = replace(self.trainer.bundle)  # with a readout of its own: weights change under the training's
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        written = []
        for kind, documents, options in self.prompts.asked(bundle, self.trainer.recipe.seed):
            for number, (prompt, reply) in enumerate(zip(documents, replies(bundle, documents, options), strict=True)):
                blocks = _blocks(reply, temporary, f"{kind}-{number}")
                written.append({"kind": kind, "prompt": prompt.parts[0].text, "answer": blocks})
        said = {"step": self.trainer.step, "seed": self.trainer.recipe.seed, "samples": written}
        (temporary / "samples.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        discard(folder)
        temporary.rename(folder)


def _blocks(reply: Reply, folder: Path, stem: str) -> list[dict]:
    blocks, images = [], iter(reply.images)
    for at, part in enumerate(reply.document.parts):
        if isinstance(part, CodesPart):
            next(images).save(folder / f"{stem}-{at}.png")
            blocks.append({"type": "image", "path": f"{stem}-{at}.png"})
        else:
            blocks.append({"type": "text", "text": part.text})
    return blocks
