"""``jam finetune`` over bad data, bad mixes and losses that are no numbers: a line each, exit code 2, nothing lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import loop
from finetune.data.prepare import Job, prepare
from finetune.data.rendering import Reading, Tokenizers
from finetune.loss import TokenLoss
from finetune.saving import checkpoint
from jam.cli import main
from jam.header import read_header
from tests.flows.test_data_cli import said
from tests.tiny import tiny_pair

POISON = "~"  # its byte's id is in no other document


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    return tiny_pair(tmp_path)[1]


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, count: int = 30, **special: str) -> Path:
    return lines(path, *({"text": special.get(f"row{n}", f"line {n} of the cat and the end")} for n in range(count)))


def trained(model: Path, capsys: pytest.CaptureFixture[str], mix: dict, *overrides: str, **keys) -> tuple[int, str]:
    """Exit code and what was said on stderr; the run is in ``run`` beside the model."""
    raw = {
        "kind": "finetune",
        "model": str(model),
        "output_dir": str(model.parent / "run"),
        "data": {"seq_len": 64, "mix": mix},
        "objective": {"condition_drop": 0.0},
        "train": {"steps": 6, "micro_batch_size": 2, "global_batch_size": 4, "threads": 1},
        "save": {"every": 2, "keep": 9},
    }
    (model.parent / "r.yaml").write_text(json.dumps(raw | keys))
    code = main(["finetune", str(model.parent / "r.yaml"), *overrides])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return code, told


def refused(model: Path, capsys: pytest.CaptureFixture[str], mix: dict, *overrides: str, **keys) -> str:
    """The one line of an error; no checkpoint and no final folder is made."""
    code, told = trained(model, capsys, mix, *overrides, **keys)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and told.splitlines()[-1] == errors[0], told
    assert not (model.parent / "run/final").exists() and not list((model.parent / "run").glob("checkpoint-*"))
    return errors[0]


def entry(kind: str, path: Path, **more) -> dict:
    return {"kind": kind, "path": str(path), "weight": 1.0} | more


def turns(answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": answer}]} | more


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("conversations", turns("<image> <image>", images=["a.png"]), "2 places for images .* and 1 images"),
        ("conversations", turns("<image>"), "1 places for images .* and 0 images"),
        ("conversations", turns("<image>", images=["bomb.png"]), "at most 32 Mpx"),
        ("conversations", turns("<image>", images=["../a.png"]), "lies outside"),
        ("captions", {"image": "bomb.png", "caption": "x"}, "at most 32 Mpx"),
        ("captions", {"image": "torn.png", "caption": "x"}, "not a readable PNG"),
        ("captions", {"image": "link.png", "caption": "x"}, "lies outside"),
        ("text", {"txt": "x"}, "field 'text' is missing"),
    ],
)
def test_a_bad_row_is_one_line(model, capsys, kind, row, message):
    data = model.parent / "data"
    data.mkdir()
    picture = Image.effect_noise((20, 12), 90).convert("RGB")
    picture.save(data / "a.png")
    picture.save(model.parent / "a.png")
    (data / "torn.png").write_bytes((data / "a.png").read_bytes()[:60])
    (data / "link.png").symlink_to(model.parent / "a.png")
    Image.new("1", (13_000, 13_000)).save(data / "bomb.png")
    good = {"conversations": turns("no"), "captions": {"image": "a.png", "caption": "y"}, "text": {"text": "z"}}[kind]
    told = refused(model, capsys, {"mine": entry(kind, lines(data / "d.jsonl", good, row))})
    assert re.search(rf"d\.jsonl:2: .*{message}", told), told


@pytest.fixture
def prepared(model, capsys) -> Path:
    source = texts(model.parent / "t.jsonl")
    out = model.parent / "shards"
    prepare(Job(Reading(source, "text"), Tokenizers.load(model), out))
    return out


def rewrite(path: Path, change: Callable[[np.ndarray], None]) -> None:
    ids = np.fromfile(path, "<u2")
    change(ids)
    ids.tofile(path)


def test_ids_beyond_the_vocabulary_are_named_with_their_document(model, prepared, capsys):
    rewrite(prepared / "shard-00000.bin", lambda ids: ids.__setitem__(-1, 60_000))
    told = refused(model, capsys, {"mine": entry("shards", prepared)})
    assert f"{prepared}/shard-00000.bin: document 29 has id 60000 of a vocabulary of" in told
    assert "run jam data check" in told
    _, checked = said(capsys, "check", prepared, code=2)
    assert "altered since it was written (SHA-256 differs)" in checked


def test_an_altered_byte_within_the_vocabulary_is_found_by_the_check_alone(model, prepared, capsys):
    """Sizes are looked at on every start, hashes by jam data check: nobody wants 100 GB read to begin."""
    rewrite(prepared / "shard-00000.bin", lambda ids: ids.__setitem__(5, ids[5] ^ 1))
    _, checked = said(capsys, "check", prepared, code=2)
    assert "shard-00000.bin: altered since it was written" in checked
    assert trained(model, capsys, {"mine": entry("shards", prepared)})[0] == 0
    (prepared / "shard-00000.bin").write_bytes((prepared / "shard-00000.bin").read_bytes()[:-2])
    assert "were written; restore it" in trained(model, capsys, {"mine": entry("shards", prepared)})[1]


@pytest.mark.parametrize(
    ("array", "run", "value", "message"),
    [
        ("weights", 0, np.nan, "no number"),
        ("weights", 0, 3e38, "too great"),
        ("heads", 0, 7, "wrong head"),
        ("heads", 1, 1, "wrong head"),  # words under the image head, which has no scores for them
    ],
)
def test_an_altered_index_is_named(model, prepared, capsys, array, run, value, message):
    path = prepared / "shard-00000.idx"
    info = next(info for info in read_header(path) if info.name == array)
    with path.open("r+b") as file:
        raw = np.array(value, "<f4" if array == "weights" else "u1").tobytes()
        file.seek(info.begin + run * len(raw))
        file.write(raw)
    told = refused(model, capsys, {"mine": entry("shards", prepared)})
    assert "document 0 has" in told and message in told


def test_shards_of_another_vocabulary_are_refused(model, prepared, capsys):
    other = tiny_pair(model.parent / "other", merges=20)[1]
    (model.parent / "other/run").mkdir()
    assert "prepared for another vocabulary than that of" in refused(other, capsys, {"m": entry("shards", prepared)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "data.mix.b.weight"),
        ({"weight": 0.001}, "its share of the mix rounds to 0 of 100"),
        ({"loss": {"text": 0.0}}, "data.mix.b: none of its tokens has a loss"),
        ({"path": "{tmp}/empty.jsonl"}, "empty.jsonl: no documents"),
        ({"max_epochs": 0.5}, "data.mix.b: the run reads 7 documents about "),
        ({"skip": [7]}, "skip names document 7 of 7"),
    ],
)
def test_a_mix_that_gives_nothing_is_refused(model, capsys, changes, message):
    (model.parent / "empty.jsonl").write_text("\n\n")
    changes = {key: v.format(tmp=model.parent) if isinstance(v, str) else v for key, v in changes.items()}
    a, b = texts(model.parent / "a.jsonl"), texts(model.parent / "b.jsonl", 7)
    (model.parent / "run").mkdir()
    raw = {"kind": "finetune", "model": str(model), "output_dir": str(model.parent / "run")}
    raw |= {"data": {"seq_len": 64, "mix": {"a": entry("text", a), "b": entry("text", b) | changes}}}
    (model.parent / "r.yaml").write_text(json.dumps(raw | {"train": {"steps": 6}}))
    assert main(["finetune", str(model.parent / "r.yaml")]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and not list((model.parent / "run").glob("checkpoint-*"))


def test_a_mix_without_any_loss_is_refused(model, capsys):
    mix = {"a": entry("text", texts(model.parent / "a.jsonl"))}
    told = refused(model, capsys, mix, loss={"text": 0.0, "image": 1.0})
    assert "none of its tokens has a loss (loss.text 0," in told


def test_many_epochs_are_said(model, capsys):
    mix = {
        "a": entry("text", texts(model.parent / "a.jsonl", 7)),
        "b": entry("text", texts(model.parent / "b.jsonl", 60)),
    }
    code, told = trained(model, capsys, mix, "train.steps=20")
    figures = [line for line in told.splitlines() if "epochs" in line]
    assert code == 0 and len(figures) == 1
    assert re.fullmatch(r"a: about (19|20|21)\.\d epochs of 7 documents will be read", figures[0])


class Spoilt(TokenLoss):
    """No number, or no gradient, wherever a sequence has the poison; as attention does, over the whole of it."""

    way = "loss"

    def forward(self, batch):
        found = super().forward(batch)
        poison = self.bundle.text.encode(POISON)[0]
        hit = (batch.ids == poison).any(1)[None, :, None]
        if self.way == "loss":
            return torch.where(hit, torch.nan, found)
        if found.requires_grad:
            found.register_hook(lambda gradient: torch.where(hit, torch.inf, gradient))
        return found


@pytest.mark.parametrize("way", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["text", "shards"])
def test_a_document_that_spoils_a_step_is_named_and_can_be_left_out(model, capsys, monkeypatch, way, kind):
    monkeypatch.setattr(loop, "TokenLoss", Spoilt)
    monkeypatch.setattr(Spoilt, "way", way)
    source, where = texts(model.parent / "t.jsonl", 60, row41="a ~ that no number is made of"), "t.jsonl:42"
    if kind == "shards":
        prepare(Job(Reading(source, "text"), Tokenizers.load(model), model.parent / "shards"))
        source, where = model.parent / "shards", "shard-00000.bin: document 41"
    mix = {"fine": entry("text", texts(model.parent / "a.jsonl")), "mine": entry(kind, source)}
    code, told = trained(model, capsys, mix, "train.steps=30")
    error = told.splitlines()[-1]
    assert code == 2 and error.startswith("error: step ")
    what = "the loss is nan" if way == "loss" else "its gradient's norm"
    assert what in error and f"of data.mix.mine document 41 ({source.parent}/" in error.replace("shards/shard", "shard")
    assert where in error and "data.mix.mine.skip: [41]" in error
    run = model.parent / "run"
    step = int(error.split("error: step ")[1].split(":")[0])
    assert step > 2, "the seed puts the poison too early to prove anything"
    whole = checkpoint.listed(run)
    assert [int(f.name.split("-")[1]) for f in whole] == list(range(2, step, 2))[::-1]
    assert all(checkpoint.verify(folder) is None for folder in whole)
    again = trained(model, capsys, mix, "train.steps=30")
    assert again[0] == 2 and again[1].splitlines()[-1] == error  # the same words, and no step more
    left = {**mix, "mine": mix["mine"] | {"skip": [41]}}
    assert "data.mix.mine.skip: was [], is [41]" in trained(model, capsys, left, "train.steps=30")[1]
    code, told = trained(model, capsys, left, "train.steps=30", resume_allow=["data.mix.mine.skip"])
    assert code == 0 and f"(step {step - 1 - (step - 1) % 2} of 30)" in told


def test_weights_that_are_no_numbers_are_not_blamed_on_a_document(model, capsys, monkeypatch):
    class Gone(TokenLoss):
        def forward(self, batch):
            return super().forward(batch) * torch.nan

    monkeypatch.setattr(loop, "TokenLoss", Gone)
    told = refused(model, capsys, {"a": entry("text", texts(model.parent / "a.jsonl"))})
    assert "the loss is nan, in all its 4 sequences, so the weights are to blame" in told and "lower optim.lr" in told
