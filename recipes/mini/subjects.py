"""Join the emoji labels to the texts that are about exactly the same thing.

Stages, in order:
1. a label meets a Wikipedia title, a WordNet noun or a country by exact name, after the rules of ``names_of``
   ("flag: " prefix, " face" and " button" suffix, a plural "s");
2. a WordNet sense must come from a lexicographer file that fits the emoji's group (an animal from noun.animal), and
   neither source may be on the lists of wrong senses below, which were found by reading;
3. the texts are cut to one short sentence each.

It will not guess a subject from a similar name.
"""

import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from build_text import fold, foreign, row_lemma, split_of, wordnet_senses
from common import COUNTRYINFO, WORDNET, npm_tarball, read_rows, sentences, wheel

TEXT_CHARACTERS = 150  # about 40 tokens of the mini tokenizer

# Lexicographer files of WordNet that fit an emoji group or subgroup, most fitting first.
ACT, ANIMAL, ARTIFACT, BODY, COGNITION, COMMUNICATION, EVENT, FOOD, GROUP, PLACE, OBJECT, PERSON = (
    4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 17, 18,
)  # fmt: skip
PHENOMENON, PLANT, POSSESSION, SHAPE, STATE, SUBSTANCE, TIME = 19, 20, 21, 25, 26, 27, 28
FILES_BY_GROUP = {
    "animals-nature": (ANIMAL,),
    "plant-flower": (PLANT, ARTIFACT),
    "plant-other": (PLANT, FOOD, OBJECT),
    "food-drink": (FOOD, PLANT),
    "drink": (FOOD, ARTIFACT, SUBSTANCE),
    "dishware": (ARTIFACT,),
    "objects": (ARTIFACT, COMMUNICATION),
    "money": (POSSESSION, ARTIFACT),
    "medical": (ARTIFACT, BODY, SUBSTANCE),
    "science": (ARTIFACT, SUBSTANCE),
    "other-object": (ARTIFACT,),
    "activities": (ARTIFACT, ACT, COMMUNICATION),
    "event": (ARTIFACT, ACT, TIME),
    "game": (ARTIFACT, ACT),
    "travel-places": (ARTIFACT, OBJECT),
    "sky-weather": (OBJECT, PHENOMENON, ARTIFACT, EVENT),
    "place-geographic": (OBJECT, PLACE, ARTIFACT),
    "place-other": (ARTIFACT, OBJECT, PHENOMENON, TIME),
    "time": (ARTIFACT,),
    "body-parts": (BODY, ARTIFACT),
    "person": (PERSON,),
    "person-role": (PERSON,),
    "person-fantasy": (PERSON, COGNITION),
    "person-sport": (ACT, PERSON),
    "person-symbol": (GROUP, OBJECT),
    "hands": (ACT,),
    "face-costume": (PERSON, ARTIFACT, COGNITION),
    "face-negative": (BODY, ARTIFACT, COMMUNICATION),
    "emotion": (OBJECT, EVENT),
    "zodiac": (PLACE, OBJECT),
    "religion": (ARTIFACT, COMMUNICATION, SHAPE),
    "flag": (ARTIFACT, COMMUNICATION),
}
# Wrong senses, found by reading; label -> reason.
NOT_WORDNET: dict[str, str] = {}
NOT_WIKIPEDIA: dict[str, str] = {}


@dataclass
class Subject:
    """One label with its images and the short texts about it."""

    label: str
    group: str
    subgroup: str
    tags: list[str]
    images: dict[str, str] = field(default_factory=dict)  # style -> file, usable ones only
    held_out: bool = False  # the whole label is split "label"
    texts: list[dict] = field(default_factory=list)  # {text, source, title, split}, best first
    facts: dict | None = None  # countryinfo: name, capital, region, population

    def texts_for(self, split: str) -> list[dict]:
        """Texts that a conversation of this split may quote: training never sees a held-out text."""
        return [t for t in self.texts if split != "train" or t["split"] == "train"]


def names_of(label: str, subgroup: str) -> list[str]:
    """Lower-case names under which a text about the label may be filed, best first.

    >>> names_of("cat face", "animal-mammal"), names_of("cherries", "food-fruit")
    (['cat face', 'cat'], ['cherries', 'cherry'])
    """
    name = fold(label).lower()
    if name.startswith("flag: "):
        country = name[6:].replace("&", "and")
        return [country, f"the {country}"]
    names = [name]
    if name.endswith(" face") and not subgroup.startswith("face-"):
        names.append(name.removesuffix(" face"))
    if re.fullmatch(r"[a-z]+ies", name):
        names.append(name[:-3] + "y")
    elif re.fullmatch(r"[a-z]{3,}[^s]s", name):
        names.append(name[:-1])
    return names


def load_subjects(images: Path) -> dict[str, Subject]:
    """Subjects by label in file order; ``images`` of a seen label are those of split train."""
    subjects: dict[str, Subject] = {}
    for row in read_rows(images):
        default = Subject(row["label"], row["group"], row["subgroup"], row["tags"])
        subject = subjects.setdefault(row["label"], default)
        subject.held_out |= row["split"] == "label"
        if row["split"] in ("train", "label"):
            subject.images[row["style"]] = row["file"]
    return {label: subject for label, subject in subjects.items() if subject.images}


def shorten(sentence: str) -> str:
    """The sentence without brackets, cut before a closing clause if it is too long; "" if it stays too long.

    >>> shorten("A hat (cap) is a head covering.")
    'A hat is a head covering.'
    """
    text = re.sub(r"\s*\([^()]*\)", "", sentence)
    clause = r"(; |, (including|such as|which|where|as well as|although) )"
    while len(text) > TEXT_CHARACTERS:
        cuts = [m.start() for m in re.finditer(clause, text)]
        if not cuts or cuts[-1] < 30:
            return ""
        text = text[: cuts[-1]] + "."
    return text if text.count('"') % 2 == 0 else ""


def add_wikipedia(subjects: dict[str, Subject], rows: list[dict]) -> None:
    """First sentence, and the second where it goes on about the same subject ("It ...", "They ...")."""
    by_title = {fold(row["title"]).lower(): row for row in rows}
    for subject in subjects.values():
        row = next((by_title[n] for n in names_of(subject.label, subject.subgroup) if n in by_title), None)
        if row is None or subject.label in NOT_WIKIPEDIA:
            continue
        pieces = sentences(row["text"])
        for index, piece in enumerate(pieces[:3]):
            goes_on = index == 0 or re.match(r"(It|They|Its|Their|Most|Some|Many) ", piece)
            text = shorten(piece) if goes_on else ""
            if text:
                source = {"source": "wikipedia", "title": row["title"], "split": row["split"], "opens": index == 0}
                subject.texts.append({"text": text} | source)


def definition(label: str, phrase: str, gloss: str) -> str:
    """A WordNet gloss as one sentence, without its examples; "" if it is too long.

    >>> definition("mirror", "a mirror", 'polished surface; "he looked in the mirror"')
    'Mirror: polished surface.'
    >>> definition("drum", "a drum", "a musical percussion instrument")
    'A drum is a musical percussion instrument.'
    """
    body = re.sub(r"\s+", " ", fold(gloss).split('"')[0]).strip(" ;,:")
    body = re.sub(r"^(\([^()]*\) )+", "", body).rstrip(".")
    if foreign(body):
        return ""
    noun = re.match(r"(a|an|any|one|the|someone|something) ", body) and phrase.lower() not in plural_phrases
    text = f"{phrase} is {body}." if noun else f"{fold(label)}: {body}."
    return shorten(text[0].upper() + text[1:])


def add_wordnet(subjects: dict[str, Subject], senses: list[dict], phrase_of) -> None:
    """The most common sense of the best fitting lexicographer file."""
    by_name: dict[str, list[tuple[int, dict]]] = {}
    for sense in senses:
        for lemma, number in zip(sense["lemmas"], sense["numbers"], strict=True):
            by_name.setdefault(lemma.replace("_", " ").lower(), []).append((number, sense))
    labels = {label.lower() for label in subjects}
    for subject in subjects.values():
        files = FILES_BY_GROUP.get(subject.subgroup, FILES_BY_GROUP.get(subject.group, ()))
        if subject.label in NOT_WORDNET or subject.label.startswith("flag: "):
            continue
        for name in names_of(subject.label, subject.subgroup):
            fitting = [(files.index(s["file"]), n, s) for n, s in by_name.get(name, []) if s["file"] in files]
            if not fitting:
                continue
            sense = min(fitting, key=lambda item: item[:2])[2]
            plain = name if name != fold(subject.label).lower() else subject.label
            text = definition(plain, phrase_of(plain), sense["gloss"])
            if text:
                lemma = row_lemma(sense, labels)
                source = {"source": "wordnet", "title": lemma, "split": split_of("wordnet", lemma.lower())}
                subject.texts.append({"text": text, "opens": True} | source)
            break


def add_countries(subjects: dict[str, Subject], wheels: Path) -> None:
    """Capital, region and population of the flags' countries, by exact name or alternative spelling."""
    by_name: dict[str, dict] = {}
    with zipfile.ZipFile(wheel(COUNTRYINFO, wheels)) as archive:
        for member in sorted(archive.namelist()):
            if re.fullmatch(r"countryinfo/data/[^/]*\.json", member):
                country = json.loads(archive.read(member))
                for name in [country["name"], *country.get("altSpellings", [])]:
                    by_name.setdefault(fold(name).lower().replace("&", "and"), country)
    for subject in subjects.values():
        country = by_name.get(names_of(subject.label, "")[0]) if subject.label.startswith("flag: ") else None
        if country and country.get("capital") and country.get("subregion") and country.get("population"):
            subject.facts = {
                "capital": fold(country["capital"]),
                "region": country["subregion"],
                "population": country["population"],
            }


def matched_subjects(data: Path, wheels: Path, packages: Path, phrase_of) -> dict[str, Subject]:
    """All labels with their images and texts; ``phrase_of`` turns a label into "a tomato"."""
    subjects = load_subjects(data / "images.jsonl")
    add_wikipedia(subjects, read_rows(data / "wikipedia.jsonl.xz"))
    add_wordnet(subjects, wordnet_senses(npm_tarball(WORDNET, packages)), phrase_of)
    add_countries(subjects, wheels)
    return subjects
