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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from pydantic import ValidationError

from finetune import checkpoint, tally
from finetune.boards import check_packages, open_boards
from finetune.flops import WorkMeter, peak_of
from finetune.inputs import changed_inputs, inputs_of, refused
from finetune.log import append_log, log_line, trim_log, utilisation
from finetune.loop import WHOLE_MODELS, StepReport, Trainer
from finetune.lora import adapt, merged, save_adapter
from finetune.order import ORDER, PackedSource, Plan
from finetune.recipe import FinetuneRecipe
from finetune.retention import RETENTION
from finetune.scratch import own_record, starting_bundle, trained_config
from finetune.sources import open_source
from finetune.supply import check_supply
from finetune.watch import Watch, check_engine
from jam.errors import RunError
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, quiet_transformers
from jam.models.packed import DOCUMENTS
from jam.plot import loss_curves
from jam.recipe import dump_recipe
from jam.shards import sync_path

# settings that a resumed run may not change
FIXED = ("model", "seed", "data", "objective", "loss", "scratch", "lora", "optim", "train")


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


def fixed_settings(recipe: FinetuneRecipe) -> dict:
    """What a checkpoint is made under; the order of the data is not for a recipe to say, and fixed as well."""
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key in FIXED} | {"order": ORDER}


def _differences(old: object, new: object, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: was {old}, is {new}"]


def changed_settings(recorded: dict, recipe: FinetuneRecipe) -> list[str]:
    """``name: was a, is b`` of every setting that differs; one that is newer than the record had its default."""
    order = recorded.get("order", "shuffled")  # before it was recorded
    recorded = {key: value for key, value in recorded.items() if key != "order"}
    with suppress(ValidationError):  # a setting that is gone: it is named as it stands
        recorded = fixed_settings(FinetuneRecipe.model_validate(recipe.model_dump(exclude=set(FIXED)) | recorded))
    return _differences(recorded | {"order": order}, fixed_settings(recipe))


def total_steps(recipe: FinetuneRecipe) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, round(recipe.train.tokens / (recipe.train.global_batch_size * recipe.data.seq_len)))


def choose_attention(recipe: FinetuneRecipe) -> str:
    """transformers' name of the kernel that ``train.attention`` asks for."""
    return {"auto": DOCUMENTS, "documents": DOCUMENTS}.get(recipe.train.attention, recipe.train.attention)


def _context(bundle: Bundle, recipe: FinetuneRecipe) -> int:
    context = bundle.model.config.max_position_embeddings
    if recipe.data.seq_len > context:
        raise RunError(f"data.seq_len is {recipe.data.seq_len}, the model has {context} positions; lower data.seq_len")
    return context


def _resume(
    run: Path, recipe: FinetuneRecipe, trainer: Trainer, reporter: Reporter, inputs: dict[str, str]
) -> list[StepReport]:
    """Puts the trainer where the newest good checkpoint left off; returns what was added up until there."""
    found = None if recipe.resume == "never" else checkpoint.newest(run, reporter.line)
    if found is None:
        if recipe.resume == "must":
            raise RunError(f"resume: must, but {run} holds no usable checkpoint; use resume: auto to start afresh")
        if recipe.resume == "auto" and checkpoint.listed(run):
            raise RunError(f"{run} holds checkpoints, but none verifies; move them away or choose another output_dir")
        if recipe.resume == "never" and checkpoint.listed(run):
            raise RunError(f"resume: never, but {run} holds checkpoints; move them away or choose another output_dir")
        return []
    recorded = json.loads((found / "state.json").read_text())
    changed = changed_settings(recorded["settings"], recipe) + changed_inputs(recorded.get("inputs", {}), inputs)
    if kept := refused(changed, recipe.resume_allow):
        raise RunError(
            f"{found} was made under other settings or from other data ({'; '.join(kept)}); resume with the old ones, "
            "choose another output_dir, or name in resume_allow what may differ"
        )
    if changed:
        reporter.line(f"going on with what resume_allow names: {'; '.join(changed)}")
    if "inputs" not in recorded:
        reporter.line(f"{found} does not record its data and model; whether they are the same could not be checked")
    state, ema = checkpoint.load(found, trainer.bundle.model, trainer.raw_optimizer)
    trainer.step, trainer.tokens = state["step"], state["tokens"]
    averaged = trainer.ema is not None and recorded["settings"]["train"].get("ema") is not None
    if averaged and (ema or {}).keys() != trainer.ema.keys():
        raise RunError(
            f"{found}/train/ema.safetensors has {len(ema or {})} averages of {len(trainer.ema)} tensors; restore it, "
            "or remove the folder to go on from an older one"
        )
    trainer.ema = ema if ema is not None else trainer.ema
    read = state.get("read", [])
    same = len(read) == len(trainer.plan.sources)
    if same:
        trainer.read = torch.tensor(read, dtype=torch.float64)
    else:  # an older checkpoint, or sources came or went (resume_allow)
        reporter.line(f"{found} does not say what was read of these sources; shares count from here on")
    reporter.line(f"resuming from {found} (step {trainer.step} of {trainer.steps})")
    return tally.from_json(state["pending"]) if same else []


def _model_card(bundle: Bundle, recipe: FinetuneRecipe) -> str:
    """README.md of ``final/``: that of the model it was trained from would speak of an untrained merge."""
    tokens = total_steps(recipe) * recipe.train.global_batch_size * recipe.data.seq_len
    mix = ", ".join(f"{name} {entry.weight:g}" for name, entry in recipe.data.mix.items())
    lines = ["---", "library_name: transformers", "tags: [jam]", "---", "", f"# {bundle.path.name}, trained", ""]
    kind = type(bundle.model).__name__
    if recipe.scratch is not None:
        lines[-2] = f"# {Path(recipe.output_dir).name}, trained from nothing"
    lines += [f"`{kind}`, {tokens:,} tokens in sequences of {recipe.data.seq_len}; mix: {mix}.", ""]
    lines += ["`finetune.yaml` is the recipe; `merge.yaml` and `report.json`, where present, are of the merge.", ""]
    return "\n".join(lines)


def _write_final(run: Path, bundle: Bundle, recipe: FinetuneRecipe, adapted: PeftModel | None = None) -> Path:
    """``final/``: weights in the parent checkpoint's dtype and every side file, appearing by rename; of adapters the
    merged weights, and ``adapter/`` for peft."""
    temporary, final = run / f".final.tmp-{os.getpid()}", run / "final"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for item in sorted(bundle.path.iterdir()):
            if item.is_dir() and item.name == "adapter":
                continue  # of an earlier training
            if item.is_dir():
                shutil.copytree(item, temporary / item.name)
            elif not item.name.startswith("model") and item.suffix != ".safetensors":
                shutil.copy2(item, temporary / item.name)
        if adapted is not None:
            save_adapter(adapted, temporary / "adapter")
            bundle.model = merged(adapted)
        config = trained_config(bundle, recipe)
        dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        cast: dict[int, torch.Tensor] = {}  # by storage, so that tied tensors stay one tensor
        state = {
            name: cast.setdefault(tensor.data_ptr(), tensor.detach().to(dtype))
            for name, tensor in bundle.model.state_dict().items()
        }
        with quiet_transformers():
            bundle.model.save_pretrained(temporary, state_dict=state)
        checkpoint.share(temporary)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # training changed no setting
        if recipe.scratch is not None:
            own_record(temporary)
        (temporary / "finetune.yaml").write_text(dump_recipe(recipe))
        (temporary / "README.md").write_text(_model_card(bundle, recipe))
        checkpoint.discard(final)
        os.rename(temporary, final)
    except Exception as error:
        first = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # copytree lists every file
        reason = " ".join(str(first).split())
        raise RunError(
            f"{final}: could not be written ({reason}); free space or permissions, then run again"
        ) from error
    finally:  # also when Ctrl+C ends it
        shutil.rmtree(temporary, ignore_errors=True)
    return final


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


def _prepare(run: Path, recipe: FinetuneRecipe, source: Path | None) -> None:
    (run / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    kept = run / "recipe.source.yaml"
    if source is not None and source.resolve() != kept.resolve():  # a run may be repeated from its own record
        shutil.copyfile(source, kept)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "numpy")}
    (run / "env.json").write_text(
        json.dumps({"versions": versions, "threads": torch.get_num_threads()}, indent=2) + "\n"
    )


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
    precision = "bf16" if recipe.train.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    check_engine(recipe, accelerator.distributed_type not in WHOLE_MODELS, accelerator.distributed_type.value)
    main = accelerator.is_main_process  # the folder is its business alone; the other ranks only read
    with run_lock(run) if main else nullcontext():
        if main:
            checkpoint.remove_stale(run)
        bundle = starting_bundle(recipe)
        bundle.model.set_attn_implementation(choose_attention(recipe))
        context = _context(bundle, recipe)
        opened = [open_source(name, entry, bundle, reporter.stage) for name, entry in recipe.data.mix.items()]
        packed = [PackedSource(s, number, bundle, recipe, context) for number, s in enumerate(opened)]
        adapted = None if recipe.lora is None else adapt(bundle, recipe.lora, recipe.seed)
        plan = Plan(packed, [entry.weight for entry in recipe.data.mix.values()], recipe.data.seed)
        trainer = Trainer(bundle, plan, recipe, accelerator, total_steps(recipe))
        check_supply(plan, recipe, trainer.steps, reporter.line)
        inputs = inputs_of(bundle, recipe, opened)
        pending = _resume(run, recipe, trainer, reporter, inputs)
        with _told_of(run):
            if main:
                _prepare(run, recipe, source)  # not before: a refused run must not replace the record of the one there
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
    main = trainer.accelerator.is_main_process
    watch = Watch.open(run, trainer, reporter.stage, reporter.line) if main and recipe.watch is not None else None
    meter = WorkMeter(trainer.bundle, recipe.loss.softmax == "joint")
    peak = peak_of(recipe, trainer.accelerator.device)
    saved = trainer.step

    def save() -> None:
        if main:
            state = {"tokens": trainer.tokens, "settings": fixed_settings(recipe), "time": time.time()}
            state |= {"read": trainer.read.tolist(), "inputs": inputs, "pending": tally.to_json(pending)}
            if (run / "log.jsonl").exists():
                sync_path(run / "log.jsonl")  # a step that a checkpoint has behind it is not logged again
            checkpoint.save(run, trainer.step, trainer.bundle.model, trainer.raw_optimizer, trainer.ema, state)
            checkpoint.rotate(run, recipe.save.keep)
        trainer.accelerator.wait_for_everyone()

    def flush(seen: dict[str, float] | None = None) -> None:
        if pending and main:
            line = log_line(trainer, pending, meter.work(), peak) | (seen or {})
            append_log(run, line)
            show(line)
        pending.clear()

    settings = recipe.model_dump(mode="json")
    shown = open_boards(run, recipe.log, settings, reporter.line) if main else nullcontext(lambda line: None)
    with shown as show, stop_signals() as stop:
        for report in trainer.run(lambda: bool(stop())):
            pending.append(report)
            flops = meter.work().of(report.counts, report.sums)
            if peak is not None:
                report.mfu = utilisation(trainer, flops, report.seconds, peak)
            reporter.step(report)
            seen = watch.look() if watch is not None and watch.due(report.step) else None
            if seen or report.step % recipe.log.every == 0 or report.step == report.steps:
                flush(seen)
            if report.step % recipe.save.every == 0 and report.step < report.steps:
                save()
                saved = report.step
            if (run / "SAVE").exists() and saved != report.step:
                save()
                saved = report.step
                (run / "SAVE").unlink(missing_ok=True)
        code = stop()
        if code and trainer.step < trainer.steps:
            if saved != trainer.step:
                save()  # with the steps that no line tells of yet
            raise Interrupted(f"stopped at step {trainer.step} of {trainer.steps}; the same command resumes", code)
    if saved != trainer.step or not checkpoint.listed(run):
        save()
    trainer.adopt_average()
    trainer.bundle.model.eval()
    if not main:
        return run / "final"
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots" / "loss.png").write_bytes(loss_curves(run / "log.jsonl"))
    return _write_final(run, trainer.bundle, recipe, adapted)
