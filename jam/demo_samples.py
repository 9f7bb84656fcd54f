"""What the demo shows and measures on held-out data: losses, pictures for captions, replies to questions.

All choices of rows are even strides through the shipped splits: fixed, spread over styles and subjects, and never
picked by looking at a result. Each model's samples come from one seed.
"""

from pathlib import Path

from PIL import Image

from finetune.data import mini_data
from finetune.data.held_out import held_out_captions, held_out_pictures, held_out_texts, spread
from jam.decode.engine import generate
from jam.decode.job import encode_images
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import Reply, ReplyStream
from jam.demo_bench import Advance, Settings
from jam.document import CodesPart, Document, TextPart, from_messages
from jam.evaluate.loss import evaluate_captions, evaluate_text
from jam.models.load import Bundle, load_bundle
from jam.tokens.image import ImageTokenizer

PICTURE_SPLITS = ("combination", "label")
QUESTION_SPLITS = ("wording", "subject")
QUESTION_KINDS = ("explain", "what-is-this", "two-images", "draw")  # asked first; other kinds follow by name


def held_out_losses(folder: Path, image_parent: Path, settings: Settings, advance: Advance) -> dict:
    """Both losses of a model on both splits; ``image`` is None for a model without image head.

    Images become codes through the image parent's tokenizer, which every fusion carries unchanged.
    """
    bundle = load_bundle(folder)
    tokenizer = ImageTokenizer.load(image_parent / "image_tokenizer")
    result: dict = {"parameters": sum(parameter.numel() for parameter in bundle.model.parameters())}
    for number, split in enumerate(("validation", "test")):
        start = number / 2
        texts = held_out_texts(split, settings.text_bytes)
        captions = held_out_captions(split, settings.captions, tokenizer)
        result[split] = {
            "text": evaluate_text(bundle, texts, progress=lambda d, n, start=start: advance(start + d / n / 4)),
            "image": evaluate_captions(
                bundle, captions, progress=lambda d, n, start=start: advance(start + 0.25 + d / n / 4)
            ),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "captions": len(captions),
        }
    return result


def answers(bundle: Bundle, prompts: list[Document], options: SamplingOptions, advance: Advance) -> list[Reply]:
    """The replies to prompts, in one batch."""
    stream, reached = ReplyStream(bundle, prompts, options), 0
    for step in generate(bundle, prompts, options):
        stream.push(step)
        reached = max(reached, step.position + 1)  # an image that is searched for comes all at once
        advance(min(1.0, reached / (options.max_tokens or reached)))
    return [stream.reply(index) for index in range(len(prompts))]


def _save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def draw_pictures(folder: Path, target: Path, settings: Settings, advance: Advance) -> list[dict]:
    """One image for each of some held-out captions, beside the real one.

    Returns:
        rows {"caption", "split", "real", "image"}; files lie in ``target``, ``image`` is None when none was drawn.
    """
    bundle = load_bundle(folder)
    chosen = [row for split in PICTURE_SPLITS for row in held_out_pictures(split, settings.pictures)]
    prompts = [Document((TextPart(mini_data.caption_for(row)),)) for row in chosen]
    codes = bundle.vocabulary.codes_per_image
    options = default_options(bundle, mode="image", max_images=1, max_tokens=codes + 3, seed=settings.seed)
    replies = answers(bundle, prompts, options, advance)
    archive, result = mini_data.ImageArchive(), []
    for number, (row, reply) in enumerate(zip(chosen, replies, strict=True)):
        result.append(
            {
                "caption": mini_data.caption_for(row),
                "split": row["split"],
                "real": _save(archive.open(row["file"]), target / f"picture-{number}-real.png"),
                "image": _save(reply.images[0], target / f"picture-{number}.png") if reply.images else None,
            }
        )
    return result


def held_out_questions(count: int) -> list[dict]:
    """First turns of held-out conversations, ``count`` a split, the kinds of question in turn."""
    chosen = []
    for split in QUESTION_SPLITS:
        by_kind: dict[str, list[dict]] = {}
        for row in mini_data.conversations(split):
            by_kind.setdefault(row["kind"], []).append(row)
        kinds = [kind for kind in QUESTION_KINDS if kind in by_kind]
        kinds += sorted(by_kind.keys() - set(kinds))
        share = -(-count // max(1, len(kinds)))
        columns = [spread(by_kind[kind], share) for kind in kinds]
        in_turn = [column[at] for at in range(share) for column in columns if at < len(column)]
        chosen += in_turn[:count]
    return chosen


def write_replies(folder: Path, target: Path, settings: Settings, advance: Advance) -> list[dict]:
    """A model's replies to held-out questions.

    Returns:
        rows {"split", "kind", "question", "reply"}; both are lists of {"type": "text", "text"} and {"type": "image",
        "path"} with files in ``target``.
    """
    bundle = load_bundle(folder)
    archive, rows = mini_data.ImageArchive(), held_out_questions(settings.questions)
    questions = [from_messages(row["messages"][:1], archive.open) for row in rows]
    prompts = [encode_images(bundle, question) for question in questions]
    options = default_options(bundle, max_images=2, max_tokens=settings.reply_tokens, seed=settings.seed)
    replies = answers(bundle, prompts, options, advance)
    result = []
    for number, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        blocks = row["messages"][0]["content"]
        blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
        question = []
        for at, block in enumerate(blocks):
            if block["type"] == "image":
                name = _save(archive.open(block["path"]), target / f"question-{number}-{at}.png")
                block = {"type": "image", "path": name}
            question.append(block)
        result.append(
            {
                "split": row["split"],
                "kind": row["kind"],
                "question": question,
                "reply": _blocks(reply, target, f"reply-{number}"),
            }
        )
    return result


def _blocks(reply: Reply, target: Path, stem: str) -> list[dict]:
    blocks, images = [], iter(reply.images)
    for at, part in enumerate(reply.document.parts):
        if isinstance(part, CodesPart):
            blocks.append({"type": "image", "path": _save(next(images), target / f"{stem}-{at}.png")})
        else:
            blocks.append({"type": "text", "text": part.text})
    return blocks
