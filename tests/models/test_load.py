"""A folder to a Bundle: what loads, what it answers, and one clear line for each way a folder can be broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jam.errors import CheckpointError, GenerationError
from jam.models.families import FAMILIES
from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.tokens.vocabulary import JamFile
from tests.tiny import CODES, CODES_PER_IMAGE, tiny_pair, tiny_parent
from tests.tiny_cross import tiny_cross


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_pair(tmp_path)


@pytest.fixture
def fused(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    return tiny_cross(tmp_path / "fused", *pair)


def test_parents_and_fusion_load_whole(pair: tuple[Path, Path], fused: Path) -> None:
    text, image = pair
    llm = load_bundle(text)
    assert llm.image is None and llm.vocabulary.codes_per_image == 0 and llm.max_positions == 256
    for folder in (image, fused):
        bundle = load_bundle(folder, torch.bfloat16)
        assert bundle.path == folder
        assert bundle.model.dtype == torch.bfloat16 and not bundle.model.training
        assert (bundle.image.codebook_size, bundle.image.codes_per_image) == (CODES, CODES_PER_IMAGE)
        assert bundle.unconditional == ("bos", "mask", "begin_image")
        assert next(bundle.image.network.parameters()).dtype == torch.float32


@torch.no_grad()
def test_logits_of_every_kind_of_model(pair: tuple[Path, Path], fused: Path) -> None:
    for folder in (*pair, fused):
        bundle = load_bundle(folder)
        ids = torch.tensor([[0, 72, 90, 100]])
        heads = next_heads(ids, bundle.vocabulary)
        logits, cache = bundle.logits(ids, heads)
        assert cache is None and logits.shape == (1, 4, bundle.vocabulary.size)
        assert (logits[..., :288] > -100).all() and (logits[..., 288:] == torch.finfo(torch.float32).min).all()
        again, cache = bundle.logits(ids, heads, use_cache=True)
        assert torch.equal(again, logits) and cache.get_seq_length() == 4
        if folder == fused:
            with pytest.raises(GenerationError, match="two heads"):
                bundle.logits(ids, heads, softmax="joint")
        else:
            joint, _ = bundle.logits(ids, heads, softmax="joint")
            assert (joint > -100).all()


def test_a_4d_mask_needs_positions(fused: Path) -> None:
    bundle = load_bundle(fused)
    ids = torch.tensor([[0, 72, 90]])
    with pytest.raises(ValueError, match="pass position_ids"):
        bundle.logits(ids, torch.zeros_like(ids), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())


@torch.no_grad()
def test_spare_rows_of_a_table_are_never_predicted(pair: tuple[Path, Path]) -> None:
    bundle = load_bundle(pair[1])
    bundle.model.resize_token_embeddings(320, mean_resizing=False)
    ids = torch.tensor([[0, 72, 5, 290]])
    logits, _ = bundle.logits(ids, next_heads(ids, bundle.vocabulary))
    assert logits.shape[-1] == 320 and (logits[..., 304:] == torch.finfo(torch.float32).min).all()


# ---------------------------------------------------------------- broken folders


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_vocabulary(folder: Path) -> None:
    record = JamFile.read(folder)
    raw = record.vocabulary.to_json() | {"codes_per_image": 9}
    JamFile(type(record.vocabulary).from_json(raw), "image_tokenizer").write(folder)


def edit_vocabulary(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        "jam.json", vocabulary=json.loads((folder / "jam.json").read_text())["vocabulary"] | changes
    )(folder)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def unfinite_image_tokenizer(folder: Path) -> None:
    edit_tensors(lambda t: t["quantize.embedding.weight"].__setitem__((1, 2), torch.nan))(folder / "image_tokenizer")


VQ = "image_tokenizer/config.json"
GATE, LAYER = "cross.1.image.gate", "cross.0.text.fc1.weight"
BROKEN = {
    "config": (remove("config.json"), "config.json"),
    "weights": (remove("model.safetensors"), "model.safetensors"),
    "tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "jam.json": (remove("jam.json"), "no jam.json"),
    "image tokenizer": (remove("image_tokenizer/model.safetensors"), "no model.safetensors"),
    "truncated": (truncate, "truncated"),
    "NaN": (edit_tensors(lambda t: t[LAYER].__setitem__((3, 4), torch.nan)), f"{LAYER} has 1 NaN or infinite"),
    "infinity": (edit_tensors(lambda t: t[GATE].fill_(-torch.inf)), f"{GATE} has 1 NaN or infinite"),
    "missing tensor": (edit_tensors(lambda t: t.pop(GATE)), f"1 tensors missing or misshapen, 0 unexpected .{GATE}"),
    "spare tensor": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), "1 unexpected .extra"),
    "misshapen tensor": (
        edit_tensors(lambda t: t.update({LAYER: torch.ones(3, 4)})),
        f"misshapen, 0 unexpected .{LAYER}",
    ),
    "unknown type": (edit_json("config.json", model_type="warp"), "model type 'warp' is not a causal language model"),
    "wrong exchanges": (edit_json("config.json", exchanges=[[9, 9]]), "exchanges"),
    "wrong sizes": (edit_json("config.json", vocab_size=7), "vocab_size"),
    "foreign image tokenizer": (other_vocabulary, "4 codes of 16, jam.json says 9 of 16"),
    "type is a list": (edit_json("config.json", model_type=["opt"]), "is not a causal language model"),
    "no text tower": (edit_json("config.json", text_config=None), "transformers cannot load it"),
    "quantized": (edit_tensors(lambda t: t.update({LAYER: t[LAYER].to(torch.int8)})), f"{LAYER} is I8; float weights"),
    "truncated image tokenizer": (cut("image_tokenizer/model.safetensors"), "image_tokenizer/.* truncated"),
    "image tokenizer's config is no JSON": (cut(VQ), "cannot be read as JSON"),
    "image tokenizer's key": (edit_json(VQ, bogus=3), "config.json: bogus is no setting of an image tokenizer"),
    "image tokenizer's type": (edit_json(VQ, ch="x"), "config.json: ch is 'x'; a whole number"),
    "image tokenizer's sizes": (edit_json(VQ, n_embed=8), "not one image tokenizer .*size mismatch"),
    "image tokenizer has NaN": (unfinite_image_tokenizer, "quantize.embedding.weight has NaN"),
    "no spans": (edit_vocabulary(spans=[]), "jam.json: vocabulary: no spans"),
    "unknown span": (edit_vocabulary(spans=[["foo", 0, 304]]), "jam.json: vocabulary: span"),
    "endless span": (edit_vocabulary(spans=[["text", 0, 10**12]]), "whole numbers up to"),
    "no codes per image": (edit_vocabulary(codes_per_image=0), "codes_per_image is 0 with an image span"),
    "codes per image is text": (edit_vocabulary(codes_per_image="4"), "codes_per_image is '4'"),
    "control is text": (edit_vocabulary(controls={"bos": "0"}), "control bos=0"),
    "image tokenizer elsewhere": (edit_json("jam.json", image_tokenizer="../x"), "the name of a subfolder or null"),
    "image tokenizer is a number": (edit_json("jam.json", image_tokenizer=5), "the name of a subfolder or null"),
    "unknown condition": (edit_json("jam.json", unconditional=["zzz"]), "unconditional names 'zzz'"),
    "fusion is text": (edit_json("jam.json", fusion="x"), "fusion is 'x'"),
    "jam.json is no UTF-8": (
        lambda folder: (folder / "jam.json").write_bytes(b"\xff\xfe"),
        "cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(fused: Path, fault: str) -> None:
    damage, expected = BROKEN[fault]
    damage(fused)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_bundle(fused)
    assert "\n" not in str(caught.value) and "fused" in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_bundle(tmp_path / "nothing")


@pytest.mark.parametrize("family", [*FAMILIES, "jam_cross"])
def test_a_hollow_network_lacks_nothing_but_numbers(tmp_path: Path, family: str) -> None:
    """What a rank without weights is given by name and order must be what the first rank has, tied tables as one."""
    cross = family == "jam_cross"
    folder = tiny_cross(tmp_path / "fused", *tiny_pair(tmp_path)) if cross else tiny_parent(tmp_path, True, 0, family)
    whole, hollow = load_bundle(folder).model, load_bundle(folder, hollow=True).model
    assert all(parameter.is_meta for parameter in hollow.parameters())
    named = [[(n, p.shape, p.dtype) for n, p in model.named_parameters()] for model in (whole, hollow)]
    assert named[0] == named[1] and whole.state_dict().keys() == hollow.state_dict().keys()
    buffers = [dict(model.named_buffers()) for model in (whole, hollow)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(tensor, buffers[1][name]) for name, tensor in buffers[0].items())
