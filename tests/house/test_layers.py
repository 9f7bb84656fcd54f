"""The house's layers: a file imports its own layer and lower ones, and the doors are imported by nobody."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS: dict[str, int] = {
    "jam/__init__": 0,
    "jam/errors": 0,
    "jam/memory": 0,
    "jam/child": 0,
    "jam/recipe": 0,
    "jam/recipe_tree": 0,
    "jam/assets": 0,
    "jam/floats": 1,
    "jam/checkpoint": 1,
    "jam/shards": 1,
    "jam/digest": 1,
    "jam/byte_bar": 1,
    "jam/shard_file": 1,
    "jam/header": 1,
    "jam/journal": 1,
    "jam/difference": 1,
    "jam/document": 1,
    "jam/tokens": 1,
    "jam/layouts": 1,
    "jam/models": 2,
    "jam/decode": 3,
    "jam/evaluate": 3,
    "jam/plot": 3,
    "jam/convert": 4,
    "merge": 4,
    "finetune": 4,
}
DOORS = 5  # everything else under jam/
TORCH_FREE = (
    *(
        "jam/errors",
        "jam/child",
        "jam/recipe",
        "jam/recipe_tree",
        "jam/assets",
        "jam/checkpoint",
        "jam/shards",
        "jam/header",
        "jam/digest",
        "jam/byte_bar",
        "jam/journal",
        "jam/shard_file",
        "jam/floats",
    ),
    "jam/layouts",
)


def layer(module: str) -> int:
    """Layer of a dotted module of ours."""
    path = module.replace(".", "/")
    fitting = [prefix for prefix in LAYERS if path == prefix or path.startswith(prefix + "/")]
    if fitting:
        return LAYERS[max(fitting, key=len)]
    return LAYERS["jam/__init__"] if path == "jam" else DOORS


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere; ``from jam import x`` counts as ``jam.x`` when that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            folder = ROOT / node.module.replace(".", "/")
            names = {alias.name for alias in node.names}
            found |= {f"{node.module}.{n}" for n in names if (folder / f"{n}.py").exists() or (folder / n).is_dir()}
    return found


def sources() -> list[tuple[str, Path]]:
    files = [path for top in ("jam", "merge", "finetune") for path in sorted((ROOT / top).rglob("*.py"))]
    return [(str(path.relative_to(ROOT).with_suffix("")).replace("/", "."), path) for path in files]


def test_imports_go_down_only():
    wrong, seen = [], 0
    for module, path in sources():
        own = layer(module.removesuffix(".__init__"))
        for target in imports(path):
            if target.split(".")[0] in ("jam", "merge", "finetune"):
                seen += 1
                if layer(target) > own:
                    wrong.append(f"{module} (layer {own}) imports {target} (layer {layer(target)})")
    assert seen > 100 and not wrong, "\n".join(wrong)


def test_merge_and_finetune_never_import_each_other():
    for module, path in sources():
        top = module.split(".")[0]
        other = {"merge": "finetune", "finetune": "merge"}.get(top)
        if other:
            assert not any(t.split(".")[0] == other for t in imports(path)), module


def test_the_ground_and_the_merge_path_import_no_torch():
    checked = 0
    for module, path in sources():
        name = module.replace(".", "/").removesuffix("/__init__")
        layout = name.startswith("jam/layouts/")
        if name in TORCH_FREE or layout or module.startswith("merge") or module == "jam.models.families":
            checked += 1
            assert not {t.split(".")[0] for t in imports(path)} & {"torch", "transformers"}, module
    assert checked > 10


def test_nobody_downloads_or_unpickles():
    for module, path in sources():
        text = path.read_text()
        for word in ("trust_remote_code=True", "pickle.load", "torch.load(", "urlopen", "requests.get"):
            allowed = word == "torch.load(" and module == "jam.convert.unpickle"
            assert allowed or word not in text, f"{module}: {word}"


def test_the_one_file_that_opens_pickles_runs_alone_and_loads_weights_only():
    path = ROOT / "jam" / "convert" / "unpickle.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "load"]
    assert [ast.unparse(key.value) for call in loads for key in call.keywords if key.arg == "weights_only"] == ["True"]
    assert not {target.split(".")[0] for target in imports(path)} & {"jam", "merge", "finetune"}
    assert not [module for module, source in sources() if "jam.convert.unpickle" in imports(source)]


def test_the_one_file_that_runs_templates_runs_alone():
    path = ROOT / "jam" / "tokens" / "run_template.py"
    assert not {target.split(".")[0] for target in imports(path)} & {"jam", "merge", "finetune"}
    assert not [module for module, source in sources() if "jam.tokens.run_template" in imports(source)]
    assert [module for module, source in sources() if "jinja2" in " ".join(imports(source))] == [
        "jam.tokens.run_template"
    ]
