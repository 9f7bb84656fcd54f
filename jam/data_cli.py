"""The verbs of ``jam data``; as in ``jam.cli`` nothing is computed here and imports wait for the verb."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Prepare data for training: check it, turn it into shards of tokens, look at them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Reader = Literal["text", "captions", "messages", "interleaved", "codes"]  # as finetune.data.readers.FORMS names them
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A prepared folder.")]
MediaRoot = Annotated[Path | None, typer.Option(help="Folder of the images; default: that of the data.")]
ImageMap = Annotated[Path | None, typer.Option(help='Lines {"url", "path"}: where images named by URL are.')]
Workers = Annotated[int, typer.Option(min=1, help="Processes; they do not change the result.")]
OwnSizes = Annotated[
    bool, typer.Option("--own-sizes", help="Images at the sizes their model knows (Emu3, Lumina-mGPT), not as squares.")
]


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file or folder of data.")],
    reader: Annotated[Reader, typer.Option(help="What a row of it is.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="The model that is to learn it.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    workers: Workers = 1,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, in MB.")] = 1000,
    media_root: MediaRoot = None,
    image_map: ImageMap = None,
    own_sizes: OwnSizes = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used, and say so.")
    ] = False,
) -> None:
    """Turn data into shards of tokens, once; run again after a stop to go on.

    A recipe reads the folder by data.mix.NAME: {kind: shards, path: FOLDER, weight: ...}.
    """
    from finetune.data.rendering import Reading
    from jam.data import run_prepare

    reading = Reading(source, reader, media_root, image_map, own_sizes)
    run_prepare(reading, model, out, workers=workers, shard_mb=shard_mb, skip_bad=skip_bad)


@app.command()
def check(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file or folder of data, or a prepared folder.")],
    reader: Annotated[Reader | None, typer.Option(help="What a row is; not for a prepared folder.")] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also: can this model write every document?")
    ] = None,
    workers: Workers = 1,
    media_root: MediaRoot = None,
    image_map: ImageMap = None,
    own_sizes: OwnSizes = False,
) -> None:
    """Name every bad row with file and line; of a prepared folder, every file that was altered."""
    from finetune.data.rendering import Reading
    from jam.data import run_check

    reading = None if reader is None else Reading(source, reader, media_root, image_map, own_sizes)
    run_check(reading, source, model, workers)


@app.command()
def stats(
    folder: Folder,
    seq_len: Annotated[int, typer.Option(min=8, help="Length of a training sequence, for packing.")] = 512,
) -> None:
    """Documents, tokens by modality, lengths, and how full packing gets."""
    from jam.data import run_stats

    run_stats(folder, seq_len)


@app.command()
def show(
    folder: Folder,
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The model it was prepared for; default: the shipped one.")
    ] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Documents to show.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Number of the first.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for their images.")] = Path("jam-data-show"),
) -> None:
    """Print documents as they are learnt, what has a loss marked; images go to a folder."""
    from jam.data import run_show

    run_show(folder, model, number=number, start=start, out=out)
