"""The README's captioned file tree names every source file, and nothing that is not there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED = ("jam", "merge", "finetune", "recipes", "benchmarks", "docs")


def tree_paths() -> set[str]:
    """Paths in the README's tree: a block whose lines are two-space indented names with a caption."""
    block = re.search(r"```text\n(jam/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block, "the README has no file tree"
    stack: list[str] = []
    paths = set()
    for line in block.group(1).splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            paths.add("/".join(stack))
        assert len(line.split()) > 1 or name.endswith("/"), f"no caption: {line}"
    return paths


def tracked() -> set[str]:
    files = subprocess.run(["git", "ls-files", *LISTED], cwd=ROOT, capture_output=True, text=True, check=True)
    kept = [f for f in files.stdout.split("\n") if f.endswith((".py", ".yaml", ".md", ".css"))]
    return {f for f in kept if not f.startswith("jam/assets/mini/") and not f.endswith("__init__.py")}


def test_the_tree_matches_the_disk():
    listed, real = tree_paths(), tracked()
    assert not listed - real, f"in the README, not on disk: {sorted(listed - real)}"
    assert not real - listed, f"on disk, not in the README: {sorted(real - listed)}"


def test_every_number_of_the_readme_has_a_command_and_every_link_a_target():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
