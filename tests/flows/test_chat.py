"""`jam chat` on a tiny fused folder, piped and at a terminal."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jam.chat
from jam.cli import main
from jam.document import CodesPart, from_messages
from jam.tokens.image import open_image
from tests.tiny import CODES_PER_IMAGE

SHORT = ["--max-tokens", "40"]


def talk(monkeypatch: pytest.MonkeyPatch, lines: list[str], model: Path, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", str(model), "--seed", "3", *options])


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reply has an image: an untrained model would open one about once in three hundred tokens."""
    real = jam.chat.said_options
    forced = {"min_images": 1, "max_images": 1, "max_tokens": 30}
    monkeypatch.setattr("jam.chat.said_options", lambda **given: real(**given, **forced))


def test_chat_piped(fused: Path, tmp_path: Path) -> None:
    """A fresh process, piped input, end of input quits."""
    command = [sys.executable, "-m", "jam.cli", "chat", str(fused), "--seed", "1", "--out", str(tmp_path / "chats")]
    done = subprocess.run(command, input="hello\n/help\n/nonsense\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "/image FILE" in done.stdout and "/nonsense: no such command" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.usefixtures("drawing")
def test_chat_without_options_puts_its_images_under_jam_chat(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the plainest call: the command line once passed an ``--out`` that was not given on as None, a crash."""
    monkeypatch.chdir(tmp_path)
    assert talk(monkeypatch, ["draw"], fused) == 0
    assert [path.name for path in tmp_path.glob("jam-chat/chat-*/*.png")] == ["image-0.png"]


@pytest.mark.usefixtures("drawing")
def test_chat_with_images_and_save(
    fused: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of both sides survive in the saved conversation with their exact codes."""
    lines = [f"/image {picture}", "what is this?", "draw another", "/save", "/save", "/quit", "never read"]
    assert talk(monkeypatch, lines, fused, "--out", str(tmp_path / "chats")) == 0
    (folder,) = (tmp_path / "chats").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["chat.json", "image-0.png", "image-1.png"]
    said = json.loads((folder / "chat.json").read_text())
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    images = [block for message in said for block in message["content"] if block["type"] == "image"]
    assert [Path(image["path"]).name for image in images] == ["red dot.png", "image-0.png", "image-1.png"]
    assert all(len(image["codes"]) == CODES_PER_IMAGE for image in images)
    assert said[0]["content"][0] == {"type": "text", "text": "what is this?"}
    document = from_messages(said, lambda path: open_image(Path(path)))
    assert len(document.parts) == sum(len(message["content"]) for message in said)
    output = capsys.readouterr().out
    assert f"[image: {folder / 'image-0.png'}]" in output and "never read" not in output


@pytest.mark.usefixtures("drawing")
def test_chat_keeps_exact_codes_in_its_history(fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply's image goes into the next prompt as it was drawn, never through pixels and back."""
    prompts = []
    real = jam.chat.generate

    def spy(bundle, documents, *args, **kwargs):
        prompts.append(documents[0])
        return real(bundle, documents, *args, **kwargs)

    monkeypatch.setattr("jam.chat.generate", spy)
    assert talk(monkeypatch, ["one", "two", "/save", "/reset", "three"], fused, "--out", str(tmp_path)) == 0
    (saved,) = tmp_path.rglob("chat.json")
    said = json.loads(saved.read_text())
    codes = [tuple(block["codes"]) for message in said for block in message["content"] if block["type"] == "image"]
    assert [part.codes for part in prompts[1].parts if isinstance(part, CodesPart)] == codes[:1]
    assert len(prompts[2].parts) == 1


def test_chat_goes_on_after_errors(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/image missing.png", "/seed x", "/image", "x" * 400, "/seed 4"]
    assert talk(monkeypatch, lines, fused, "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    for words in (
        "missing.png: no such image",
        "/seed x: a whole number",
        "/image: the path",
        "403 tokens",
        "(seed 4)",
    ):
        assert words in output.replace("\n", " "), words
    assert list(tmp_path.iterdir()) == []


def test_chat_goes_on_after_paths_that_there_cannot_be(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = "~no-such-user-here/x"
    lines = ["/save a\0b", "/image a\0b.png", f"/save {nowhere}", f"/image {nowhere}", f"/save {'n' * 300}", "/seed 4"]
    monkeypatch.chdir(tmp_path)
    assert talk(monkeypatch, lines, fused) == 0
    said = capsys.readouterr().out.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert errors[:4] == [
        "error: /save 'a\\x00b': a NUL, which no path may hold; remove it",
        "error: /image 'a\\x00b.png': a NUL, which no path may hold; remove it",
        f"error: /save {nowhere}: no such user's folder is known; write the path without ~",
        f"error: /image {nowhere}: no such user's folder is known; write the path without ~",
    ]
    assert len(errors) == 5 and "File name too long" in errors[4] and said[-1] == "(seed 4)"
    assert not list(tmp_path.iterdir())


def test_chat_survives_a_refused_save_and_foreign_bytes(fused: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    lines = b"/save %s/file/chat.json\n\xff\xfe\n/seed 4\n" % bytes(tmp_path)
    command = [sys.executable, "-m", "jam.cli", "chat", str(fused), "--out", str(tmp_path)]
    done = subprocess.run(
        command, input=lines, capture_output=True, env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    )
    assert done.returncode == 0, done.stderr
    assert b"Not a directory" in done.stdout or b"File exists" in done.stdout
    assert b"(seed 4)" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_chat_drops_the_oldest_turns_loudly(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = jam.chat.said_options
    monkeypatch.setattr("jam.chat.said_options", lambda **given: real(**given, max_tokens=90))
    assert talk(monkeypatch, ["a" * 60, "b" * 60, "c" * 60], fused, "--out", str(tmp_path)) == 0
    assert "oldest turns are forgotten" in capsys.readouterr().out


def test_chat_keeps_its_turns_when_a_message_is_refused(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = jam.chat.said_options
    monkeypatch.setattr("jam.chat.said_options", lambda **given: real(**given, max_tokens=9))
    save = tmp_path / "kept.json"
    assert talk(monkeypatch, ["hello", "y" * 400, f"/save {save}"], fused, "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "the reply needs room" in said and "forgotten" not in said
    assert json.loads(save.read_text())[0] == {"role": "user", "content": [{"type": "text", "text": "hello"}]}


def test_chat_interrupt_stops_the_reply_only(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first reply is interrupted after five tokens; the second is whole, and the first stays in its prompt."""
    prompts, real = [], jam.chat.generate

    def interrupted(bundle, documents, *args, **kwargs):
        prompts.append(documents[0])
        for count, step in enumerate(real(bundle, documents, *args, **kwargs)):
            if count == 5 and len(prompts) == 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr("jam.chat.generate", interrupted)
    assert talk(monkeypatch, ["one", "two"], fused, "--out", str(tmp_path)) == 0
    assert "(stopped)" in capsys.readouterr().out
    assert [part.role for part in prompts[1].parts] == ["user", "assistant", "user"]


def test_chat_refuses_a_text_model(
    parents: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, ["hi"], parents[0]) == 2
    assert "neither turns nor user and assistant controls" in capsys.readouterr().err
