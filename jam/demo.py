"""``jam demo``: the main job on the shipped parents, from two models to a page that shows what fusing them gave.

Steps, in order; each leaves a result that appears by rename, so that a second call goes on where the first stopped:
1. merge the parents by every method;
2. measure parents and fusions at step 0 on held-out text and captions;
3. train every fusion on the same number of tokens of the same mix, and measure again;
4. choose the best by a fixed rule on the validation split (:func:`choice_sum`);
5. tune it on interleaved conversations;
6. draw held-out captions and answer held-out questions, with this run's model and with the shipped one;
7. write ``report.html``.

The page is made anew by every call, everything else once. Budgets are the constants below.
"""

import json
from pathlib import Path

from rich.console import Console

from jam import assets
from jam.demo_bench import METHODS, RULE, Advance, Bars, Settings, Workbench, open_folder

# A processor with bfloat16 arithmetic trains about three times as fast; either budget keeps the demo within minutes.
FAST = {"precision": "bf16", "pretrain_tokens": 163_840, "tune_tokens": 163_840}
QUICK = {
    "pretrain_tokens": 2_048,
    "tune_tokens": 2_048,
    "seq_len": 512,
    "batch": 1,
    "text_bytes": 2_000,
    "captions": 8,
    "pictures": 2,
    "questions": 3,
    "reply_tokens": 100,
    "train_images": 64,
}

# Optimizer and learning rate by method, for continued pretraining. A merge of one table has to find its way back and
# moves fast. The cross model's towers are whole already and creep; what learns are the blocks through which the image
# tower reads the text tower, with gates fast enough to open within the budget. The other direction moves slowly: on
# captions and text that the text parent knows, the image tower has little to tell it (docs/log.md, demo, has what was
# tried).
OPTIMIZERS = {"uniform": ("adamw", 1e-3), "width": ("adamw", 6e-4), "cross": ("muon", 2e-3)}
CROSS_GROUPS = [
    {"match": r"^cross\.\d+\.text\.gate$", "lr_mul": 0.5},
    {"match": r"^cross\.\d+\.text\.", "lr_mul": 0.1},
    {"match": r"\.gate$", "lr_mul": 10.0},
    {"match": "embed_tokens", "lr_mul": 0.05},
    {"match": r"^text\.", "lr_mul": 0.005},
    {"match": r"^image\.", "lr_mul": 0.05},
]
TUNE = ("adamw", 5e-4)
# Scenes beside the captioned images: the image parent knows those by heart and learns from them to be sure of itself,
# which costs it on drawings that it has not seen (docs/log.md, demo).
PRETRAIN_SHARES = {"text": 0.5, "captions": 0.25, "scenes": 0.25}
TUNE_SHARES = {"conversations": 0.6, "text": 0.1, "captions": 0.3}
SCENES = 1000

# Seconds that each step takes on two cores, roughly: they only divide the bar.
WEIGHTS = {
    "merge": {"uniform": 1, "width": 2, "cross": 2},
    "measure": {"text parent": 4, "image parent": 6, "uniform": 6, "width": 16, "cross": 14},
    "train": {"uniform": 45, "width": 110, "cross": 110},
    "tune": 110,
    "pictures": 20,
    "replies": 20,
}


def settings_for(text_parent: Path, image_parent: Path, quick: bool) -> Settings:
    """The budgets for this machine."""
    import torch

    from jam.shipped import content_key

    capabilities = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    shipped = [folder / "model.safetensors" for folder in (text_parent, image_parent)]
    weights = content_key([*shipped, *sorted(assets.CHAT.glob("*.safetensors"))])
    return Settings(str(text_parent), str(image_parent), weights, **(QUICK if quick else FAST if fast else {}))


def choice_sum(text: float, image: float, text_parent: float, image_parent: float) -> float:
    """The rule's figure for one fusion: sum of relative increases over both parents, lower is better.

    >>> choice_sum(2.2, 4.0, 2.0, 4.0)
    0.10000000000000009
    """
    return (text - text_parent) / text_parent + (image - image_parent) / image_parent


def choose(measured: dict[str, dict], parents: dict[str, float]) -> dict:
    """The choice among fusions from their losses after training on the validation split."""
    sums = {name: choice_sum(m["text"], m["image"], parents["text"], parents["image"]) for name, m in measured.items()}
    return {"best": min(sums, key=lambda name: (sums[name], name)), "sums": sums}


def mix(settings: Settings, shares: dict[str, float]) -> dict:
    """A recipe's ``data.mix`` of the shipped data. Each scene has to be encoded: the first ``SCENES`` are more than any
    budget here reads."""
    limits = dict.fromkeys(shares, settings.train_images) | {"scenes": min(settings.train_images or SCENES, SCENES)}
    return {
        kind: {"kind": kind, "path": "mini", "weight": share, "limit": limits[kind]} for kind, share in shares.items()
    }


def train_recipe(
    settings: Settings, model: Path, out: Path, tokens: int, optimizer: tuple[str, float], cross: bool, shares: dict
):
    """The recipe of one training run, as ``jam finetune`` would read it."""
    from finetune.recipe import FinetuneRecipe

    tune = "conversations" in shares
    groups = CROSS_GROUPS if cross and not tune else []
    steps = max(1, tokens // (settings.seq_len * settings.batch))
    raw = {
        "model": model,
        "output_dir": out,
        "seed": settings.seed,
        "data": {"seq_len": settings.seq_len, "seed": settings.seed, "mix": mix(settings, shares)},
        "objective": {"cm3": 0.0, "condition_drop": 0.1},
        "optim": {
            "name": optimizer[0],
            "lr": optimizer[1],
            "warmup": 0.05,
            "schedule": "cosine",
            "final_lr_ratio": 0.05,
            "groups": groups,
        },
        "train": {
            "steps": steps,
            "micro_batch_size": settings.batch,
            "global_batch_size": settings.batch,
            "precision": settings.precision,
        },
        "save": {"every": max(1, steps // 4), "keep": 1},
        "log": {"every": max(1, steps // 80)},
    }
    return FinetuneRecipe.model_validate(raw)


def run_training(bench: Workbench, name: str, weight: float, recipe) -> dict:
    """One run of ``finetune`` as a step; its own checkpoints carry it over an interruption."""

    def train(advance: Advance) -> dict:
        from finetune.run import Reporter, run_finetune

        class Told(Reporter):
            def stage(self, what: str, done: int, total: int) -> None:
                advance(0.0, f"{what} {done}/{total}")

            def step(self, report) -> None:
                advance(report.step / report.steps)

            def line(self, text: str) -> None:
                bench.bars.say(text)

        run_finetune(recipe, reporter=Told())
        last = [json.loads(line) for line in (recipe.output_dir / "log.jsonl").read_text().splitlines()][-1]
        budget = recipe.train.steps * recipe.train.global_batch_size * recipe.data.seq_len
        return {"steps": last["step"], "tokens": last["tokens"], "budget": budget}

    return bench.step(name, weight, train)


def merge_all(bench: Workbench) -> None:
    from merge.recipe import MergeRecipe
    from merge.run import run_merge

    settings = bench.settings
    for method in METHODS:
        out = bench.path("merged", method)
        parents = {"text": Path(settings.text_parent), "image": Path(settings.image_parent)}
        recipe = MergeRecipe.model_validate({"method": method, "out": out, "seed": settings.seed, **parents})

        def merge(advance: Advance, recipe=recipe, out=out) -> dict:
            if not out.exists():  # it appears by rename: there, it is whole
                run_merge(recipe)
            return {"folder": str(out)}

        bench.step(f"merge {method}", WEIGHTS["merge"][method], merge)


def measure(bench: Workbench, name: str, model: str, folder: Path) -> dict:
    """Losses of one model on both splits: {"parameters", "validation": {"text", "image"}, "test": {...}}."""
    from jam.demo_samples import held_out_losses

    def evaluate(advance: Advance) -> dict:
        return held_out_losses(folder, Path(bench.settings.image_parent), bench.settings, advance)

    return bench.step(name, WEIGHTS["measure"][model], evaluate)


def pretrain_and_choose(bench: Workbench) -> dict:
    """Steps 2 to 4: the parents', the fusions' losses before and after, and the choice."""
    settings = bench.settings
    folders = {"text parent": Path(settings.text_parent), "image parent": Path(settings.image_parent)}
    parents = {name: measure(bench, f"measure {name}", name, folder) for name, folder in folders.items()}
    start = {m: measure(bench, f"measure {m} at step 0", m, bench.path("merged", m)) for m in METHODS}
    after = {}
    for method in METHODS:
        recipe = train_recipe(
            settings,
            bench.path("merged", method),
            bench.path("train", method),
            settings.pretrain_tokens,
            OPTIMIZERS[method],
            method == "cross",
            PRETRAIN_SHARES,
        )
        run_training(bench, f"train {method}", WEIGHTS["train"][method], recipe)
        after[method] = measure(bench, f"measure {method} after training", method, bench.path("train", method, "final"))
    bar = {
        "text": parents["text parent"]["validation"]["text"],
        "image": parents["image parent"]["validation"]["image"],
    }
    choice = choose({m: after[m]["validation"] for m in METHODS}, bar)
    choice["sums0"] = choose({m: start[m]["validation"] for m in METHODS}, bar)["sums"]
    return {"parents": parents, "start": start, "after": after, "choice": choice}


def samples_of(bench: Workbench, label: str, folder: Path) -> dict:
    """Pictures and replies of one model, as two steps."""
    from jam.demo_samples import draw_pictures, write_replies

    target = bench.path("samples", label)
    common = (folder, target, bench.settings)
    return {
        "pictures": bench.step(
            f"draw with {label} model", WEIGHTS["pictures"], lambda advance: draw_pictures(*common, advance)
        ),
        "replies": bench.step(
            f"ask {label} model", WEIGHTS["replies"], lambda advance: write_replies(*common, advance)
        ),
    }


def total_weight(out: Path) -> float:
    """Weight of the steps that are still to do."""
    weights = {f"merge {name}": weight for name, weight in WEIGHTS["merge"].items()}
    for name, weight in WEIGHTS["measure"].items():
        if name in METHODS:
            weights |= {f"measure {name} at step 0": weight, f"measure {name} after training": weight}
        else:
            weights[f"measure {name}"] = weight
    weights |= {f"train {name}": weight for name, weight in WEIGHTS["train"].items()}
    weights["tune"] = WEIGHTS["tune"]
    for label in ("this run's", "shipped"):
        weights |= {f"draw with {label} model": WEIGHTS["pictures"], f"ask {label} model": WEIGHTS["replies"]}
    results = out / "results"
    return sum(weight for name, weight in weights.items() if not (results / f"{name.replace(' ', '-')}.json").exists())


def run_steps(bench: Workbench, shipped: Path) -> Path:
    from jam.demo_page import write_page

    settings = bench.settings
    merge_all(bench)
    measured = pretrain_and_choose(bench)
    best = measured["choice"]["best"]
    bench.bars.say(f"best: {best}. {RULE}")
    recipe = train_recipe(
        settings,
        bench.path("train", best, "final"),
        bench.path("tune"),
        settings.tune_tokens,
        TUNE,
        best == "cross",
        TUNE_SHARES,
    )
    run_training(bench, "tune", WEIGHTS["tune"], recipe)
    samples = {
        "this run's": samples_of(bench, "this run's", bench.path("tune", "final")),
        "shipped": samples_of(bench, "shipped", shipped),
    }
    return write_page(bench, measured, samples)


def run_demo(out: Path, quick: bool = False) -> None:
    """Runs the demo in ``out``, or goes on with the one that is there.

    Raises:
        RunError: the folder holds something else, or the run was interrupted.
        JamError: whatever a step refuses.
    """
    from finetune.run import run_lock
    from jam.shipped import shipped_model

    settings = settings_for(assets.TEXT_PARENT, assets.IMAGE_PARENT, quick)
    console = Console(stderr=True)
    open_folder(out, settings)
    shipped = shipped_model()
    budget = f"{settings.pretrain_tokens:,} tokens of pretraining a fusion, {settings.tune_tokens:,} of tuning the best"
    console.print(f"jam demo in {out}: {budget}; Ctrl+C stops it, the same command goes on")
    try:
        with run_lock(out), Bars(console, total_weight(out)) as bars:
            page = run_steps(Workbench(out, settings, bars), shipped)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise
    console.print(f"report: {page.resolve()}")
