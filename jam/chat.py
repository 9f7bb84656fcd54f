"""``jam chat``: talk to a model in the terminal, in text and images.

Stages of a turn: read a line -> a command, or a user turn with the images attached since the last one -> drop the
oldest turns if the context is short, and say so -> stream the reply: text as it comes, each image as a PNG and as
colour cells -> the turn joins the history.

The history holds exact codes, of the model's images and the user's: nothing is encoded twice. Ctrl+C stops the reply,
which stays in the history without its unfinished image; end of input quits. Works with piped input too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jam.decode.engine import generate
from jam.decode.job import budget, context_length, encode_images, rules_of
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import Event, ImageDone, ImageProgress, ImageStart, ReplyStream, Stop, TextDelta
from jam.document import CodesPart, Document, Part, TextPart, user_turn
from jam.errors import DataError, GenerationError, JamError, printable
from jam.generate import check_drawable, said_options
from jam.models.load import Bundle
from jam.running import AUTOMATIC, Running
from jam.terminal import COLUMNS, half_blocks, shows_images
from jam.tokens.image import open_image
from jam.tokens.render import render

HELP = """\
/image FILE   attach an image to your next message
/save [FILE]  write the conversation as JSON (default: chat.json beside its images)
/reset        forget the conversation
/seed N       sample the next replies with seed N
/help         this list
/quit         leave (Ctrl+D too); Ctrl+C stops a reply"""


@dataclass(frozen=True)
class Turn:
    """What the user said and what came back; ``paths`` are the files of the images among both, in order."""

    said: tuple[Part, ...]
    reply: tuple[Part, ...]
    paths: tuple[str, ...]


@dataclass
class Chat:
    """A conversation with a model."""

    bundle: Bundle
    options: SamplingOptions
    folder: Path
    console: Console
    images_inline: bool = True
    turns: list[Turn] = field(default_factory=list)
    attached: list[tuple[str, Image]] = field(default_factory=list)
    asked: int = 0
    drawn: int = 0
    saved: Path | None = None

    def turn(self, text: str) -> None:
        """One message and its reply.

        Raises:
            JamError: the message alone does not fit, or the model cannot read it; the history is as before.
        """
        paths, images = [path for path, _ in self.attached], [image for _, image in self.attached]
        # text before image, as the conversations that models are tuned on have it; <image> in the text places it
        said = encode_images(self.bundle, Document(user_turn(text, images, images_first=False))).parts
        turns = self._fitting(said)
        prompt = _document(turns, said)
        steps = generate(self.bundle, [prompt], self.options, streams=[self.asked])
        stream = ReplyStream(self.bundle, [prompt], self.options)
        if forgotten := len(self.turns) - len(turns):
            context = context_length(self.bundle)
            self.say(f"(the context of {context} tokens is short: the {forgotten} oldest turns are forgotten)")
        self.turns = turns
        self.asked += 1
        self.attached = []
        drawn: list[str] = []
        screen = _Screen(self.console, self.images_inline)
        try:
            for step in steps:
                for event in stream.push(step):
                    if isinstance(event, ImageDone):
                        drawn.append(self._store(event.image))
                    screen.show(event, drawn[-1] if drawn else "")
        except KeyboardInterrupt:
            screen.close()
            self.say("(stopped)")
        finally:
            screen.close()
        reply = stream.reply(0)
        drawn += [self._store(image) for image in reply.images[len(drawn) :]]  # interrupted before it was stored
        if reply.document.parts:
            self.turns.append(Turn(said, reply.document.parts, (*paths, *drawn)))
        else:
            self.say("(an empty reply; your message is not kept)")

    def _fitting(self, said: tuple[Part, ...]) -> list[Turn]:
        """The latest turns beside which the token budget, or half the context if that is less, is left to reply."""
        context = context_length(self.bundle)
        options = self.options
        rules = rules_of(self.bundle, options)
        wanted = max(min(budget(rules, options), context // 2), rules.needed_tokens)
        turns = list(self.turns)
        while turns and self._tokens(_document(turns, said)) + wanted > context:
            turns.pop(0)
        return turns

    def _tokens(self, prompt: Document) -> int:
        return len(render(prompt, self.bundle.vocabulary, self.bundle.text, complete=False))

    def _store(self, image: Image | None) -> str:
        """Saves an image of the reply under the next number."""
        if image is None:
            raise GenerationError(
                f"{self.bundle.path}: no image tokenizer to show an image with; use a model that has one"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"image-{self.drawn}.png"
        image.save(path)
        self.drawn += 1
        return str(path)

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def command(self, line: str) -> bool:
        """Runs a line that begins with ``/``; False when it is time to leave.

        Raises:
            JamError: what the command says of its argument.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip().strip("'\"")
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.say(HELP)
            case "/image":
                self._attach(argument)
            case "/save":
                self._save(_typed_path(name, argument) if argument else self.folder / "chat.json")
            case "/reset":
                self.turns, self.attached = [], []
                self.say("(a new conversation)")
            case "/seed":
                if not argument.isdecimal():
                    raise GenerationError(f"/seed {argument}: a whole number of at least 0 is required; write /seed 7")
                self.options, self.asked = replace(self.options, seed=int(argument)), 0
                self.say(f"(seed {self.options.seed})")
            case _:
                self.say(f"{name}: no such command\n{HELP}")
        return True

    def _attach(self, argument: str) -> None:
        if not argument:
            raise DataError("/image: the path of an image is required; write /image cat.png")
        path = _typed_path("/image", argument)
        self.attached.append((os.path.abspath(path), open_image(path)))
        self.say(f"({path.name} goes with your next message)")

    def _save(self, path: Path) -> None:
        """The conversation in the messages format, with the exact codes of every image."""
        if path.exists() and path != self.saved:
            raise DataError(f"{path}: already exists; give a new name to /save")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        text = json.dumps(messages(self.turns), indent=2, ensure_ascii=False) + "\n"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.saved = path
        self.say(f"(saved to {path})")


def _document(turns: list[Turn], said: tuple[Part, ...] = ()) -> Document:
    """Turns and what the user says next."""
    return Document((*(part for turn in turns for part in (*turn.said, *turn.reply)), *said))


def messages(turns: list[Turn]) -> list[dict]:
    """Turns as messages: ``jam.document.from_messages`` reads them, and every image also has its ``codes``,
    and its ``grid`` (rows and columns) where images have sizes."""
    found: list[dict] = []
    for turn in turns:
        paths = iter(turn.paths)
        for role, parts in (("user", turn.said), ("assistant", turn.reply)):
            content: list[dict] = []
            for part in parts:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                elif isinstance(part, CodesPart):
                    size = {} if part.grid is None else {"grid": list(part.grid)}
                    content.append({"type": "image", "path": next(paths), "codes": list(part.codes)} | size)
            found.append({"role": role, "content": content})
    return found


class _Screen:
    """Prints the events of one reply; a bar counts the codes of an image while it is drawn, and swings to and fro while
    it is searched for."""

    def __init__(self, console: Console, images_inline: bool):
        self.console = console
        self.inline = images_inline and shows_images(console)
        self.bar: Progress | None = None
        self.at_line_start = True

    def show(self, event: Event, path: str) -> None:
        match event:
            case TextDelta():
                text = printable(event.text)
                self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
                self.at_line_start = text.endswith("\n") if text else self.at_line_start
            case ImageStart():
                self._new_line()
                if self.console.is_terminal:
                    self.bar = Progress(
                        TextColumn("drawing"), BarColumn(COLUMNS - 8), console=self.console, transient=True
                    )
                    self.bar.add_task("codes", total=None)
                    self.bar.start()
            case ImageProgress():
                if self.bar is not None:
                    self.bar.update(self.bar.task_ids[0], completed=event.done, total=event.total)
            case ImageDone():
                self._end_bar()
                if self.inline and event.image is not None:
                    self.console.print(half_blocks(event.image, min(COLUMNS, self.console.width)))
                self.console.print(f"[image: {path}]", markup=False, highlight=False, soft_wrap=True)
            case Stop():
                self._new_line()
                if event.reason == "length":
                    note = "(cut: the token budget or the context is used up)"
                    self.console.print(note, style="dim", markup=False, highlight=False)

    def close(self) -> None:
        self._end_bar()
        self._new_line()

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _new_line(self) -> None:
        if not self.at_line_start:
            self.console.print()
            self.at_line_start = True


def run_chat(
    path: Path | None = None,
    *,
    out: Path,
    images_inline: bool = True,
    running: Running = AUTOMATIC,
    **options: float | str | None,
) -> None:
    """Chats until /quit or the end of input.

    Args:
        path: a model folder; None takes the shipped default.
        out: images and saved conversations go to ``out/chat-<time>/``.
        images_inline: False prints the paths of images alone.
        running: where the model runs, and in which numbers.
        options: fields of :class:`jam.decode.options.SamplingOptions`; None leaves the model's default.

    Raises:
        JamError: the model cannot be loaded or cannot chat. What goes wrong in a turn is printed instead.
    """
    said = said_options(**options)
    console = Console(emoji=False)  # a model that writes :cat: means just that
    bundle = running.open(path)
    settings = default_options(bundle, **said)
    if not bundle.vocabulary.converses:
        raise GenerationError(
            f"{bundle.path}: this model's vocabulary has neither turns nor user and assistant controls; chat needs "
            "them, use jam generate"
        )
    check_drawable(bundle, settings)
    folder = _new_folder(Path(out) / time.strftime("chat-%Y%m%d-%H%M%S"))
    chat = Chat(bundle, settings, folder, console, images_inline)
    chat.say(f"{'the shipped model' if path is None else path}: type a message; /help lists the commands, /quit leaves")
    _loop(chat, _reader())


def _reader() -> Callable[[], str]:
    """``input`` with a prompt, or without one when input is piped."""
    prompt = "you> " if sys.stdin.isatty() else ""
    return lambda: input(prompt)


def _loop(chat: Chat, read: Callable[[], str]) -> None:
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            chat.console.print("error: the message is not UTF-8; write it in UTF-8", style="red")
            continue
        except KeyboardInterrupt:
            chat.say("\n(/quit or Ctrl+D leaves)")
            continue
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.turn(line)
        except (JamError, OSError) as error:  # a full disk must not end the conversation: /save it elsewhere
            chat.console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _typed_path(command: str, argument: str) -> Path:
    """The path that a command names, ``~`` read as the shell does. Raises DataError where there can be none."""
    if "\0" in argument:
        raise DataError(f"{command} {argument!r:.60}: a NUL, which no path may hold; remove it")
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise DataError(f"{command} {argument}: no such user's folder is known; write the path without ~") from None


def _new_folder(path: Path) -> Path:
    """``path``, or ``path-2``, ... if it is taken; made when there is something to put into it."""
    count, found = 1, path
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}-{count}")
    return found
