"""The ``jam`` command: help and checks without torch, one clear line and exit code 2 for every mistake."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import jam.cli
from jam import __version__, cli, running
from jam.cli import main
from jam.convert import run as convert
from jam.decode import candidates, grammar, options
from jam.errors import MergeError, RunError
from merge.recipe import MergeRecipe

ROOT = Path(__file__).parent.parent.parent
GOOD = """kind: finetune
model: runs/m
output_dir: runs/o
data: {mix: {text: {kind: text, path: mini, weight: 0.4}}}
train: {steps: 10}
"""
HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "PIL", "matplotlib")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


def modules_after(arguments: list[str]) -> tuple[int, set[str], str]:
    """Run the command in a fresh interpreter; its exit code, the modules it loaded, its standard output."""
    program = (
        "import sys; from jam.cli import main; code = main(sys.argv[1:]); "
        "print(' '.join(sorted(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, set(done.stderr.split()), done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["recipe", "check", "recipes/pretrain.yaml"],
        ["recipe", "check", "recipes/merge_cross.yaml"],
        ["recipe", "schema", "merge"],
        ["recipe", "schema", "finetune"],
        ["finetune", "--help"],
        ["data", "--help"],
        ["data", "prepare", "--help"],
    ],
    ids=" ".join,
)
def test_light_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    code, modules, output = modules_after(arguments)
    assert code == 0 and output
    assert "jam.cli" in modules  # the list is the real one
    assert not modules.intersection(HEAVY)


def test_help_loads_no_recipe_either() -> None:
    _, modules, output = modules_after(["--help"])
    assert not modules.intersection({"pydantic", "ruamel.yaml"})
    for verb in ("merge", "finetune", "chat", "generate", "inspect", "recipe", "data", "demo"):
        assert f"\n  {verb} " in output


def test_console_script_is_declared() -> None:
    assert 'jam = "jam.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jam {__version__}\n"


def test_check_accepts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", str(recipe)]) == 0
    assert capsys.readouterr().out == f"{recipe}: a valid finetune recipe\n"
    assert main(["recipe", "check", str(recipe), "train.steps=77", "--show"]) == 0
    assert "  steps: 77\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("model:", "flavour: sweet\nmodel:", "2:1: flavour: unknown key; valid here: kind, model,"),
        ("model:", "modell:", '2:1: modell: unknown key; did you mean "model"?'),
        ("weight", "wieght", '4:45: data.mix.text.wieght: unknown key; did you mean "weight"?'),
        ("steps: 10", "steps: 10x", '5:16: train.steps: must be a valid integer, found "10x"'),
        ("kind: text", "kind: txt", "4:27: data.mix.text.kind: must be 'text', 'captions'"),
        ("output_dir", "model", "3:1: model: duplicate key, first given on line 2; keep one of the two"),
        ("steps: 10}", "steps: 10", "6:1: YAML syntax: while parsing a flow mapping expected ',' or '}'"),
        ("runs/o", "runs: o", "3:17: YAML syntax: mapping values are not allowed here"),
        ("kind: finetune\n", "", '1:1: kind: no kind; required: which schema the file follows; write "kind: merge"'),
        (GOOD, "", "1:1: the file is empty"),
        ("runs/o", r'"a\0b"', "3:13: output_dir: a character that no text or path may hold; remove it"),
        ("steps: 10", "steps: 10, threads: 100000", "5:29: train.threads: must be less than or equal to 1024"),
        (
            "weight: 0.4",
            "weight: 1, loss: {text: 0, image: 0}",
            "4:62: data.mix.text.loss: text and image are both 0; required: one weight above 0",
        ),
    ],
)
def test_check_refuses(recipe: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert old in GOOD
    recipe.write_text(GOOD.replace(old, new, 1))
    assert main(["recipe", "check", str(recipe)]) == 2
    captured = capsys.readouterr()
    assert any(line.startswith(f"error: {recipe}:{expected}") for line in captured.err.splitlines()), captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_check_reports_everything_at_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(GOOD.replace("runs/m", "3").replace("weight", "wieght") + "sed: 1\nseed: 1\nseed: 2\n")
    assert main(["recipe", "check", str(recipe), "train.step=4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    places = ["2:8: model", "4:20: data.mix.text.weight", "4:45: data.mix.text.wieght", "6:1: sed", "8:1: seed"]
    for line, place in zip(lines, places, strict=False):
        assert line.startswith(f"error: {recipe}:{place}: ")
    assert lines[5:] == ['error: override "train.step=4": train.step: unknown key; did you mean "steps"?']


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema", "merge"]) == 0
    methods = json.loads(capsys.readouterr().out)["properties"]["method"]["enum"]
    assert methods == ["uniform", "width", "cross", "extend"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge"], ["command line: method: not given", "command line: out: not given"]),
        (["merge", "--out", "o"], ["command line: method: not given; required: uniform, width, cross or extend"]),
        (
            ["merge", "--method", "cross", "--out", "a: b", "cros.every=3"],
            ['override "cros.every=3": cros: unknown key; did you mean "cross"?'],
        ),
        (["merge", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["finetune", "nowhere.yaml", "train.steps=4"], ["nowhere.yaml: no such file"]),
        (["merge", "recipes/pretrain.yaml"], ['recipes/pretrain.yaml:4:7: kind: found "finetune"; required here']),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_verbs_refuse_before_loading_anything(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"error: {start}")


@pytest.mark.parametrize(
    "arguments",
    [["mergee"], ["finetune"], ["generate"], ["merge", "--method", "crs"], ["chat", "--temperature", "-1"], ["recipe"]],
    ids=" ".join,
)
def test_usage_errors_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: jam" in "".join(capsys.readouterr())


VERBS_WITH_PATHS = [
    ["merge", "--method", "cross", "--out"],
    ["calibrate", "--out"],
    ["chat", "--out"],
    ["generate", "--prompt", "x", "--out"],
    ["convert", "x.ckpt", "--out"],
    ["fetch", "smollm2", "--out"],
    ["demo", "--quick", "--out"],
    ["inspect"],
    ["finetune"],
    ["recipe", "check"],
]


@pytest.mark.parametrize("arguments", VERBS_WITH_PATHS, ids=" ".join)
def test_a_nul_in_a_path_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "a\0b"]) == 2
    assert capsys.readouterr().err == "error: argument 'a\\x00b': a NUL, which no text or path may hold; remove it\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A callable that makes ``jam inspect`` raise what it is given."""

    def install(error: BaseException) -> None:
        module = type(sys)("jam.inspect")

        def run_inspect(paths: list[Path]) -> None:
            raise error

        module.run_inspect = run_inspect
        monkeypatch.setitem(sys.modules, "jam.inspect", module)

    return install


def test_jam_error_is_one_line(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(MergeError("parents differ; required: equal widths; use cross"))
    assert main(["inspect", "a"]) == 2
    assert capsys.readouterr().err == "error: parents differ; required: equal widths; use cross\n"


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "a"], ["inspect", "a", "--debug"]], ids=" ".join)
def test_debug_lets_the_traceback_through(failing, arguments: list[str]) -> None:
    failing(MergeError("parents differ"))
    with pytest.raises(MergeError):
        main(arguments)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST])
def test_refusals_of_the_machine_are_one_line(failing, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    failing(OSError(number, "refused", "some/file"))
    assert main(["inspect", "a"]) == 2
    assert capsys.readouterr().err == (
        f"error: some/file: refused; required: room and leave to use this path; {jam.cli._ADVICE[number]}\n"
    )


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "broken disk"), AssertionError("a bug")])
def test_bugs_keep_their_traceback(failing, error: Exception) -> None:
    failing(error)
    with pytest.raises(type(error)):
        main(["inspect", "a"])


def test_interrupt_is_130(failing) -> None:
    failing(KeyboardInterrupt())
    assert main(["inspect", "a"]) == 130


def test_sigterm_unwinds_and_is_143(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half-written is removed on the way out, as at Ctrl+C."""
    import signal

    before, cleaned = signal.getsignal(signal.SIGTERM), []
    failing(None)

    def run_inspect(paths: list[Path]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(sys.modules["jam.inspect"], "run_inspect", run_inspect)
    try:
        assert main(["inspect", "a"]) == 143 and cleaned
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupted_run_is_no_error(failing, capsys: pytest.CaptureFixture[str]) -> None:
    """An error class with its own exit code (a run that saved itself on SIGTERM) keeps it."""

    class Stopped(RunError):
        exit_code = 143

    failing(Stopped("stopped at step 3; the same command resumes"))
    assert main(["inspect", "a"]) == 143
    assert capsys.readouterr().err == "stopped at step 3; the same command resumes\n"


def test_words_of_flags_are_those_of_the_modules() -> None:
    """The command line cannot import them, since they load torch."""
    words = {
        cli.Mode: get_args(grammar.Mode),
        cli.Rank: get_args(candidates.Rank),
        cli.Guidance: get_args(options.Guidance),
        cli.Numbers: get_args(running.Numbers),
        cli.SourceKind: tuple(kind.value for kind in convert.SourceKind),
        cli.Method: get_args(MergeRecipe.model_fields["method"].annotation),
    }
    assert all(set(get_args(said)) == set(known) for said, known in words.items()), words
