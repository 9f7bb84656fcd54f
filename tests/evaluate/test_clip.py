"""CLIP as a judge: both formats against their own libraries, what a folder must have, and `jam generate --clip`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from jam.cli import main
from jam.errors import CheckpointError, GenerationError
from jam.evaluate.clip import BATCH, ClipJudge
from jam.tokens.image import open_image
from tests.tiny import edit_json, randomize, tiny_pair

SIZE = 16
Folder = Callable[[Path], Path]


def open_clip_folder(folder: Path) -> Path:
    """A tiny CLIP as open_clip saves one; its tokenizer is the one inside the package."""
    towers = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**towers)
    randomize(model, 3)
    folder.mkdir()
    settings = {"model_cfg": towers, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def transformers_folder(folder: Path) -> Path:
    """A tiny CLIP as transformers saves one."""
    words = ["<|startoftext|>", "<|endoftext|>", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{words[0]} $A {words[1]}", special_tokens=[(words[0], 0), (words[1], 1)]
    )
    shared = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, **ends, **shared}
    vision = {"image_size": SIZE, "patch_size": 8, **shared}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel(config)
    randomize(model, 4)
    model.save_pretrained(folder)
    names = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1], "unk_token": words[1]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPProcessor(CLIPImageProcessor(**sizes), fast).save_pretrained(folder)
    return folder


FOLDERS = {"open_clip": open_clip_folder, "transformers": transformers_folder}


@pytest.fixture(scope="module", params=FOLDERS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("clip") / request.param)


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(5).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


@torch.inference_mode()
def by_hand(folder: Path, text: str, images: list[Image.Image]) -> list[float]:
    """The libraries themselves, one image at a time, features brought to length one."""
    if folder.name == "open_clip":
        where = f"local-dir:{folder}"
        model, _, prepare = open_clip.create_model_and_transforms(where)
        words = model.eval().encode_text(open_clip.get_tokenizer(where)(text), normalize=True)
        seen = [model.encode_image(prepare(image)[None], normalize=True) for image in images]
    else:
        model, prepare = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
        ids = prepare.tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        words = model(**ids, pixel_values=torch.zeros(1, 3, SIZE, SIZE)).text_embeds
        pixels = [prepare.image_processor(image, return_tensors="pt")["pixel_values"] for image in images]
        seen = [model(**ids, pixel_values=one).image_embeds for one in pixels]
    return [100 * float(one[0] @ words[0]) for one in seen]


def test_scores_are_the_librarys(clip: Path):
    judge, images = ClipJudge.load(clip), pictures(BATCH + 3)
    for text in ("a red apple", "a cat, " * 30):  # the second is longer than its context
        found = judge.of(text)(images)
        assert found == pytest.approx(by_hand(clip, text, images), abs=1e-3)
        assert max(found) - min(found) > 1
    assert judge.scores("a red apple", images[:2]) != judge.scores("the moon", images[:2])


def test_candidates_come_in_the_order_of_the_judge(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, model = tiny_pair(tmp_path)
    out, dot = tmp_path / "out", tmp_path / "dot.png"
    pictures(1)[0].save(dot)
    asked = ["--prompt", "draw <image> a cat", "--image", str(dot), "--candidates", "6", "--guidance-scale", "1"]
    assert main(["generate", str(model), *asked, "--clip", str(clip), "--out", str(out), "--max-tokens", "40"]) == 0
    entries = json.loads((out / "out.json").read_text())
    scores = [entry["score"] for entry in entries]
    drawn = [open_image(out / entry["path"]) for entry in entries]
    assert scores == pytest.approx(by_hand(clip, "draw a cat", drawn), abs=1e-3)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert f"6 images, best first by CLIP ({clip})" in capsys.readouterr().out


def test_an_open_clip_needs_its_own_towers_and_safetensors(tmp_path: Path):
    folder = open_clip_folder(tmp_path / "clip")
    config = folder / "open_clip_config.json"
    whole = config.read_text()
    for tower, name, value in (
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("vision_cfg", "timm_model_name", "hf-hub:a/b"),
    ):
        edit_json(config, {"model_cfg": {tower: {name: value}}})
        with pytest.raises(CheckpointError, match=f"{tower}.{name} '{value}' comes from a hub, which is not asked"):
            ClipJudge.load(folder)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="open_clip cannot load it"):
        ClipJudge.load(folder)
    config.write_text(whole)
    weights = folder / "open_clip_model.safetensors"
    damaged = load_file(weights)
    damaged["text_projection"] *= float("nan")
    save_file(damaged, weights)
    with pytest.raises(GenerationError, match="no finite numbers"):
        ClipJudge.load(folder).scores("a cat", pictures(1))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors"):
        ClipJudge.load(folder)
    weights.rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as open_clip_pytorch_model\.bin, a pickle, .* is required"):
        ClipJudge.load(folder)


def test_a_transformers_clip_must_be_whole(tmp_path: Path):
    folder = transformers_folder(tmp_path / "clip")
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "logit_scale"}, weights)
    with pytest.raises(CheckpointError, match="1 tensors are missing, logit_scale"):
        ClipJudge.load(folder)
    save_file(tensors, weights)
    for name, named in (("tokenizer.json", "a tokenizer"), ("processor_config.json", "preprocessor_config.json")):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"no {named}"):
            ClipJudge.load(folder)
        (tmp_path / name).rename(folder / name)
    edit_json(config, {"model_type": "siglip"})
    with pytest.raises(CheckpointError, match="model_type is 'siglip'; a CLIP"):
        ClipJudge.load(folder)
    edit_json(config, {"model_type": "clip"})
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin, a pickle"):
        ClipJudge.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        ClipJudge.load(folder)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"neither open_clip_config\.json nor config\.json"):
        ClipJudge.load(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clip", "nowhere", "--candidates", "2"], "nowhere: no such folder"),
        (["--clip", "nowhere"], "a CLIP is given and no number of candidates"),
        (["--clip", "nowhere", "--candidates", "2", "--rank", "ratio"], "rank is ratio and a CLIP is given"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = tmp_path / "out"
    assert main(["generate", "no-model", "--prompt", "a cat", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and not out.exists()


def test_a_prompt_without_words_is_refused(clip: Path):
    with pytest.raises(GenerationError, match="no words for CLIP"):
        ClipJudge.load(clip).of("  ")
