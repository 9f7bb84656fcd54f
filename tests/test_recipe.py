"""Recipes: strict reading, every mistake named at its place, round trip, and every shipped recipe."""

from pathlib import Path

import pytest

from finetune.recipe import FinetuneRecipe
from jam.errors import RecipeError
from jam.recipe import Recipe, dump_recipe, load_recipe, recipe_kind, schema
from merge.recipe import MergeRecipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MODELS: dict[str, type[Recipe]] = {"merge": MergeRecipe, "finetune": FinetuneRecipe}

GOOD = """kind: finetune
model: runs/m
output_dir: runs/o
data:
  mix:
    text: {kind: text, path: mini, weight: 0.4}
train:
  steps: 10
"""
MERGE = ["method=cross", "out=runs/x"]


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "x.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def mistakes(path: Path | None, model: type[Recipe] = FinetuneRecipe, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error, the recipe's own path shortened to its name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, model, overrides)
    return [line.replace(str(path), "x.yaml") for line in str(caught.value).splitlines()]


def test_yaml_1_2_scalars(tmp_path: Path) -> None:
    """1e-4 is a float, ``on`` a string, underscores part of an integer: PyYAML reads the first two otherwise."""
    text = GOOD.replace("runs/m", "on").replace("steps: 10", "tokens: 2_000_000") + "optim: {lr: 1e-4, warmup: 100}\n"
    recipe = load_recipe(write(tmp_path, text), FinetuneRecipe)
    assert recipe.model == Path("on")
    assert (recipe.optim.lr, recipe.train.tokens) == (1e-4, 2_000_000)
    assert recipe.optim.warmup == 100 and isinstance(recipe.optim.warmup, int)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_survive_a_dump(path: Path, tmp_path: Path) -> None:
    model = MODELS[recipe_kind(path, list(MODELS))]
    recipe = load_recipe(path, model)
    again = load_recipe(write(tmp_path, dump_recipe(recipe)), model)
    assert again == recipe


def test_shipped_recipes_are_the_promised_ones() -> None:
    names = {path.stem for path in SHIPPED}
    assert {"merge_uniform", "merge_width", "merge_cross", "pretrain", "interleaved"} <= names


def test_dump_keeps_awkward_values(tmp_path: Path) -> None:
    """Texts that look like other types, non-ASCII, tiny floats and regular expressions come back equal."""
    overrides = [
        "model='1e-4'",
        "output_dir='été: #1'",
        "optim.eps=1e-12",
        r"optim.groups=[{match: 'gate|^a\.b$', lr_mul: 0}]",
        'data.mix={"null": {kind: text, path: "yes", weight: 3}}',
        "train.steps=5",
    ]
    recipe = load_recipe(None, FinetuneRecipe, overrides)
    assert recipe.optim.groups[0].match == r"gate|^a\.b$"
    assert load_recipe(write(tmp_path, dump_recipe(recipe)), FinetuneRecipe) == recipe


def test_all_mistakes_at_once_each_at_its_place(tmp_path: Path) -> None:
    text = """kind: finetune
modle: runs/m
output_dir: runs/o
data:
  mix:
    text: {kind: text, path: mini, wieght: 0.4}
    pictures:
      kind: caption
      path: mini
      weight: "3"
      weight: 2
optim:
  lr: fast
  betas: [0.9]
  warmup: soon
train:
  steps: 12x
learning_rate: 3
log: 3
"""
    found = mistakes(write(tmp_path, text), overrides=("train.tokens=1e6", "train.stepz=4", "saev.every=4", "oops"))
    assert found == [
        "x.yaml:1:1: model: not given; required: folder of the model to train",
        'x.yaml:2:1: modle: unknown key; did you mean "model"?',
        "x.yaml:6:11: data.mix.text.weight: not given; required: share of this source in the mix, in packed sequences, "
        "to a hundredth; shares are normalised",
        'x.yaml:6:36: data.mix.text.wieght: unknown key; did you mean "weight"?',
        "x.yaml:8:13: data.mix.pictures.kind: must be 'text', 'captions', 'conversations', 'scenes' or 'shards', "
        'found "caption"; did you mean "captions"?',
        'x.yaml:10:15: data.mix.pictures.weight: must be a valid number, found "3"',
        "x.yaml:11:7: data.mix.pictures.weight: duplicate key, first given on line 10; keep one of the two",
        'x.yaml:13:7: optim.lr: must be a valid number, found "fast"',
        "x.yaml:14:10: optim.betas: a list of 1, too short; required: two decay rates of Adam's means, each in [0, 1)",
        'x.yaml:15:11: optim.warmup: must be a valid integer or a valid number, found "soon"',
        'x.yaml:17:10: train.steps: must be a valid integer, found "12x"',
        'x.yaml:18:1: learning_rate: unknown key; did you mean "optim.lr"?',
        "x.yaml:19:6: log: must be a mapping, found 3",
        'override "train.tokens=1e6": train.tokens: must be a valid integer, found 1000000.0; write 1000000',
        'override "train.stepz=4": train.stepz: unknown key; did you mean "steps"?',
        'override "saev.every=4": saev: unknown key; did you mean "save"?',
        'override "oops": not of the form key=value; write for example train.steps=400',
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        ("gradient_accumulation_steps", "train.global_batch_size"),
        ("num_train_epochs", "train.tokens"),
        ("max_steps", "train.steps"),
        ("cutoff_len", "data.seq_len"),
        ("max_length", "data.seq_len"),
        ("warmup_steps", "optim.warmup"),
        ("save_steps", "save.every"),
        ("logging_steps", "log.every"),
        ("lr", "optim.lr"),  # no alias: our own key, elsewhere
        ("train.seq_len", "data.seq_len"),
        ("train.micro_batchsize", "micro_batch_size"),
    ],
)
def test_spellings_of_other_tools_are_named(tmp_path: Path, key: str, meant: str) -> None:
    override = f"{key}=3"
    assert mistakes(write(tmp_path, GOOD), overrides=(override,)) == [
        f'override "{override}": {key}: unknown key; did you mean "{meant}"?'
    ]


def test_a_hopeless_key_gets_the_list(tmp_path: Path) -> None:
    assert mistakes(write(tmp_path, GOOD), overrides=("save.zzz=1",)) == [
        'override "save.zzz=1": save.zzz: unknown key; valid here: every, keep'
    ]


@pytest.mark.parametrize("model", [MergeRecipe, FinetuneRecipe])
def test_aliases_point_at_real_keys(model: type[Recipe]) -> None:
    for alias, target in model.aliases.items():
        node = schema(model)
        for part in target.split("."):
            node = node["properties"][part]
            reference = node.get("$ref", "").rpartition("/")[2]
            node = schema(model)["$defs"][reference] if reference else node
        assert alias not in model.model_fields or target == alias


@pytest.mark.parametrize("model", [MergeRecipe, FinetuneRecipe])
def test_schema_describes_every_key(model: type[Recipe]) -> None:
    described = schema(model)
    sections = [described, *described["$defs"].values()]
    keys = [info for section in sections for info in section["properties"].values()]
    assert len(keys) > 15
    assert all(info.get("description") for info in keys)
    assert all(section["additionalProperties"] is False for section in sections)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=0x" + "f" * 6000, "seed: a whole number of 24000 bits; required: one of 64 bits at most; lower it"),
        ("seed=" + "9" * 6000, f'seed: "{"9" * 57}..." is no int; remove the tag or mend the value'),
        (
            "uniform.weight=2",
            "uniform.weight: 2 is no share; a number from 0 to 1, or a list of them, is required",
        ),
    ],
)
def test_a_number_out_of_range_is_one_line(override: str, message: str) -> None:
    (found,) = mistakes(None, MergeRecipe, ("method=uniform", "out=runs/x", override))
    assert found == f'override "{override}": {message}'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "x.yaml:1:1: the file is empty"),
        (b"# only a comment\n", "x.yaml:1:1: the file is empty"),
        (b"- a\n- b\n", "x.yaml:1:1: a list; required: a mapping"),
        (b"\nhello\n", "x.yaml:2:1: a single value; required: a mapping"),
        (b"a: 1\nb: \xff\n", "x.yaml:2: byte 0xff is not UTF-8"),
        (b"a: 1\nb: [1, 2\n", "x.yaml:3:1: YAML syntax: while parsing a flow sequence expected ',' or ']'"),
        (b"a: 1\n b: 2\n", "x.yaml:2:3: YAML syntax: mapping values are not allowed here"),
        (b"a: 1\nb:\t- 2\n\tc: 3\n", "x.yaml:2:3: YAML syntax: "),
        (b"a: 1\n---\na: 2\n", "x.yaml:2:1: YAML syntax: expected a single document"),
        (b"a: 1\nb: \x00\n", "x.yaml:2: YAML syntax: character "),
        (b"a: " + b"[" * 3000, "x.yaml: YAML syntax: nested too deeply"),
    ],
)
def test_files_that_hold_no_tree(tmp_path: Path, content: bytes, line: str) -> None:
    found = mistakes(write(tmp_path, content))
    assert len(found) == 1 and found[0].startswith(line)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r'xx\.yaml: no such file; .*did you mean ".*x\.yaml"'):
        load_recipe(tmp_path / "xx.yaml", FinetuneRecipe)
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path, FinetuneRecipe)


def test_aliases_and_tags_are_refused_once(tmp_path: Path) -> None:
    """One line each, and none from the schema about the value that could not be read."""
    text = GOOD.replace("10", "&n 10") + "seed: *n\nresume: !!python/name:os.system ''\nloss: {text: !!float abc}\n"
    assert mistakes(write(tmp_path, text)) == [
        "x.yaml:8:10: train.steps: an anchor or its alias (&n); required: a plain tree; write the value out",
        "x.yaml:8:10: seed: an anchor or its alias (&n); required: a plain tree; write the value out",
        "x.yaml:10:9: resume: the tag tag:yaml.org,2002:python/name:os.system; required: a plain value; remove the tag",
        'x.yaml:11:14: loss.text: "abc" is no float; remove the tag or mend the value',
    ]


def test_overrides_replace_and_the_last_wins(tmp_path: Path) -> None:
    overrides = ["data.mix.text.weight=1", "data.mix.text.weight=0.25", "optim.betas=[0.8, 0.9]", "train.threads=null"]
    overrides += ["data.mix.more={kind: text, path: a b.jsonl, weight: 1}", "data.mix.more.limit=3"]
    overrides += ["optim.groups=[{match: gate, lr_mul: 1}]", "optim.groups.0.lr_mul=0", 'model="a: b"']
    recipe = load_recipe(write(tmp_path, GOOD), FinetuneRecipe, overrides)
    assert recipe.data.mix["text"].weight == 0.25
    assert (recipe.data.mix["more"].path, recipe.data.mix["more"].limit) == ("a b.jsonl", 3)
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.optim.groups[0].lr_mul == 0
    assert recipe.model == Path("a: b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=[0.9", "optim.betas: YAML syntax: while parsing a flow sequence"),
        ("seed.deep=1", 'seed.deep: "seed" has no items of that name; set "seed" as a whole'),
        ("optim.groups.2.lr_mul=1", "unknown"),
        ("seed=!!int ''", 'seed: "" is no int'),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("seed={a: 1, a: 2}", "seed.a: duplicate key"),
        ("train.steps=true", "train.steps: must be a valid integer, found true"),
        ("train.steps=10.5", "train.steps: must be a valid integer, found 10.5"),
        ("optim.lr=.inf", "optim.lr: must be a finite number"),
        ("optim.lr=-1", "optim.lr: must be greater than 0, found -1"),
        ("output_dir=2026", "output_dir: must be a valid string, found 2026"),
        ("data.mix={}", "data.mix: "),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    text = GOOD + "seed: 3\n"
    found = mistakes(write(tmp_path, text), overrides=(override,))
    if message == "unknown":
        assert "optim.groups" in found[0]
    else:
        assert found[0].startswith(f'override "{override}": {message}')


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.steps=null",), "train: neither tokens nor steps is given; required: exactly one"),
        (("train.tokens=5",), "train: both tokens (5) and steps (10) are given; required: exactly one"),
        (("train.micro_batch_size=3",), "set global_batch_size to 9"),
        (("optim.warmup=1.5",), "write 2 for steps"),
        (("optim.warmup=20",), "optim.warmup is 20 steps of a run of 10"),
        (("optim.warmup=5", "train.steps=null", "train.tokens=20_000"), "optim.warmup is 5 steps of a run of 5"),
        (("optim.betas=[0.9, 1.0]",), "optim.betas: found [0.9, 1.0]; required: two numbers in [0, 1)"),
        (("optim.groups=[{match: '(', lr_mul: 1}]",), 'optim.groups.0.match: "(" is no regular expression'),
        (("loss.text=0", "loss.image=0"), "loss: text and image are both 0"),
    ],
)
def test_relations_between_keys(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    found = mistakes(write(tmp_path, GOOD), overrides=overrides)
    assert len(found) == 1 and message in found[0]


def test_settings_of_another_method_are_refused() -> None:
    found = mistakes(None, MergeRecipe, (*MERGE, "uniform.weight=0.3"))
    assert found == [
        'command line: "uniform" has settings but method is "cross", which would ignore them; required: settings of '
        'the chosen method only; remove "uniform" or set method to "uniform"'
    ]
    assert load_recipe(None, MergeRecipe, [*MERGE, "cross.every=3"]).cross.every == 3


def test_defaults_of_a_merge() -> None:
    recipe = load_recipe(None, MergeRecipe, MERGE)
    assert (recipe.text, recipe.image, recipe.dtype, recipe.seed) == (None, None, "bfloat16", 0)
    assert (recipe.uniform.weight, recipe.width.off_diagonal) == (0.5, "copy")
    assert (recipe.cross.every, recipe.cross.tables, recipe.cross.ffn_ratio) == (2, "separate", 4)


def test_a_recipe_of_another_kind_is_one_mistake(tmp_path: Path) -> None:
    found = mistakes(write(tmp_path, GOOD), MergeRecipe)
    assert found == ['x.yaml:1:7: kind: found "finetune"; required here: "merge"; is it another command\'s recipe?']


def test_kind_is_required_where_it_chooses_the_schema(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'no kind; required: .* write "kind: merge" or "kind: finetune"'):
        recipe_kind(write(tmp_path, GOOD.replace("kind: finetune\n", "")), list(MODELS))
    with pytest.raises(RecipeError, match=r'x\.yaml:1:7: kind: kind "marge"; required'):
        recipe_kind(write(tmp_path, GOOD.replace("finetune", "marge")), list(MODELS))


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(None, MergeRecipe, MERGE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_a_line_break_in_a_key_stays_in_its_line(tmp_path: Path) -> None:
    found = mistakes(write(tmp_path, GOOD), overrides=("se\ned=1", "seed='\x1b[2J'"))
    assert len(found) == 2
    assert found[0].startswith(r'override "se\ned=1": se\ned: unknown key; did you mean "seed"?')
    assert r"\x1b" in found[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mix.text.weight=1e308", "must be less than or equal to"),
        ("data.mix.text.loss.text=1e38", "from 0.0001 to 10000"),
        ("loss.text=1e-12", "from 0.0001 to 10000"),
        ("optim.lr=1e308", "must be less than or equal to"),
        ("optim.groups=[{match: a, lr_mul: 1e308}]", "must be less than or equal to"),
        ("seed=18446744073709551615", "must be less than or equal to"),
        ("train.global_batch_size=1000000000000000000", "must be less than or equal to"),
        ('output_dir=""', "an empty path"),
        ('model=""', "an empty path"),
    ],
)
def test_numbers_beyond_what_training_computes_with_and_empty_paths_are_refused(tmp_path, override, message):
    (found,) = mistakes(write(tmp_path, GOOD), overrides=(override,))
    assert override.split("=")[0].split(".")[-1] in found and message in found, found


def test_what_may_differ_on_resuming_is_named_as_settings_are(tmp_path: Path) -> None:
    good = "resume_allow=[optim.lr, lora.r, data.mix.gone.skip, content.data.mix.text, order, train, optim.groups]"
    assert load_recipe(write(tmp_path, GOOD), FinetuneRecipe, (good,)).resume_allow[1] == "lora.r"
    (found,) = mistakes(write(tmp_path, GOOD), overrides=("resume_allow=[optim.lr, optim.lrr]",))
    assert "resume_allow names optim.lrr, and 'lrr' is no setting, lr is; required: dotted names" in found
