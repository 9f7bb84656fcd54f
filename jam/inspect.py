"""``jam inspect``: what a checkpoint is, and which methods can fuse two of them. Headers only, no torch.

One folder: family, sizes, parameters, types, vocabulary spans, image tokenizer; a fused one also shows its parents. Two
folders: every merge method with what it would preserve, or what stands in its way. Weights are never read, so
nothing is said about whether the parents are related or any good.
"""

from pathlib import Path

from jam.checkpoint import Checkpoint, open_checkpoint
from jam.errors import CheckpointError, JamError, printable
from jam.floats import LONG
from jam.layouts import ModelFolder, layout_of, open_model
from jam.models.families import FAMILIES, check_tensors, family_of
from jam.models.family import Family
from jam.tokens.vocabulary import Vocabulary
from merge.plan import read_parent
from merge.recipe import MergeRecipe, WidthSection
from merge.run import METHODS
from merge.union import Pair

IMAGE_NETWORKS = ("vqgan", "emu3_vqgan")
Facts = list[tuple[str, str]]


def run_inspect(paths: list[Path]) -> None:
    """Print what one or two checkpoint folders are, to stdout.

    Raises:
        CheckpointError: a folder that is missing, incomplete or damaged; for two, one that cannot be a parent.
        JamError: another number of paths than one or two.
    """
    if not 1 <= len(paths) <= 2:
        raise JamError(f"{len(paths)} paths; one checkpoint folder or two are required, name them")
    pages = [(str(path), describe_folder(path)) for path in paths]
    if len(paths) == 2:
        pages.append(("fusing them", describe_pair(*paths)))
    for title, facts in pages:
        _print(title, facts)


def _print(title: str, facts: Facts) -> None:
    width = max(len(name) for name, _ in facts)
    print(title)
    for name, value in facts:
        print(f"  {name:<{width}}  {' '.join(printable(str(value)).splitlines())}")


def describe_folder(path: Path) -> Facts:
    """What a folder is. Raises CheckpointError when headers and configuration disagree."""
    checkpoint = open_checkpoint(path)
    stored = sum(info.end - info.begin for info in checkpoint.tensors.values())
    dtypes = ", ".join(LONG.get(dtype, dtype) for dtype in checkpoint.dtypes)
    size: Facts = [
        ("parameters", f"{checkpoint.parameters:,} in {len(checkpoint.tensors)} tensors"),
        ("stored as", f"{dtypes}, {stored:,} bytes"),
    ]
    if checkpoint.config.get("model_type") in IMAGE_NETWORKS:
        return [("image tokenizer", _image_network(checkpoint)), *size]
    named = any((checkpoint.path / name).is_file() for name in ("jam.json", "tokenizer.json"))
    if not named and layout_of(checkpoint) is None:
        unknown = "neither jam.json nor tokenizer.json; one is required to know what the ids mean"
        return [*_architecture(checkpoint), *size, ("vocabulary", unknown)]
    model = open_model(path)
    facts: Facts = [] if model.layout is None else [("layout", f"{model.layout}, as its owner ships it")]
    return [*facts, *_architecture(model.checkpoint), *size, *_vocabulary(model)]


def _image_network(checkpoint: Checkpoint) -> str:
    """Raises CheckpointError for a configuration without a vqgan's sizes."""
    config = checkpoint.config
    side, codebook = config.get("resolution"), config.get("n_embed", config.get("codebook_size"))
    scales = config.get("ch_mult", config.get("channel_multiplier"))
    patch = config.get("patch", 1)
    if not all(type(value) is int and value > 0 for value in (side, codebook, patch)) or not isinstance(scales, list):
        raise CheckpointError(
            f"{checkpoint.path}/config.json: no sizes of a {config['model_type']} network; the configuration of an "
            "image tokenizer is required, restore it"
        )
    codes = (side // patch // 2 ** (len(scales) - 1)) ** 2
    return f"{codes} codes of {codebook}, {side} px; give it to --image-tokenizer"


def _architecture(checkpoint: Checkpoint) -> Facts:
    config = checkpoint.config
    if config.get("model_type") == "jam_cross":
        if absent := [key for key in ("text_config", "image_config", "exchanges", "tables") if key not in config]:
            raise CheckpointError(
                f"{checkpoint.path}/config.json: no {absent[0]}; a whole configuration is required, restore it"
            )
        facts: Facts = [("family", "jam_cross, two towers joined by gated cross-attention")]
        contexts: list[int] = []
        try:
            for side in ("text", "image"):
                tower = config[f"{side}_config"]
                family = family_of(tower, str(checkpoint.path))
                facts.append((f"{side} tower", _sizes(family, tower)))
                contexts.append(family.sizes(tower).positions)
            pairs = ", ".join(f"{i}|{j}" for i, j in config["exchanges"])
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.path}/config.json: no jam_cross configuration ({error}); restore the file"
            ) from None
        facts.append(("context", f"{min(contexts)} positions, the fewer of both towers"))
        return [*facts, ("exchanges", f"after layers {pairs}"), ("tables", config["tables"])]
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        return [("family", f"{config.get('model_type')}, which cannot be a parent; known families are {known}")]
    family = family_of(config, str(checkpoint.path))
    check_tensors(checkpoint, family)
    return [("family", f"{family.model_type} ({family.architecture})"), ("sizes", _sizes(family, config))]


def _sizes(family: Family, config: dict) -> str:
    sizes = family.sizes(config)
    heads = f"{sizes.heads} heads of {sizes.head_dim}"
    if sizes.kv_heads != sizes.heads:
        heads += f" ({sizes.kv_heads} key/value)"
    head = "tied head" if sizes.tied else "own head"
    return (
        f"{sizes.layers} layers, width {sizes.model}, {heads}, feed-forward {sizes.ffn}, {sizes.vocab} ids, "
        f"{sizes.positions} positions, {head}"
    )


def _vocabulary(model: ModelFolder) -> Facts:
    jam = model.jam
    shown = [f"{span.kind} [{span.start}, {span.stop})" for span in jam.vocabulary.spans]
    spans = ", ".join(shown if len(shown) <= 8 else [*shown[:6], f"... {len(shown)} spans in all"])
    sizes = jam.vocabulary.sizes
    named = [f"{name} {index}" for name, index in jam.vocabulary.controls.items() if index not in sizes.values()]
    controls = ", ".join([*named, *([f"size_{min(sizes)} to size_{max(sizes)} ({len(sizes)})"] if sizes else [])])
    facts: Facts = [("vocabulary", spans), ("controls", controls), ("turns", _turns(jam.vocabulary))]
    codes = f"{jam.vocabulary.codes_per_image} codes of {jam.vocabulary.codebook_size}"
    codes += " in a square, or any size" if jam.vocabulary.framed else ""
    if jam.image_tokenizer is not None:
        network = open_checkpoint(model.checkpoint.path / jam.image_tokenizer)
        size = f"{network.config.get('resolution')} px, VQ of {network.parameters:,} parameters"
        facts += [("images", f"{codes}, {size}")]
    elif model.passengers is not None:
        facts += [("images", f"{codes}, VQ of {model.passengers.parameters:,} parameters among the weights")]
    else:
        facts += [("images", "none" if jam.vocabulary.image_span is None else f"{codes}, no image tokenizer")]
    facts += [("note", note) for note in (*model.notes, *([model.lacks] if model.lacks else []))]
    if jam.fusion is not None:
        facts.append(("fused by", ", ".join(f"{key} {value}" for key, value in jam.fusion.items())))
    return facts


def _turns(vocabulary: Vocabulary) -> str:
    if vocabulary.turns is not None:
        return "from its chat template"
    return "user and assistant controls" if vocabulary.converses else "none"


def describe_pair(first: Path, second: Path) -> Facts:
    """For every method, what it would preserve or why it cannot. The folder with image ids is the image parent."""
    paths = [first, second]
    spans = [open_model(path).jam.vocabulary.image_span for path in paths]
    if spans[0] is not None and spans[1] is None:
        paths.reverse()
    pair = Pair(read_parent(paths[0], "text"), read_parent(paths[1], "image"))
    facts: Facts = [("text parent", str(paths[0])), ("image parent", str(paths[1]))]
    if pair.obstacle() is None and not pair.union.same:
        counted = pair.union.figures()
        facts.append(
            (
                "tokenizers",
                f"differ: the text parent's is kept; of its {counted['text_ids']} text ids the image parent has "
                f"{counted['copied']} as one token, {counted['averaged']} as several, {counted['without_source']} not",
            )
        )
    for method in METHODS:
        facts.append((method, _verdict(method, pair)))
    return facts


def _verdict(method: str, pair: Pair) -> str:
    recipes = {"": MergeRecipe(method=method, out=Path("out"))}
    if method == "width":
        zero = MergeRecipe(method="width", out=Path("out"), width=WidthSection(off_diagonal="zero"))
        recipes[" with width.off_diagonal=zero"] = zero
    for condition, recipe in recipes.items():
        if not METHODS[method].obstacles(pair, recipe):
            plan = METHODS[method].plan(pair, recipe)
            context = ""
            if method == "cross":
                context = f"; context {min(pair.text.sizes.positions, pair.image.sizes.positions)} positions"
            return f"yes{condition}, {plan.parameters:,} parameters{context}; {plan.preserves}"
    reasons = METHODS[method].obstacles(pair, next(iter(recipes.values())))
    return f"no: {'; '.join(reasons)}"
