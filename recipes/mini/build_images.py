"""Rebuild the shipped image-caption set: four permissively licensed emoji sets, rendered at 64 px.

Stages, in order:
1. fetch the five pinned npm packages (or read the tarballs from ``--packages``);
2. join every icon to its Unicode label, keywords and group (emojibase; U+FE0F dropped, no skin tones);
3. rasterise with resvg, centred on white, to lossless WebP;
4. assign splits by hash, so that they never depend on order or on the machine;
5. write ``images.zip`` (stored, fixed timestamps) and ``images.jsonl``, and print the hash of the decoded pixels.

The pixel hash is the contract (``images.sha256``): libwebp may pack the same pixels into other bytes.

    python recipes/mini/build_images.py --out jam/assets/mini/data          # writes, then checks the hash
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import resvg_py
from PIL import Image
from text_tools import npm_tarball

from finetune.data.mini_data import hash_fraction

SIZE = 64
EMOJIBASE = "emojibase-data@17.0.0"
# style -> (package, package whose chars.json names its icons)
STYLES = {
    "noto": ("@iconify-json/noto@1.2.9", "@iconify-json/noto@1.2.9"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "@iconify-json/twemoji@1.2.5"),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "@iconify-json/fluent-emoji-flat@1.2.6"),
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "@iconify-json/fluent-emoji-flat@1.2.6"),
}


def read_json(package: str, member: str, folder: Path):
    with tarfile.open(npm_tarball(package, folder)) as archive:
        return json.load(archive.extractfile(f"package/{member}"))


def labels_by_codepoint(folder: Path) -> dict[str, dict]:
    meta = read_json(EMOJIBASE, "meta/groups.json", folder)
    table = {}
    for entry in read_json(EMOJIBASE, "en/data.json", folder):
        if "group" not in entry:  # the 26 regional indicator letters
            continue
        table[entry["hexcode"].replace("-FE0F", "")] = {
            "label": entry["label"],
            "tags": entry.get("tags", []),
            "group": meta["groups"][str(entry["group"])],
            "subgroup": meta["subgroups"][str(entry["subgroup"])],
        }
    return table


def render(body: str, width: int, height: int) -> Image.Image:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    scale = {"width": SIZE} if width >= height else {"height": SIZE}
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **scale)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(icon, ((SIZE - icon.width) // 2, (SIZE - icon.height) // 2))
    return canvas.convert("RGB")


def assign_splits(rows: list[dict]) -> None:
    """Sets ``split`` in place.

    ``label``: a tenth of the labels drawn in at least three styles is held out whole. ``combination`` and
    ``validation``: of the remaining labels with four styles, a third loses one style, to either split
    in turn by hash. Everything else is ``train``.
    """
    styles_of: dict[str, list[str]] = {}
    for row in rows:
        styles_of.setdefault(row["label"], []).append(row["style"])
    for row in rows:
        label, styles = row["label"], styles_of[row["label"]]
        row["split"] = "train"
        if len(styles) >= 3 and hash_fraction("label", label) < 0.10:
            row["split"] = "label"
        elif len(styles) == len(STYLES) and hash_fraction("combination", label) < 1 / 3:
            missing = styles[int(hash_fraction("style", label) * len(styles))]
            if row["style"] == missing:
                row["split"] = "validation" if hash_fraction("which", label) < 0.4 else "combination"


def build(out: Path, packages: Path) -> str:
    """Writes both files and returns the SHA-256 of all decoded pixels in order."""
    by_codepoint = labels_by_codepoint(packages)
    rows, pixels = [], hashlib.sha256()
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for style, (package, names_from) in STYLES.items():
            icons = read_json(package, "icons.json", packages)
            codepoint_of = {name: code for code, name in read_json(names_from, "chars.json", packages).items()}
            for name in sorted(icons["icons"]):
                code = codepoint_of.get(name, "").upper().replace("-FE0F", "")
                if code not in by_codepoint:
                    continue
                icon = icons["icons"][name]
                image = render(icon["body"], icon.get("width", icons["width"]), icon.get("height", icons["height"]))
                pixels.update(image.tobytes())
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
                file = f"{style}/{name}.webp"
                archive.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), buffer.getvalue())
                rows.append({"file": file, "style": style, **by_codepoint[code]})
            print(f"{style}: {sum(r['style'] == style for r in rows)} images", file=sys.stderr)
    assign_splits(rows)
    with open(out / "images.jsonl", "w", encoding="utf-8") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
    return pixels.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for images.zip and images.jsonl")
    parser.add_argument("--packages", type=Path, help="folder with the npm tarballs; fetched into a temporary one")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        digest = build(args.out, args.packages or Path(temporary))
    recorded = args.out / "images.sha256"
    if not recorded.exists():
        recorded.write_text(digest + "\n")
    same = recorded.read_text().strip() == digest
    print(f"pixels sha256 {digest}: {'as recorded' if same else 'NOT the recorded ' + recorded.read_text().strip()}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
