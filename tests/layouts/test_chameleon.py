"""Chameleon's folder: the map between image ids and codes, against transformers', and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ChameleonForConditionalGeneration
from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

from jam.checkpoint import WEIGHTS
from jam.errors import CheckpointError, MergeError
from jam.layouts import open_model
from jam.layouts.chameleon import chameleon_vocabulary
from jam.layouts.vqgan import encoder_shapes
from jam.models.load import load_bundle
from jam.tokens.vocabulary import Span
from jam.tokens.vq import VQConfig, VQModel
from jam.tokens.vq_config import CODEBOOK
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.layouts.owners import CODES, chameleon_owner, image_words
from tests.tiny import edit_json


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chameleon_owner(tmp_path_factory.mktemp("chameleon") / "owner")


@pytest.fixture
def copied(tmp_path: Path, owner: Path) -> Path:
    """A copy to be damaged."""
    folder = tmp_path / "owner"
    folder.mkdir()
    for file in owner.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def retensor(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors, or remove them for None."""
    tensors = load_file(folder / WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def release() -> dict[str, int]:
    """The names and numbers of Chameleon-7B's special tokens, its image tokens shuffled."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *image_words(8192, 0), "<eoss>", "<racm3:break>"]
    words += [f"<reserved{index - 4:05d}>" for index in range(8198, 8830)]
    words += ["a", "Ġthe", "<", "</", "<>"]
    words[8711] = "<image>"
    return {word: index for index, word in enumerate(words)}


def test_the_releases_numbers():
    vocabulary, order = chameleon_vocabulary(release(), 65_536)
    assert vocabulary.image_span == Span("image", 4, 8196) and vocabulary.codes_per_image == 1024
    assert vocabulary.controls == {
        **{"bos": 0, "pad": 1, "eos": 2},
        **{"begin_image": 8197, "end_image": 8196, "end_turn": 8710},
    }
    assert vocabulary.spans[-2:] == (Span("text", 8830, 8835), Span("control", 8835, 65_536))
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(8192))


@pytest.mark.parametrize("words", [release(), dict(zip(image_words(CODES, 5), range(30, 46), strict=True))])
def test_the_map_is_that_of_transformers(words: dict[str, int]):
    words = {"<s>": 0, "</s>": 2, "<eoss>": 8196, "<racm3:break>": 8197} | words
    vocabulary, order = chameleon_vocabulary(words, 65_536)
    theirs = ChameleonImageVocabularyMapping(words | {"<image>": 8711})
    span = vocabulary.image_span
    assert theirs.image_tokens == list(range(span.start, span.stop))
    assert {span.start + k: int(code) for k, code in enumerate(order)} == theirs.bpe2img
    shown = torch.from_numpy(order)
    assert (theirs.convert_img2bpe(shown[None])[0] == torch.arange(span.start, span.stop)).all()
    assert (order != np.arange(len(order))).any()


def test_the_folder_is_the_family_and_an_image_network(owner: Path):
    model = open_model(owner)
    stored = load_file(owner / WEIGHTS)
    assert model.layout == "Chameleon" and model.jam.unconditional == ("bos", "begin_image")
    claimed = [info.name for part in (model.checkpoint, model.passengers) for info in part.tensors.values()]
    assert sorted(claimed) == sorted(stored)
    assert set(model.checkpoint.tensors) == {name for name in stored if not name.startswith("model.vqmodel.")}
    network = ChameleonForConditionalGeneration.from_pretrained(owner).model.vqmodel
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name: info.shape for name, info in model.passengers.tensors.items()} == shapes
    assert encoder_shapes(model.passengers.config) == shapes


@pytest.fixture(scope="module")
def averaged(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "out"
    run_merge(MergeRecipe(method="uniform", text=owner, image=owner, out=out, dtype="float32"))
    return out


def test_the_mean_with_itself_is_itself_and_its_pictures_have_the_owners_ids(owner: Path, averaged: Path):
    merged, stored = load_file(averaged / WEIGHTS), load_file(owner / WEIGHTS)
    assert set(merged) == set(open_model(owner).checkpoint.tensors)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in merged.items())
    bundle = load_bundle(averaged)
    theirs = ChameleonForConditionalGeneration.from_pretrained(owner).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    ids = bundle.vocabulary.image_ids(bundle.image.encode([Image.fromarray(pixels)]))
    with torch.inference_mode():
        wanted = theirs.model.get_image_tokens(bundle.image.pixels([Image.fromarray(pixels)]))
        known = theirs.lm_head(theirs.model(torch.tensor([[0, 21, *ids[0].tolist()]])).last_hidden_state)
        shown = bundle.model(torch.tensor([[0, 21, *ids[0].tolist()]])).logits
    assert ids.tolist() == wanted.tolist() and len(set(ids[0].tolist())) > 1
    assert torch.equal(shown, known)
    with pytest.raises(CheckpointError, match="an encoder only"):
        bundle.image.decode(np.zeros((1, 4), np.int64))


def test_the_report_names_every_tensor_and_the_card_the_right_loader(owner: Path, averaged: Path):
    report = json.loads((averaged / "report.json").read_text())
    assert list(report["inputs"]["image"]) and set(report["inputs"]["image"]) == set(load_file(owner / WEIGHTS))
    fates = report["inputs"]["image"]
    assert fates["model.vqmodel." + CODEBOOK].endswith("rows in the order of the image ids")
    assert fates["model.vqmodel.quant_conv.bias"] == "to image_tokenizer/quant_conv.bias"
    assert report["inputs"]["text"]["model.vqmodel.quant_conv.bias"] == "left out: another image tokenizer is taken"
    assert "has no decoder" in " ".join(report["notes"])
    card = (averaged / "README.md").read_text()
    assert "load_bundle" in card and "AutoModelForCausalLM" not in card


def test_a_width_merge_loads(owner: Path, tmp_path: Path):
    recipe = MergeRecipe(method="width", text=owner, image=owner, out=tmp_path / "out", width={"off_diagonal": "zero"})
    run_merge(recipe)
    bundle = load_bundle(tmp_path / "out")
    assert bundle.model.config.hidden_size == 64 and bundle.image.codebook_size == CODES


def whole_tokenizer(folder: Path, owner: Path, seed: int = 0, rows: np.ndarray | None = None) -> Path:
    """An image tokenizer with a decoder and the owner's codebook, as made of the file that its owner ships."""
    config = {key: value for key, value in open_model(owner).passengers.config.items() if key != "model_type"}
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VQModel(VQConfig(**(config | {"decoder": True})))
    book = load_file(owner / WEIGHTS)["model.vqmodel." + CODEBOOK]
    network.quantize.embedding.weight.data = book if rows is None else book[torch.from_numpy(rows)]
    network.save(folder)
    return folder


def test_a_given_image_tokenizer_takes_the_place_in_the_order_of_the_ids(owner: Path, tmp_path: Path):
    order = open_model(owner).code_order
    for name, rows in (("owners", None), ("ids", order), ("others", np.arange(CODES)[::-1].copy())):
        given = whole_tokenizer(tmp_path / name, owner, rows=rows)
        out = tmp_path / f"out-{name}"
        run_merge(MergeRecipe(method="uniform", text=owner, image=owner, image_tokenizer=given, out=out))
        written, book = load_file(out / "image_tokenizer" / WEIGHTS), load_file(owner / WEIGHTS)
        assert torch.equal(written[CODEBOOK], book["model.vqmodel." + CODEBOOK][torch.from_numpy(order)])
        assert load_bundle(out).image.decode(np.zeros((1, 4), np.int64))[0].size == (16, 16)
        report = json.loads((out / "report.json").read_text())
        assert report["image_tokenizer"] == f"{name}, as the recipe says"
        assert report["inputs"]["image"]["model.vqmodel.quant_conv.bias"].startswith("left out")
        assert "has no decoder" not in " ".join(report["notes"])


def test_a_merged_folders_image_tokenizer_may_be_replaced_later(owner: Path, averaged: Path, tmp_path: Path):
    given = whole_tokenizer(tmp_path / "given", owner)  # in its owner's order, the folder's own is in that of the ids
    recipe = MergeRecipe(method="uniform", text=averaged, image=averaged, image_tokenizer=given, out=tmp_path / "out")
    run_merge(recipe)
    written, before = (load_file(folder / "image_tokenizer" / WEIGHTS) for folder in (recipe.out, averaged))
    assert torch.equal(written[CODEBOOK], before[CODEBOOK]) and "decoder.conv_in.weight" in written


def test_an_image_tokenizer_of_another_model_is_refused(owner: Path, tmp_path: Path):
    given = whole_tokenizer(tmp_path / "given", owner, rows=np.maximum(np.arange(CODES), 1))
    recipe = MergeRecipe(method="uniform", text=owner, image=owner, image_tokenizer=given, out=tmp_path / "out")
    with pytest.raises(MergeError, match="its codebook is not that of the image parent's own image tokenizer"):
        run_merge(recipe)
    edit_json(given / "config.json", {"resolution": 32})
    with pytest.raises(MergeError, match="16 codes an image, the image parent has 4"):
        run_merge(recipe)
    edit_json(given / "config.json", {"n_embed": 8})
    with pytest.raises(MergeError, match="a codebook of 8 codes, the image parent has 16 image ids"):
        run_merge(recipe)
    with pytest.raises(MergeError, match=r"no tensor quantize\.embedding\.weight"):
        run_merge(recipe.model_copy(update={"image_tokenizer": owner}))


def test_lumina_is_known_by_its_flag(copied: Path):
    edit_json(copied / "config.json", {"mask_image_logits": False})
    model = open_model(copied)
    assert model.layout == "Lumina-mGPT" and model.jam.vocabulary.controls["end_row"] == 24
    drawing = {"image_temperature": 1.0, "image_top_p": 1.0, "image_top_k": 2000, "guidance_scale": 3.0}
    assert model.jam.sampling == {"text_temperature": 1.0, "text_top_p": 1.0, "text_top_k": 10} | drawing
    assert model.jam.vocabulary.framed and "--image-size" in model.notes[0]


def test_a_folder_with_its_own_file_is_taken_as_it_is(copied: Path):
    open_model(copied).jam.write(copied)
    model = open_model(copied)
    assert model.layout is None and model.passengers is None and "vq_config" in model.checkpoint.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_map": {}}, "vocabulary_map is a dict without numbered tokens"),
        ({"vocabulary_map": {"<s>": 0, "</s>": 2}}, r"no token is named IMGIMG\.\.\.Z"),
        ({"vocabulary_map.IMGIMGDZ": None}, "without numbered tokens"),
        ({"vocabulary_map.IMGIMGDZ": 300}, "is 300 in config.json's vocabulary_map and"),
        (
            {"vocabulary_map.IMGIMGQZ": 310, "vocab_size": 320},
            "image token IMGIMGQZ; IMGIMG, letters A to J and Z are required",
        ),
        ({"vocabulary_map.IMGIMGADZ": 310, "vocab_size": 320}, "code 3 has the ids"),
        ({"vocabulary_map.IMGIMGBIZ": 310, "vocab_size": 320}, "code 16 has no id"),
        ({"vocabulary_map.IMGIMGBGZ": 310, "vocab_size": 320}, "image ids start at 4 and lack 20"),
        ({"vocabulary_map.other": 305}, "token other has id 305, the table 305 rows"),
        ({"vq_config.num_embeddings": 17}, "16 image tokens, vq_config has 17 codes"),
        ({"vq_config.double_latent": True}, "double_latent is True; False is required"),
        ({"vq_config.base_channels": 64}, "conv_in.weight is \\[32, 3, 3, 3\\], vq_config asks for \\[64"),
        ({"vq_config.embed_dim": 0}, "embed_dim is 0; a whole number from 1"),
        ({"vq_config.channel_multiplier": []}, "a list of whole numbers is required"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": -1}, "a whole number from 1 to"),
        ({"vocab_size": 10**10}, "a whole number from 1 to"),
        ({"vq_config.num_res_blocks": 10**9}, "num_res_blocks is 1000000000; a whole number from 1 to 64"),
        ({"vq_config.resolution": 10**30}, "resolution is .*; a whole number from 1 to 1000000"),
        ({"vq_config.channel_multiplier": [1] * 99}, "16 or fewer"),
    ],
)
def test_a_configuration_that_does_not_hold_is_refused(copied: Path, change: dict, message: str):
    edit_json(copied / "config.json", change)
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(copied)
    assert "\n" not in str(error.value) and str(copied) in str(error.value)


def test_the_tokenizer_may_name_the_ids(copied: Path):
    wanted = open_model(copied).jam
    edit_json(copied / "config.json", {"vocabulary_map": None})
    assert open_model(copied).jam == wanted
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="neither vocabulary_map in config"):
        open_model(copied)


def test_two_tokens_under_one_id_are_refused():
    with pytest.raises(CheckpointError, match="tokens <eoss> and other have one id, 8196"):
        chameleon_vocabulary(release() | {"other": 8196}, 65_536)


def test_a_control_without_a_name_is_refused():
    words = {word: index for word, index in release().items() if word != "<racm3:break>"}
    with pytest.raises(CheckpointError, match="no token <racm3:break>, Chameleon's begin_image"):
        chameleon_vocabulary(words, 65_536)


def test_an_image_network_that_is_not_whole_is_refused(copied: Path):
    stored = load_file(copied / WEIGHTS)
    conv, book = "model.vqmodel.quant_conv.bias", "model.vqmodel." + CODEBOOK
    for change, message in (
        ({conv: None}, r"the image network's quant_conv.bias \[4\] is missing"),
        ({"model.vqmodel.extra": torch.zeros(1)}, "tensor model.vqmodel.extra .* is no part of the image encoder"),
        ({"model.vqmodel.extra": None, conv: torch.zeros(5)}, r"quant_conv.bias is \[5\], vq_config asks for \[4\]"),
        ({conv: stored[conv].clone(), "vqmodel.quant_conv.bias": stored[conv]}, "are both the model's quant_conv.bias"),
    ):
        retensor(copied, change)
        with pytest.raises(CheckpointError, match=message):
            open_model(copied)
    retensor(copied, {"vqmodel.quant_conv.bias": None, book: torch.full_like(stored[book], float("nan"))})
    with pytest.raises(CheckpointError, match="values that are NaN or infinite"):
        run_merge(MergeRecipe(method="uniform", text=copied, image=copied, out=copied.parent / "out"))
    assert not (copied.parent / "out").exists()


def test_without_an_image_network_the_rest_is_read(copied: Path):
    retensor(copied, {name: None for name in load_file(copied / WEIGHTS) if "vqmodel" in name})
    model = open_model(copied)
    assert model.passengers is None and "no image network" in model.lacks
    assert load_bundle(copied).image is None
