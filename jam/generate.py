"""``jam generate``: one reply to one prompt, written as ordered ``out.json`` and PNG files.

Stages: check the output folder and open the images -> load the model -> prompt as a user turn -> reply -> a temporary
folder beside the target, renamed when whole. Also holds what both doors to a model share: options as the command
line gives them, and the user's turn.

A prompt with ``<mask>`` in it is no turn but a plain document with a hole, and what is written is the document, filled.

It keeps no history; that is ``jam.chat``.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from jam.decode.candidates import Rank, draw_candidates
from jam.decode.job import encode_images, rules_of
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import Reply, filled, replies
from jam.document import Document, Hole, ImagePart, MaskPart, Part, Role, TextPart, user_turn
from jam.errors import GenerationError
from jam.models.load import Bundle
from jam.running import AUTOMATIC, Running
from jam.shards import check_output, remove_stale
from jam.tokens.image import open_image

HOLE = "<mask>"
Said = float | str | tuple[str, ...]


def run_generate(
    path: Path | None,
    *,
    prompt: str,
    images: Sequence[Path] = (),
    out: Path,
    candidates: int | None = None,
    rank: Rank | None = None,
    clip: Path | None = None,
    running: Running = AUTOMATIC,
    **options: Said | None,
) -> Path:
    """Writes ``out/out.json`` (``[{"type": "text", "text": ...}, {"type": "image", "path": "image-0.png"}, ...]``).

    Args:
        path: a model folder; None takes the shipped default.
        prompt: the user's text; each ``<image>`` in it stands for one of ``images``, without any they come first. A
            ``<mask>`` makes it a plain document, which the reply fills there: with an image in mode ``image``, else
            with text.
        out: a new or empty folder.
        candidates: images to draw in one batch and rank (``jam.decode.candidates``), in mode ``image``; their entries,
            best first, have ``score`` and ``guidance`` too, and stand alone.
        rank: how the model ranks them; by likelihood if nothing is said.
        clip: a CLIP's folder (``jam.evaluate.clip``), which ranks them instead by the words of the prompt.
        running: where the model runs, and in which numbers.
        options: fields of :class:`jam.decode.options.SamplingOptions`; None leaves the model's default.

    Returns:
        ``out``.

    Raises:
        JamError: nothing is written then.
    """
    out = Path(os.path.abspath(out))
    check_output(out)
    if candidates is not None:
        if options.get("mode") not in (None, "image"):
            raise GenerationError(
                f"mode is {options['mode']} and candidates is {candidates}; these are images, leave one out"
            )
        options |= {"mode": "image", "max_images": 1}
    elif clip is not None or rank is not None:
        given = f"rank is {rank}" if clip is None else "a CLIP is given"
        raise GenerationError(f"{given} and no number of candidates to rank; say how many to draw")
    if clip is not None and rank is not None:
        raise GenerationError(
            f"rank is {rank} and a CLIP is given; one of the two ranks candidates, leave the other out"
        )
    turn = user_turn(prompt, [open_image(Path(image)) for image in images])
    hole: Hole | None = None if HOLE not in prompt else "image" if options.get("mode") == "image" else "text"
    said = said_options(**options)
    judge = None
    if clip is not None:
        from jam.evaluate.clip import ClipJudge  # imports more of transformers

        judge = ClipJudge.load(clip).of(" ".join(part.text for part in turn if isinstance(part, TextPart)))
    bundle = running.open(path)
    settings = default_options(bundle, **said)
    if (
        candidates is not None
        and settings.image_temperature == 0
        and not {"image_temperature", "image_beams"} & {*said}
    ):
        settings = default_options(bundle, **said, image_temperature=1.0)  # candidates are drawn by chance
    check_drawable(bundle, settings if hole != "text" else replace(settings, mode="text"))
    asked = Document(with_role(bundle, turn) if hole is None else with_hole(turn, hole))
    document = encode_images(bundle, asked)
    if candidates is not None:
        found = draw_candidates(bundle, document, candidates, settings, rank or "likelihood", judge)
        write_replies(out, [(one.reply, {"score": one.score, "guidance": one.guidance}) for one in found])
        by = f"the model's own {rank or 'likelihood'}" if clip is None else f"CLIP ({clip})"
        print(f"{out / 'out.json'}: {len(found)} images, best first by {by}")
        return out
    (reply,) = replies(bundle, [document], settings)
    if hole is not None:
        reply = replace(reply, document=filled(asked, reply))
    write_replies(out, [(reply, {})])
    texts = sum(isinstance(part, TextPart) for part in reply.document.parts)
    ended = "" if reply.stop in ("eos", "stop") else "; cut by the token budget or the context"
    print(f"{out / 'out.json'}: {texts} texts, {len(reply.document.parts) - texts} images{ended}")
    return out


def said_options(**given: Said | None) -> dict[str, Said]:
    """What was said of the options, checked; whoever asks for an image alone gets one, unless a number is said.

    >>> said_options(seed=3, text_top_p=None)
    {'seed': 3}
    >>> said_options(mode="image", max_images=None)
    {'mode': 'image', 'max_images': 1}

    Raises:
        GenerationError: a value out of its range.
    """
    known = {field.name for field in fields(SamplingOptions)}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"unknown sampling options {unknown}; known are {sorted(known)}")
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("mode") == "image":
        said.setdefault("max_images", max(1, said.get("min_images", 1)))
    greedy = {"image_temperature": 0.0} if said.get("image_beams", 1) > 1 else {}
    SamplingOptions(**(greedy | said))
    return said


def with_role(bundle: Bundle, parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts as the model can read them: one that cannot write who speaks gets a plain document."""
    role: Role = "user" if bundle.vocabulary.converses else "document"
    return tuple(replace(part, role=role) for part in parts)


def with_hole(parts: Sequence[Part], hole: Hole) -> tuple[Part, ...]:
    """A plain document with a hole where the text says ``<mask>``. The spaces before a word belong to it, so that they
    are the hole's to fill; around an image there are none.

    >>> before, hole, after = with_hole([TextPart("A <mask> cat")], "text")
    >>> before.text, hole.kind, after.text
    ('A', 'text', ' cat')
    """
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, TextPart):
            found.append(replace(part, role="document"))
            continue
        *before, last = part.text.split(HOLE)
        for piece in before:
            found += [TextPart(piece.rstrip(" ")), MaskPart(hole)]
        found.append(TextPart(last))
    if hole == "image":
        found = [replace(part, text=part.text.strip()) if isinstance(part, TextPart) else part for part in found]
    return tuple(part for part in found if not isinstance(part, TextPart) or part.text)


def check_drawable(bundle: Bundle, options: SamplingOptions) -> None:
    """Raises GenerationError if a reply could hold an image that nothing here can turn into pixels, or at a size that
    the model does not make."""
    vocabulary = bundle.vocabulary
    if not vocabulary.codes_per_image or options.mode == "text" or not options.max_images:
        return
    if bundle.image is None:
        raise GenerationError(
            f"{bundle.path}: the model makes images and has no image tokenizer; add its image_tokenizer folder, or use "
            "mode text"
        )
    if not bundle.image.makes_images:
        raise GenerationError(
            f"{bundle.path}: the image tokenizer has an encoder only and cannot make the model's images; use one with "
            "its decoder (`jam convert vqgan.ckpt --out FOLDER`), or mode text"
        )
    rules_of(bundle, options)  # a size of images that it does not make


def write_replies(out: Path, replies: Sequence[tuple[Reply, dict]]) -> None:
    """``out.json`` and ``image-0.png``, ... of replies one after another, in a folder that appears when whole; what
    stands beside a reply goes into the entries of its images. A filled prompt's own images are saved as given."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(out)
    folder = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        entries: list[dict] = []
        for reply, more in replies:
            images = iter(reply.images)
            for part in reply.document.parts:
                if isinstance(part, TextPart):
                    entries.append({"type": "text", "text": part.text})
                    continue
                name = f"image-{sum(entry['type'] == 'image' for entry in entries)}.png"
                (part.image if isinstance(part, ImagePart) else next(images)).save(folder / name)
                entries.append({"type": "image", "path": name} | more)
        (folder / "out.json").write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(out)
        raise
