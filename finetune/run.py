"""``jam finetune``: a recipe to a trained model, resumably.

Stages: lock the run folder -> load the model -> open the sources -> find the newest good checkpoint -> steps, with a
line in log.jsonl every ``log.every`` and a checkpoint every ``save.every`` -> ``final/``, a plain ``from_pretrained``
folder. Ctrl+C and SIGTERM finish the step, save and leave; the same command goes on from there.
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel

from finetune.data.inputs import inputs_of
from finetune.data.sources import open_source
from finetune.loop import StepReport, Trainer
from finetune.lora import adapt
from finetune.order.plan import PackedSource, Plan
from finetune.order.supply import check_supply
from finetune.recipe import FinetuneRecipe
from finetune.saving import checkpoint, tally
from finetune.saving.final import final_dtype, write_final
from finetune.saving.resume import differences, fixed_settings, resume
from finetune.scale.engines import asks_fsdp2, start_processes
from finetune.scale.ranks import Ranks
from finetune.scratch import starting_bundle
from finetune.watching.boards import check_packages, open_boards
from finetune.watching.flops import WorkMeter, peak_of
from finetune.watching.log import append_log, log_line, trim_log, utilisation
from finetune.watching.retention import RETENTION
from finetune.watching.watch import Watch, check_engine
from jam.errors import RunError
from jam.memory import keep_freed_memory
from jam.models.load import Bundle
from jam.models.packed import DOCUMENTS
from jam.plot import loss_curves
from jam.recipe import dump_recipe
from jam.shards import sync_path

LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # accelerate launch sets it, however many processes it then starts


class Interrupted(RunError):
    """The run was asked to stop, saved itself and can be resumed; ``exit_code`` is (130 or 143)."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


class Reporter:
    """What a run tells: override to draw it. The default says nothing."""

    def stage(self, what: str, done: int, total: int) -> None:
        """Progress of a preparation stage."""

    def step(self, report: StepReport) -> None:
        """One optimizer step is done."""

    def line(self, text: str) -> None:
        """Something the user should read."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds ``run.lock``; the kernel frees it when the process dies, however it dies.

    Raises:
        RunError: another live process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another run; wait for it, stop it, or choose another folder"
            ) from None
        yield


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the exit code asked for by SIGINT (130) or SIGTERM (143), else 0.

    A second Ctrl+C acts at once.
    """
    asked = [0]

    def note(number: int, frame) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = 128 + number

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's business
        yield lambda: 0
        return
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def choose_attention(recipe: FinetuneRecipe) -> str:
    """transformers' name of the kernel that ``train.attention`` asks for."""
    return {"auto": DOCUMENTS, "documents": DOCUMENTS}.get(recipe.train.attention, recipe.train.attention)


def _check_same(recipe: FinetuneRecipe, ranks: Ranks) -> None:
    """Raises RunError where a rank was started with another recipe than the first one: they would wait for each other,
    or train on different data. Where the model and the run lie may differ from machine to machine."""
    own = recipe.model_dump(mode="json", exclude={"model", "output_dir"})
    first = ranks.told(own)
    with ranks.together():
        if differing := differences(first, own):
            raise RunError(
                f"rank {ranks.number} was started with other settings than rank 0 ({'; '.join(differing)}); one recipe "
                "is required on all, start every process with the same command"
            )


def _context(bundle: Bundle, recipe: FinetuneRecipe) -> int:
    context = bundle.model.config.max_position_embeddings
    if recipe.data.seq_len > context:
        raise RunError(f"data.seq_len is {recipe.data.seq_len}, the model has {context} positions; lower data.seq_len")
    return context


@contextmanager
def _told_of(run: Path) -> Iterator[None]:
    """A disk that refuses a write as one line about the run. Raises RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise RunError(
            f"{run}: could not be written ({error.strerror}); room on its disk is required, checkpoints stay as they "
            "are; free space and run again to resume"
        ) from error


def _prepare(run: Path, recipe: FinetuneRecipe, source: Path | None, trainer: Trainer) -> None:
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    kept = run / "recipe.source.yaml"
    if source is not None and source.resolve() != kept.resolve():  # a run may be repeated from its own record
        shutil.copyfile(source, kept)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "numpy")}
    found = {"versions": versions, "threads": torch.get_num_threads()}
    found |= {"engine": trainer.engine.name, "processes": trainer.ranks.count}
    (run / "env.json").write_text(json.dumps(found, indent=2) + "\n")


def run_finetune(recipe: FinetuneRecipe, source: Path | None = None, reporter: Reporter | None = None) -> Path:
    """Trains as the recipe says and returns the ``final`` folder.

    Args:
        source: the recipe's file, copied into the run folder.
        reporter: told of stages and steps.

    Raises:
        Interrupted: SIGINT or SIGTERM; a checkpoint was written.
        JamError: bad data, model, settings or disk; one line each.
    """
    reporter = reporter or Reporter()
    run = Path(recipe.output_dir)
    if run.resolve().is_relative_to(recipe.model.resolve()):
        raise RunError(f"output_dir {run} lies inside the model {recipe.model}; choose a folder outside of it")
    check_packages(recipe.log)
    keep_freed_memory()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    accelerator = start_processes()
    ranks = Ranks()
    _check_same(recipe, ranks)
    with ExitStack() as held:
        with ranks.together():
            if ranks.first:  # the folder is its business alone; the other ranks only read
                held.enter_context(run_lock(run))
                checkpoint.remove_stale(run)
        with ranks.together():
            bundle = starting_bundle(recipe, hollow=asks_fsdp2(accelerator) and not ranks.first)
            final_dtype(bundle, recipe)  # before hours of training, not after
            bundle.model.set_attn_implementation(choose_attention(recipe))
            context = _context(bundle, recipe)
        mix = recipe.data.mix
        opened = ranks.in_turn(lambda: [open_source(name, one, bundle, reporter.stage) for name, one in mix.items()])
        with ranks.together():
            packed = [PackedSource(s, number, bundle, recipe, context) for number, s in enumerate(opened)]
            adapted = None if recipe.lora is None else adapt(bundle, recipe.lora, recipe.seed)
            plan = Plan(packed, [entry.weight for entry in mix.values()], recipe.data.seed)
            check_supply(plan, recipe, recipe.steps, reporter.line)
            inputs = inputs_of(bundle, recipe, opened)
        trainer = Trainer(bundle, plan, recipe, accelerator, recipe.steps, ranks)
        check_engine(recipe, trainer.engine.shards, trainer.engine.name)
        pending = resume(run, recipe, trainer, reporter.line, inputs)
        with _told_of(run):
            with ranks.together():
                if ranks.first:  # not before: a refused run must not replace the record of the one there
                    _prepare(run, recipe, source, trainer)
                    if ranks.count > 1 or LAUNCHED in os.environ:
                        many = f"{trainer.engine.name} on {ranks.count} processes"
                        reporter.line(f"{many if ranks.count > 1 else 'one process'} ({accelerator.device.type})")
                    trim_log(run, trainer.step)
                    trim_log(run, trainer.step or -1, RETENTION)  # a fresh run knows nothing of the parents
            return _train(run, recipe, trainer, reporter, pending, inputs, adapted)


def _train(
    run: Path,
    recipe: FinetuneRecipe,
    trainer: Trainer,
    reporter: Reporter,
    pending: list[StepReport],
    inputs: dict[str, str],
    adapted: PeftModel | None,
) -> Path:
    ranks = trainer.ranks
    with ranks.together():
        looks = ranks.first and recipe.watch is not None
        watch = Watch.open(run, trainer, reporter.stage, reporter.line) if looks else None
    meter = WorkMeter(trainer.bundle, recipe.loss.softmax == "joint")
    peak = peak_of(recipe, trainer.accelerator.device)
    saved = trainer.step

    def save() -> None:
        state = {"tokens": trainer.tokens, "settings": fixed_settings(recipe), "time": time.time()}
        state |= {"read": trainer.read.tolist(), "inputs": inputs, "pending": tally.to_json(pending)}
        state["walked"] = [source.walked for source in trainer.plan.sources]
        with ranks.together():
            if ranks.first and (run / "log.jsonl").exists():
                sync_path(run / "log.jsonl")  # a step that a checkpoint has behind it is not logged again
        checkpoint.save(run, trainer.step, trainer.bundle.model, trainer.engine, trainer.ema, state, ranks)
        with ranks.together():
            if ranks.first:
                checkpoint.rotate(run, trainer.step, recipe.save.keep)

    def told(step: int, last: bool) -> None:
        """A look at the model where one is due, and a line of the log."""
        with ranks.together():
            seen = watch.look() if watch is not None and watch.due(step) else None
            if ranks.first and pending and (seen or last or step % recipe.log.every == 0):
                line = log_line(trainer, pending, meter.work(), peak) | (seen or {})
                append_log(run, line)
                show(line)
                pending.clear()
        if not ranks.first:
            pending.clear()

    settings = recipe.model_dump(mode="json")
    shown = open_boards(run, recipe.log, settings, reporter.line) if ranks.first else nullcontext(lambda line: None)
    with shown as show, stop_signals() as stop:
        code, wanted = ranks.greatest(stop(), 0)  # what one rank is asked, all do after the same step
        while trainer.step < trainer.steps and not code:
            report = trainer.advance()
            pending.append(report)
            flops = meter.work().of(report.counts, report.sums)
            if peak is not None:
                report.mfu = utilisation(trainer, flops, report.seconds, peak)
            reporter.step(report)
            told(report.step, report.step == report.steps)
            code, wanted = ranks.greatest(stop(), ranks.first and (run / "SAVE").exists())
            if wanted or (report.step % recipe.save.every == 0 and report.step < report.steps):
                save()
                saved = report.step
            if wanted and ranks.first:
                (run / "SAVE").unlink(missing_ok=True)
                reporter.line(f"saved {run}/checkpoint-{report.step}, as {run}/SAVE asked; going on")
        if code and trainer.step < trainer.steps:
            if saved != trainer.step:
                save()  # with the steps that no line tells of yet
            raise Interrupted(f"stopped at step {trainer.step} of {trainer.steps}; the same command resumes", code)
    if saved != trainer.step or not ranks.told(bool(checkpoint.listed(run))):
        save()
    trainer.adopt_average()
    trainer.bundle.model.eval()
    with ranks.together():
        if ranks.first:
            (run / "plots").mkdir(exist_ok=True)
            (run / "plots" / "loss.png").write_bytes(loss_curves(run / "log.jsonl"))
    return write_final(run, trainer.bundle, recipe, trainer.tokens, trainer.engine, ranks, adapted)
