"""Every owner's folder as an image parent: each tensor claimed once, the step-0 theorem, itself with itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Emu3VQVAE

from jam import layouts
from jam.checkpoint import WEIGHTS
from jam.decode.job import prepare
from jam.decode.options import SamplingOptions, default_options
from jam.document import Document, TextPart
from jam.errors import CheckpointError, GenerationError, MergeError
from jam.inspect import describe_folder
from jam.layouts import open_model
from jam.models.families import check_tensors, family_of
from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.tokens.render import IMAGE_HEAD, render
from jam.tokens.vocabulary import JamFile, Span
from merge.recipe import MergeRecipe
from merge.run import run_merge
from merge.union import owned
from tests.layouts.owners import (
    CODES,
    OWNERS,
    SMALL,
    chameleon_owner,
    emu3_owner,
    liquid_owner,
    lvm_owner,
    plain,
    raw_logits,
    simplear_owner,
    write_tokenizer,
)
from tests.step_zero import draws
from tests.tiny import edit_json, tiny_document, tiny_pair, tiny_parent

Owned = tuple[str, Path]


@pytest.fixture(scope="module", autouse=True)
def small(request: pytest.FixtureRequest):
    """Layouts whose owners have codebooks of 16 codes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "LAYOUTS", SMALL)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=OWNERS)
def owner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Owned:
    return request.param, OWNERS[request.param](tmp_path_factory.mktemp("owner") / request.param)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without jam.json."""
    folder = tiny_parent(tmp_path_factory.mktemp("llm") / "llm", False, 1, "llama", num_hidden_layers=4)
    (folder / "jam.json").unlink()
    return folder


@pytest.fixture(scope="module")
def fused(owner: Owned, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / owner[0]
    run_merge(MergeRecipe(method="cross", text=llm, image=owner[1], out=out, dtype="float32"))
    return out


VOCABULARIES = {
    "Chameleon": ((4, 20), {"bos": 0, "pad": 1, "eos": 2, "begin_image": 21, "end_image": 20, "end_turn": 22}),
    "Emu3": (
        (9, 25),
        {"bos": 0, "eos": 1, "pad": 2}
        | {"begin_image": 3, "end_image": 4, "begin_codes": 5, "end_row": 6, "end_frame": 7},
    ),
    "Liquid": ((286, 302), {"pad": 0, "eos": 1, "bos": 2, "begin_image": 3, "end_image": 4, "unconditional": 5}),
    "SimpleAR": ((286, 302), {"pad": 0, "eos": 1, "bos": 282, "begin_image": 284, "end_image": 285}),
    "LVM": ((0, 16), {"begin_image": 16, "end_image": 17}),
}


def test_the_family_finds_every_tensor_and_the_ids_their_names(owner: Owned):
    name, folder = owner
    model = open_model(folder)
    axes = check_tensors(model.checkpoint, family_of(model.checkpoint.config, name))
    passengers = {} if model.passengers is None else model.passengers.tensors
    claimed = [info.name for info in (*model.checkpoint.tensors.values(), *passengers.values())]
    assert sorted(claimed) == sorted(load_file(folder / WEIGHTS)) and set(axes) == set(model.checkpoint.tensors)
    span, controls = VOCABULARIES[name]
    assert model.layout == name and model.jam.vocabulary.image_span == Span("image", *span)
    assert model.jam.vocabulary.controls == controls
    assert model.jam.unconditional[-1] == "begin_image" and model.jam.image_tokenizer is None
    assert ("layout", f"{name}, as its owner ships it") in describe_folder(folder)


SAMPLING = {  # docs/decoding.md
    "Chameleon": {
        **{"text_temperature": 0.7, "text_top_p": 0.9, "text_repetition_penalty": 1.2},
        **{"image_temperature": 0.7, "image_top_p": 0.9, "guidance_scale": 3.0, "image_guidance_scale": 1.2},
    },
    "Emu3": {"image_temperature": 1.0, "image_top_p": 1.0, "image_top_k": 2048, "guidance_scale": 3.0},
    "Liquid": {"image_temperature": 0.99, "image_top_p": 0.96, "image_top_k": 4096, "guidance_scale": 7.0},
    "SimpleAR": {"image_temperature": 1.0, "image_top_p": 1.0, "guidance_scale": 6.0},
    "LVM": {"image_temperature": 1.0, "image_top_p": 1.0, "guidance_scale": 1.0},
}


def test_the_owners_own_sampling_is_the_default_and_what_is_said_wins(owner: Owned, llm: Path, fused: Path):
    name, folder = owner
    assert open_model(folder).jam.sampling == SAMPLING[name]
    drawing = {key: value for key, value in SAMPLING[name].items() if not key.startswith("text_")}
    assert JamFile.read(fused).sampling == drawing  # the language model writes as it did
    bundle = load_bundle(fused)
    assert default_options(bundle) == SamplingOptions(**drawing)
    said = default_options(bundle, image_temperature=0.3, guidance_scale=2.0, text_top_k=7)
    assert said == SamplingOptions(**drawing | {"image_temperature": 0.3, "guidance_scale": 2.0, "text_top_k": 7})
    assert default_options(bundle, guidance="cd_k").image_guidance_scale is None  # which takes two streams
    assert not default_options(bundle, guidance_scale=1.0).guided
    assert default_options(bundle, image_beams=2).image_temperature == 0
    assert open_model(llm).jam.sampling == {} and default_options(load_bundle(llm)) == SamplingOptions()


@torch.inference_mode()
def test_step_zero_keeps_the_owners_codes_and_the_llms_text(owner: Owned, llm: Path, fused: Path):
    name, folder = owner
    both, alone = load_bundle(fused, torch.float64), load_bundle(llm, torch.float64)
    words = torch.tensor([[0, *alone.text.encode("the cat and the other one on it"), 2]])
    known = torch.from_numpy(owned(alone.vocabulary, alone.vocabulary.size))
    wanted = alone.model(words).logits[..., known].log_softmax(-1)
    kept = both.logits(words, next_heads(words, both.vocabulary))[0]
    kept = kept[..., : alone.vocabulary.size][..., known].log_softmax(-1)
    assert (wanted - kept).abs().max() < 1e-6 and wanted.std() > 0.1

    theirs, joint = open_model(folder).jam.vocabulary, both.vocabulary
    number = {index: joint.controls[control] for control, index in theirs.controls.items()}
    start, at = theirs.image_span.start, joint.image_span.start
    number |= {start + code: at + code for code in range(CODES)}
    begin, end = theirs.controls["begin_image"], theirs.controls["end_image"]
    opening = [theirs.controls[control] for control in ("bos", "unconditional") if control in theirs.controls]
    codes = [start + code for code in (3, 0, 15, 7, 7)]
    ids = torch.tensor([[*opening, begin, *codes, end, begin, *codes[::-1]]])
    shown = torch.tensor([[number[index] for index in ids[0].tolist()]])
    heads = next_heads(ids, theirs)
    assert (next_heads(shown, joint) == heads).all()
    drawing = heads == IMAGE_HEAD
    own = raw_logits(name, folder, ids)[drawing][:, list(number)].log_softmax(-1)
    drawn = both.logits(shown, heads)[0][drawing][:, list(number.values())].log_softmax(-1)
    # Emu3's images open with a size in text, and these do not go so far: the text head speaks there
    assert drawing.sum() == (10 if name == "Emu3" else 12) and own.std() > 0.1 and (own - drawn).abs().max() < 1e-6


def test_the_report_has_a_fate_for_every_tensor_and_the_owners_notes(owner: Owned, fused: Path):
    name, folder = owner
    report, model = json.loads((fused / "report.json").read_text()), open_model(folder)
    assert set(report["inputs"]["image"]) == set(load_file(folder / WEIGHTS))
    assert set(report["notes"]) >= {*model.notes, *([model.lacks] if model.lacks else [])}
    assert (fused / "image_tokenizer").is_dir() == (model.passengers is not None)
    assert JamFile.read(fused).image_tokenizer == ("image_tokenizer" if model.passengers else None)
    rows = report["text_rows_of_image_parent"]
    assert rows["without_source"] == (280 if name == "LVM" else 0)


@pytest.mark.parametrize("name", ["Chameleon", "Liquid", "SimpleAR", "LVM"])
def test_a_fused_model_writes_down_and_answers_with_images(name: str, llm: Path, tmp_path: Path):
    owner = OWNERS[name](tmp_path / "owner")
    run_merge(MergeRecipe(method="cross", text=llm, image=owner, out=tmp_path / "out"))
    bundle = load_bundle(tmp_path / "out")
    tokens = render(tiny_document(), bundle.vocabulary, bundle.text)
    assert (bundle.vocabulary.kinds()[tokens.ids] == 2).sum() == 4
    job = prepare(bundle, [Document((TextPart("a cat"),))], SamplingOptions(mode="image", guidance_scale=2.0))
    bundle.image = None  # codes alone: none of these folders can make pictures
    assert draws(bundle) == 4
    names = {"Liquid": ("bos", "unconditional")}.get(name, ("bos",))
    assert job.prefix == [bundle.vocabulary.controls[control] for control in names]


def test_liquid_averages_with_the_gemma_that_it_grew_from(tmp_path: Path):
    """Its tokenizer is Gemma's with three unused tokens renamed."""
    owner, base, out = liquid_owner(tmp_path / "owner"), tmp_path / "base", tmp_path / "out"
    names = ("<pad>", "<eos>", "<bos>", "<unused0>", "<unused1>", "<unused2>")
    size = write_tokenizer(base, list(names), names[:3])
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    plain("gemma", base, 12, size, head_dim=16, tie_word_embeddings=True, **ids)
    run_merge(MergeRecipe(method="uniform", text=base, image=owner, out=out, dtype="float32"))
    name = "model.embed_tokens.weight"
    merged, ours, theirs = (load_file(folder / WEIGHTS)[name] for folder in (out, base, owner))
    bundle = load_bundle(out)
    span, controls = bundle.vocabulary.image_span, bundle.vocabulary.controls
    assert torch.equal(merged[6:size], (ours[6:size] + theirs[6:size]) / 2)
    assert torch.equal(merged[span.start :], theirs[size:])
    assert torch.equal(merged[controls["unconditional"]], theirs[5]) and controls["unconditional"] >= size


def test_emu3_keeps_the_rows_and_the_network_of_its_images(llm: Path, tmp_path: Path):
    owner = emu3_owner(tmp_path / "owner")
    run_merge(MergeRecipe(method="cross", text=llm, image=owner, out=tmp_path / "out", dtype="float32"))
    bundle = load_bundle(tmp_path / "out")
    table = load_file(tmp_path / "out" / WEIGHTS)["image.model.embed_tokens.weight"]
    stored = load_file(owner / WEIGHTS)["text_model.model.embed_tokens.weight"]
    for control in ("begin_codes", "end_row", "end_frame"):
        theirs = open_model(owner).jam.vocabulary.controls[control]
        assert torch.equal(table[bundle.vocabulary.controls[control]], stored[theirs])
    assert bundle.image.resolution == 720 and bundle.vocabulary.codes_per_image == 360**2
    size = 360 * 361 + len(bundle.text.encode("360*360")) + 4
    with pytest.raises(GenerationError, match=f"context 256; the reply needs room for {size + 1} more"):
        prepare(bundle, [Document((TextPart("a cat"),))], SamplingOptions(mode="image"))
    prepare(bundle, [Document((TextPart("a cat"),))], SamplingOptions(max_tokens=8))
    network = Emu3VQVAE.from_pretrained(tmp_path / "out/image_tokenizer")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, load_file(owner / WEIGHTS)[f"vqmodel.{name}"]), name


@pytest.mark.parametrize("name", ["Emu3", "Liquid", "SimpleAR"])  # Chameleon: test_chameleon; LVM cuts no text
def test_the_mean_with_itself_is_itself(name: str, tmp_path: Path):
    owner = OWNERS[name](tmp_path / "owner")
    run_merge(MergeRecipe(method="uniform", text=owner, image=owner, out=tmp_path / "out", dtype="float32"))
    merged, stored = load_file(tmp_path / "out" / WEIGHTS), load_file(owner / WEIGHTS)
    for ours, info in open_model(owner).checkpoint.tensors.items():
        assert torch.equal(merged.pop(ours), stored[info.name]), ours
    assert not merged
    bundle = load_bundle(tmp_path / "out")
    assert bundle.vocabulary == open_model(owner).jam.vocabulary
    card = (tmp_path / "out/README.md").read_text()
    assert ("AutoModelForCausalLM" in card) == (name != "Emu3")


def test_the_other_spelling_of_emu3s_tensors_is_read_too(tmp_path: Path):
    owner = emu3_owner(tmp_path / "owner")
    wanted = open_model(owner)
    from safetensors.torch import save_file

    renamed = {
        name.replace("text_model.model.", "model.text_model.")
        .replace("text_model.lm_head", "lm_head")
        .replace("vqmodel.", "model.vqmodel."): tensor
        for name, tensor in load_file(owner / WEIGHTS).items()
    }
    save_file(renamed, owner / WEIGHTS)
    found = open_model(owner)
    for part in ("checkpoint", "passengers"):
        assert set(getattr(found, part).tensors) == set(getattr(wanted, part).tensors)
    with pytest.raises(CheckpointError, match=r"with model\.text_model\.embed_tokens\.weight for model\.embed_tokens"):
        load_bundle(owner)


def test_lvm_fuses_with_a_llama_of_its_shape_but_is_no_text_parent(tmp_path: Path):
    owner, out = lvm_owner(tmp_path / "owner"), tmp_path / "out"
    text = tiny_parent(tmp_path / "text", False, 2, "llama", num_hidden_layers=3, tie_word_embeddings=False)
    run_merge(MergeRecipe(method="uniform", text=text, image=owner, out=out, dtype="float32"))
    merged, ours = load_file(out / WEIGHTS), load_file(text / WEIGHTS)
    codes = JamFile.read(out).vocabulary.image_span
    theirs = load_file(owner / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name][:288], ours[name])
        assert torch.equal(merged[name][codes.start : codes.stop], theirs[name][:CODES])
    load_bundle(out)
    recipe = MergeRecipe(method="cross", text=text, image=owner, out=tmp_path / "shared", cross={"tables": "shared"})
    with pytest.raises(MergeError, match="the image parent has no text; use tables=separate"):
        run_merge(recipe)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        run_merge(MergeRecipe(method="uniform", text=owner, image=owner, out=tmp_path / "none"))


def test_a_plain_model_and_half_an_owners_are_not_taken_for_one(tmp_path: Path):
    simple = simplear_owner(tmp_path / "simple")
    raw = json.loads((simple / "tokenizer.json").read_text())
    text = (simple / "tokenizer.json").read_text().replace("<|soi|>", "<|other|>")
    (simple / "tokenizer.json").write_text(text)
    model = open_model(simple)
    assert model.layout is None and model.jam.vocabulary.image_span is None and raw
    lvm = lvm_owner(tmp_path / "lvm")
    (lvm / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"neither jam\.json nor tokenizer\.json"):
        open_model(lvm)
    with pytest.raises(MergeError, match=r"no image ids; use an image-text model, or name its image ids in jam\.json"):
        run_merge(MergeRecipe(method="cross", text=tiny_pair(tmp_path)[0], image=simple, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"vocab_size": 301},
            "config.json has 301 vocabulary rows; Liquid has 16 image codes after its",
        ),
        ("tokenizer.json", {"model.vocab.Ġthe": 300}, "whose number is unclear, write jam.json"),
    ],
)
def test_rows_that_are_not_the_owners_are_refused(tmp_path: Path, file: str, change: dict, message: str):
    owner = liquid_owner(tmp_path / "owner")
    edit_json(owner / file, change)
    with pytest.raises(CheckpointError, match=message):
        open_model(owner)


@pytest.mark.parametrize(
    "change",
    [{"vq_config": 5}, {"vq_config": [1]}, *({"vq_config.channel_multiplier": bad} for bad in (0, None, [1.5], []))],
)
def test_an_image_network_of_emu3_that_is_none_is_refused(tmp_path: Path, change: dict):
    owner = emu3_owner(tmp_path / "owner")
    edit_json(owner / "config.json", change)
    with pytest.raises(CheckpointError, match="vq_config"):
        open_model(owner)


def test_rows_after_the_codes_are_padding(tmp_path: Path):
    owner = simplear_owner(tmp_path / "owner")
    edit_json(owner / "config.json", {"vocab_size": 320})
    assert open_model(owner).jam.vocabulary.spans[-2:] == (Span("image", 286, 302), Span("control", 302, 320))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_map": {"a": 89}}, r"no token is named <\|visual token 000000\|>"),
        ({"vocabulary_map.<|visual token 000016|>": 310}, "image ids start at 9 and lack 25"),
        ({"vq_config.codebook_size": 17}, r"is \[16, 4\], vq_config asks for \[17, 4\]"),
    ],
)
def test_an_emu3_that_does_not_hold_is_refused(tmp_path: Path, change: dict, message: str):
    owner = emu3_owner(tmp_path / "owner")
    edit_json(owner / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        open_model(owner)


def test_absent_keys_have_transformers_values(tmp_path: Path):
    """Older transformers leaves keys out of nested configurations that have their class's value."""
    from transformers import Emu3TextConfig, Emu3VQVAEConfig

    from jam.layouts import emu3

    for ours, theirs in ((emu3._TEXT, Emu3TextConfig()), (emu3._NETWORK, Emu3VQVAEConfig())):
        for key, value in ours.items():
            assert getattr(theirs, key) in (value, tuple(value) if isinstance(value, list) else value)
    owner = chameleon_owner(tmp_path / "owner")
    raw = json.loads((owner / "config.json").read_text())
    wanted = open_model(owner).passengers.config
    del raw["vq_config"]["attn_type"], raw["vq_config"]["double_latent"], raw["vq_config"]["in_channels"]
    (owner / "config.json").write_text(json.dumps(raw))
    assert open_model(owner).passengers.config == wanted


def test_a_plain_llama_with_as_many_rows_is_no_lvm(tmp_path: Path):
    folder = plain("llama", tmp_path / "llama", 0, CODES + 6)
    with pytest.raises(CheckpointError, match=r"neither jam\.json nor tokenizer\.json"):
        open_model(folder)
