"""A plain language model's folder says what its ids are."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jam.errors import CheckpointError
from jam.layouts import open_model
from jam.tokens.adopt import adopt_vocabulary
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from tests.tiny import tiny_tokenizer

CONFIG = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": [2, 3], "pad_token_id": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_special_tokens_are_controls_and_rows_without_a_token_are_reserved(folder: Path):
    found = adopt_vocabulary(folder, CONFIG)
    assert found.spans == (Span("control", 0, 8), Span("text", 8, 288), Span("control", 288, 320))
    assert found.controls == {"bos": 0, "eos": 2}  # of several the first; a pad that is the eos is left out


def test_a_control_may_be_a_row_without_a_token(folder: Path):
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}<break>{% endfor %}{{ pad_token }}"
    )
    found = adopt_vocabulary(folder, CONFIG | {"pad_token_id": 297})
    assert found.controls["pad"] == 297 and found.turns is not None


def test_the_tokenizers_settings_win_over_the_configuration(folder: Path):
    settings = {"bos_token": None, "eos_token": {"content": "<break>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert adopt_vocabulary(folder, CONFIG).controls == {"eos": 5, "pad": 1}


def test_an_end_that_is_not_marked_special_is_a_control(folder: Path):
    found = adopt_vocabulary(folder, CONFIG | {"eos_token_id": 100})
    assert found.controls["eos"] == 100 and Span("control", 100, 101) in found.spans


def test_one_token_may_begin_and_end(folder: Path):
    assert adopt_vocabulary(folder, CONFIG | {"bos_token_id": 2}).controls == {"bos": 2, "eos": 2}


def test_a_file_of_ours_wins(folder: Path):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    assert open_model(folder).jam.vocabulary == adopt_vocabulary(folder, CONFIG)
    ours = JamFile(Vocabulary((Span("text", 0, 320),), {}))
    ours.write(folder)
    assert open_model(folder).jam == ours


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ("{", CONFIG, "cannot be read as JSON"),
        ('{"model": {}}', CONFIG, "the file is damaged"),
        (None, CONFIG | {"vocab_size": 287}, "names id 287, config.json has vocab_size 287"),
        (None, {}, "vocab_size None"),
        *((None, {"vocab_size": size}, "vocab_size") for size in (10**10, 10**12, 10**30, 10**5000, -1, True, "320")),
        (None, CONFIG | {"bos_token_id": "0"}, "bos_token_id is or holds a str"),
        (None, CONFIG | {"eos_token_id": [2.0]}, "eos_token_id is or holds a float"),
        ("[" * 100_000, CONFIG, "cannot be read as JSON"),
        ('{"model": {"vocab": {"a": "0", "b": "1"}}}', CONFIG, "ids that are none"),
        ('{"model": {"vocab": {"a": 0.0}}}', CONFIG, "ids that are none"),
        ('{"model": {"vocab": {}}}', CONFIG, "have no ids"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": Infinity}]}', CONFIG, "a value is Infinity"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, content: str | None, config: dict, message: str):
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        adopt_vocabulary(folder, config)


@pytest.mark.parametrize(
    "settings",
    [
        '{"bos_token": {"a": 1}}',
        '{"bos_token": ["<s>"]}',
        '{"bos_token": {"content": ["x"]}}',
        '{"bos_token": 0}',
        "[" * 100_000,
        "[]",
    ],
)
def test_settings_of_the_tokenizer_that_are_none_are_refused(folder: Path, settings: str):
    (folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .* required|cannot be read as JSON"):
        adopt_vocabulary(folder, CONFIG)
