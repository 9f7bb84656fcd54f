"""Turns read off chat templates of several kinds, and conversations written with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jam.document import CodesPart, Document, TextPart
from jam.errors import CheckpointError, DataError
from jam.models.load import load_bundle
from jam.tokens.adopt import adopt_vocabulary
from jam.tokens.chat_template import _render, read_template
from jam.tokens.render import parse, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import JamFile, Turns, Vocabulary
from merge.plan import read_parent
from merge.recipe import MergeRecipe
from merge.run import run_merge
from merge.union import Pair
from tests.tiny import CODES_PER_IMAGE, edit_json, tiny_pair

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for message in messages %}{% if loop.first %}<mask>system\nBe kind.<infill>\n{% endif %}"
    "<mask>{{ message['role'] }}\n{{ message['content'] | trim }}<infill>\n{% endfor %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NAMED = (
    "{{ bos_token }}{% for m in messages %}{% set who = 'model' if m.role == 'assistant' else m.role %}"
    "{% if who == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<mask>{{ who }}\n{{ m.content }}<infill>\n{% endfor %}"
)
SAID = [("user", "the cat"), ("assistant", "is on"), ("user", "and?"), ("assistant", "the end")]


def chat_parent(tmp_path: Path, template: str) -> Path:
    """A text parent whose folder has a template and no jam.json."""
    text, _ = tiny_pair(tmp_path)
    (text / "jam.json").unlink()
    (text / "chat_template.jinja").write_text(template)
    return text


def vocabulary_of(folder: Path) -> Vocabulary:
    return adopt_vocabulary(folder, json.loads((folder / "config.json").read_text()))


def written(template: str, **names: str) -> str:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": role, "content": words} for role, words in SAID]
    return environment.from_string(template).render(messages=messages, raise_exception=None, **names)


@pytest.mark.parametrize(("template", "end"), [(CHATML, 4), (BRACKETS, 2), (NAMED, 4)])
def test_a_conversation_is_written_as_the_template_writes_it(tmp_path: Path, template: str, end: int):
    folder = chat_parent(tmp_path, template)
    vocabulary, text = vocabulary_of(folder), TextTokenizer.load(folder)
    assert vocabulary.converses and vocabulary.controls["eos"] == end
    document = Document(tuple(TextPart(words, role, float(role == "assistant")) for role, words in SAID))
    tokens = render(document, vocabulary, text)
    wanted = written(template, bos_token="<s>", eos_token="</s>").rstrip("\n")
    text.tokenizer.encode_special_tokens = False
    assert text.tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False) == wanted
    assert parse(tokens.ids.tolist(), vocabulary, text) == document
    learnt = text.tokenizer.decode(tokens.ids[tokens.weights > 0].tolist(), skip_special_tokens=False)
    assert learnt == {2: "is on</s>the end</s>", 4: "is on<infill>the end<infill>"}[end]


def test_a_prompt_ends_where_the_reply_begins(tmp_path: Path):
    folder = chat_parent(tmp_path, CHATML)
    vocabulary, text = vocabulary_of(folder), TextTokenizer.load(folder)
    prompt = render(Document((TextPart("hi", "user"),)), vocabulary, text, complete=False).ids.tolist()
    assert prompt[-len(vocabulary.turns.assistant) :] == list(vocabulary.turns.assistant)


def test_a_plain_document_has_no_turns(tmp_path: Path):
    folder = chat_parent(tmp_path, CHATML)
    tokens = render(Document((TextPart("hi"),)), vocabulary_of(folder), TextTokenizer.load(folder))
    assert tokens.ids[0] == 0 and tokens.ids[-1] == 4


def test_a_conversation_that_begins_with_a_reply_is_refused(tmp_path: Path):
    folder = chat_parent(tmp_path, CHATML)
    with pytest.raises(DataError, match="begins with the assistant"):
        render(Document((TextPart("hi", "assistant"),)), vocabulary_of(folder), TextTokenizer.load(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{{ messages | tojson(indent=4) }}{{ {'b': 'ü<', 'a': 1} | tojson }}",
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}  {{ n.x }}\n{% endfor %}",
        "{% macro say(m) %}{{ m.role | upper }}: {{ m.content | trim }}{% endmacro %}{{ say(messages[0]) }}",
    ],
)
def test_a_template_writes_what_transformers_lets_it_write(template: str):
    messages = [{"role": role, "content": f" {words} "} for role, words in SAID]
    expected, _ = render_jinja_template([messages], chat_template=template)
    assert _render(template, messages=messages) == expected[0]


def test_a_template_that_asks_for_the_date_always_gets_the_same():
    assert _render("{{ strftime_now('%d %B %Y') }}") == "01 January 2025"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "share of CPU time"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "share of CPU"),
        ("{{ ('a' * 10 ** 9) | length }}", "MemoryError"),
        ("{{ 'a' * 10 ** 6 }}", "more than 100000 characters"),
    ],
)
def test_time_memory_and_text_are_bounded(template: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        _render(template)


def test_a_lower_limit_of_the_caller_is_kept():
    program = (
        "import resource; from jam.tokens.chat_template import _render; low = 400 << 20; "
        "resource.setrlimit(resource.RLIMIT_AS, (low, low)); print(_render('a'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("a\n", 0), done.stderr


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "does not render"),
        ("{% for m in messages %}", "does not render"),
        ("{{ messages[0].content }}", "each turn's words once"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "end a reply with a special token"),
        ("{{ messages.__class__.__mro__ }}", "does not render"),
    ],
)
def test_a_template_that_no_turns_follow_from_is_refused(tmp_path: Path, template: str, reason: str):
    with pytest.raises(CheckpointError, match=reason):
        vocabulary_of(chat_parent(tmp_path, template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ 2.0**5000 }}",
        "{{ 9**9**9**9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'*10**11 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(200) %}{% for j in range(200) %}" + 30 * "word " + "{% endfor %}{% endfor %}",
        "{{ lipsum(n=100000) }}",
        "{% set r = range(999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ 'a'.ljust(10**11) }}",
        "{{ 'a' | center(10**11) }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '%099999999999d' | format(1) }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{" + 3000 * "(" + "1" + 3000 * ")" + "}}",
        "{{ raise_exception('\\x1b[2J\\n\\n gone') }}",
        "\\xff",
    ],
)
def test_a_template_that_fails_or_never_ends_is_refused_in_one_line(tmp_path: Path, template: str):
    folder = chat_parent(tmp_path, "")
    (folder / "chat_template.jinja").write_bytes(b"\xff" if template == "\\xff" else template.encode())
    with pytest.raises(CheckpointError) as error:
        vocabulary_of(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_half_a_surrogate_pair_is_refused(tmp_path: Path):
    folder = chat_parent(tmp_path, "")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "\ud800" + BRACKETS}))
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        vocabulary_of(folder)


def test_half_a_surrogate_pair_that_a_template_writes_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="writes half a surrogate pair, no text") as error:
        vocabulary_of(chat_parent(tmp_path, "{{ '\\ud800' }}" + BRACKETS))
    assert str(error.value).isprintable()


def test_a_template_with_letters_that_the_tokenizer_has_no_ids_for_is_refused(tmp_path: Path):
    folder = chat_parent(tmp_path, BRACKETS)
    edit_json(folder / "tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "?"}})
    with pytest.raises(CheckpointError, match=r"its tokenizer has no ids for its chat template \(WordLevel"):
        vocabulary_of(folder)


def test_an_error_of_our_own_is_not_put_on_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def encode(self, *_: object, **__: object) -> None:
            raise KeyError

    monkeypatch.setattr(TextTokenizer, "load", lambda folder: TextTokenizer.__new__(TextTokenizer))
    monkeypatch.setattr(TextTokenizer, "tokenizer", Broken(), raising=False)
    with pytest.raises(KeyError):
        vocabulary_of(chat_parent(tmp_path, BRACKETS))


def test_the_template_is_found_in_the_settings_too(tmp_path: Path):
    assert read_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": [{"name": "default", "template": "a"}]}))
    assert read_template(tmp_path) == "a"
    settings.write_text(json.dumps({"chat_template": "b"}))
    assert read_template(tmp_path) == "b"
    settings.write_text("[")
    with pytest.raises(CheckpointError, match="damaged"):
        read_template(tmp_path)


def test_turns_name_ids_of_the_vocabulary():
    raw = JamFile(Vocabulary.from_json({"spans": [["control", 0, 3]], "controls": {"eos": 2}, "codes_per_image": 0}))
    good = raw.vocabulary.to_json() | {"turns": {"opening": [0], "assistant": [1], "user": []}}
    assert Vocabulary.from_json(good).turns == Turns((0,), (1,), ())
    assert Vocabulary.from_json(good).to_json() == good
    with pytest.raises(CheckpointError, match="turns name id 3"):
        Vocabulary.from_json(good | {"turns": {"opening": [3], "assistant": [1], "user": []}})
    with pytest.raises(CheckpointError, match="turns but no eos"):
        Vocabulary.from_json(good | {"controls": {}})
    with pytest.raises(CheckpointError, match="turns is a int"):
        Vocabulary.from_json(good | {"turns": 5})


def test_a_fused_model_keeps_the_llms_turns_and_their_rows(tmp_path: Path):
    """A chat LLM over an image parent of the same tokenizer: the LLM's turns and its own end of a reply."""
    text = chat_parent(tmp_path, CHATML)
    pair = Pair(read_parent(text, "text"), read_parent(tmp_path / "image", "image"))
    turns = vocabulary_of(text).turns
    assert pair.union.same and pair.union.vocabulary.turns == turns and pair.union.vocabulary.controls["eos"] == 4
    assert pair.union.text.known[[3, 4]].all()  # what its template writes, it has trained
    out = run_merge(MergeRecipe(method="cross", text=text, image=tmp_path / "image", out=tmp_path / "out"))
    bundle = load_bundle(out)
    assert bundle.vocabulary == pair.union.vocabulary
    codes = CodesPart(tuple(range(CODES_PER_IMAGE)), "assistant")
    document = Document((TextPart("a cat", "user", 0.0), codes))
    tokens = render(document, bundle.vocabulary, bundle.text)
    assert parse(tokens.ids.tolist(), bundle.vocabulary, bundle.text) == document
