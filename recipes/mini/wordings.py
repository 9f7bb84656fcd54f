"""The words of the mini conversations: how a label is said, how users ask, and how replies open.

``{a}`` stands for a label with its article ("a red apple"), ``{b}`` for a second one, ``{style}`` and ``{other}`` for
drawing styles, ``{country}`` for a country. ``UNSEEN`` wordings never occur in a training conversation. The tokenizer
is trained on these wordings too: after it is frozen, a change here makes training text a little longer, nothing worse.

It will not hold facts: those come from the texts that ``subjects.py`` joins.
"""

import re

STYLES = ("noto", "twemoji", "flat", "fluent")

SEEN: dict[str, tuple[str, ...]] = {
    "explain": (
        "What is {a}? Show me.",
        "What is {a}? Please draw one too.",
        "Tell me about {a} and draw it.",
        "Explain what {a} is, with a picture.",
        "Can you explain {a} and show a picture?",
        "I want to know what {a} is. Draw it for me.",
        "Describe {a} and add an image.",
        "Teach me about {a}, with a drawing.",
        "What do you know about {a}? Show it too.",
        "Show me {a} and tell me about it.",
        "Draw {a} and say what it is.",
        "My child asks what {a} is. Can you show and explain?",
        "What does {a} look like, and what is it?",
        "Give me a short explanation of {a} with an image.",
        "Who or what is {a}? A picture would help.",
    ),
    "draw": (
        "Draw {a} in the {style} style.",
        "Show me {a} in the {style} style.",
        "Please draw {a} in the {style} style.",
        "Can you draw {a} in the {style} style?",
        "Make a {style} drawing of {a}.",
        "I need a {style} picture of {a}.",
        "A {style} drawing of {a}, please.",
        "Give me {a}, {style} style.",
        "Draw {a}.",
        "Show me {a}.",
        "Please draw {a}.",
        "Can you draw {a} for me?",
        "A picture of {a}, please.",
        "I would like to see {a}.",
    ),
    "two-images": (
        "Draw {a} in the {style} style and in the {other} style.",
        "Show me {a} in two styles: {style} and {other}.",
        "Draw {a} twice, first {style}, then {other}.",
        "I want {a} in the {style} style, and then in the {other} style.",
        "Make two pictures of {a}: one {style}, one {other}.",
        "Can you show {a} in {style} and {other} style?",
        "How does {a} look in the {style} and the {other} style?",
        "Show {a} in {style} style, then {other} style.",
        "Please draw {a} both in the {style} and in the {other} style.",
        "What is {a}? Draw it in the {style} style and the {other} style.",
        "Give me a {style} and a {other} drawing of {a}.",
        "Explain {a} with a {style} and a {other} picture.",
    ),
    "what-is-this": (
        "What is this?",
        "What is this? Please tell me.",
        "What do you see here?",
        "What is in this picture?",
        "Can you tell me what this is?",
        "Name this and explain it.",
        "What does this image show?",
        "What is shown here?",
        "Please explain this picture.",
        "I found this picture. What is it?",
        "Do you know what this is?",
        "Tell me about this image.",
    ),
    "compare": (
        "What is the difference between {a} and {b}? Show both.",
        "Compare {a} and {b} with pictures.",
        "Show me {a} and {b} and explain each.",
        "Draw {a} and then {b}, and tell me about both.",
        "I mix up {a} and {b}. Can you show me both?",
        "How is {a} different from {b}? Draw them.",
        "Explain {a} and {b}, with a picture of each.",
        "What is {a} and what is {b}? Show both.",
        "Tell me about {a} and {b}, with drawings.",
        "First draw {a}, then {b}, and explain them.",
        "Please show {a} next to {b} and say what they are.",
        "Describe {a} and {b}. Add a picture of each.",
    ),
    "flag": (
        "What is the capital of {country}? Show its flag.",
        "Show me the flag of {country} and tell me its capital.",
        "Draw the flag of {country} and say where the country is.",
        "Where is {country}? Show the flag too.",
        "How many people live in {country}? Draw its flag.",
        "Tell me some facts about {country} and show its flag.",
        "What does the flag of {country} look like? And what is the capital?",
        "Give me facts about {country} with the flag.",
        "I am learning about {country}. Show the flag and some facts.",
        "Which city is the capital of {country}? Add the flag.",
        "Please draw the flag of {country} and name the capital.",
        "In which part of the world is {country}? Show its flag.",
    ),
    "which-flag": (
        "Which flag is this?",
        "Which country has this flag?",
        "Whose flag is this?",
        "What flag is shown here?",
        "Can you name this flag and the capital?",
        "What is this flag?",
        "Which country is this? Where is it?",
        "Tell me about the country with this flag.",
        "Do you know this flag?",
        "This is a flag. Of which country?",
        "Name the country of this flag.",
        "What country does this flag belong to?",
    ),
    "again": (
        "Now in the {style} style.",
        "And in the {style} style?",
        "Draw it again in the {style} style.",
        "Can you also draw it in the {style} style?",
        "Nice. Now show it in the {style} style.",
        "Please draw it in the {style} style too.",
        "Thanks! And a {style} one?",
        "One more, in the {style} style.",
        "Show me the same thing in {style} style.",
        "What about the {style} style?",
        "Make a {style} version.",
        "I would also like a {style} drawing of it.",
    ),
    "more": (
        "Tell me more about it.",
        "What is it?",
        "And what is it?",
        "Can you explain what it is?",
        "Thanks! Now tell me about it.",
        "What should I know about it?",
        "Please explain it.",
        "Nice picture. What is it?",
        "Explain it in a sentence.",
        "What do you know about it?",
        "Say something about it.",
        "Now describe it in words.",
    ),
}

UNSEEN: dict[str, tuple[str, ...]] = {
    "explain": (
        "Could you show me {a} and give a short description?",
        "I have never seen {a}. What is it, and how does it look?",
        "Write about {a} and illustrate it.",
        "How would you explain {a}? Use an image.",
    ),
    "draw": (
        "Could I see {a} in the {style} style?",
        "Paint {a} in {style} style for me.",
        "I want a drawing of {a}.",
        "Let me see {a}.",
    ),
    "two-images": (
        "Could you paint {a} once in {style} and once in {other} style?",
        "I would like two drawings of {a}, a {style} one and a {other} one.",
        "Let me see {a} in both {style} and {other} style.",
    ),
    "what-is-this": (
        "Could you say what I am looking at?",
        "Describe this image for me.",
        "Any idea what this picture shows?",
    ),
    "compare": (
        "Could you draw both {a} and {b} and describe them?",
        "Let me see {a} and {b}. What are they?",
        "I want to learn about {a} and {b}, with images.",
    ),
    "flag": (
        "Could you name the capital of {country} and show me its flag?",
        "I want to see the flag of {country} and learn where it is.",
        "Let me see the flag of {country}, with a fact or two.",
    ),
    "which-flag": (
        "Could you say which country uses this flag?",
        "I saw this flag. Where is it from?",
        "Any idea whose flag I am looking at?",
    ),
    "again": (
        "Could I have it in {style} style as well?",
        "Let me see that in the {style} style.",
        "Repeat it, but in {style} style.",
    ),
    "more": (
        "Could you describe it a little?",
        "Let me know what it is.",
        "Interesting. What is that, exactly?",
    ),
}

# How replies speak; the same in every split.
HERE = "Here is {a} in the {style} style."
ALSO = "And here is {a} in the {style} style."
STYLE_NOTE = "This drawing is in the {style} style."
THIS = "This is {a}."


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that take no article, or another one; everything else is countable and singular.
PLURAL = words(
    """
    blueberries cherries grapes beans glasses sunglasses goggles gloves socks shorts jeans briefs scissors
    chopsticks skis fireworks maracas bubbles lungs eyes footprints chains bookmark-tabs hot-springs
    ballet-shoes hundred-points peanuts sweat-droplets musical-notes books houses prayer-beads
    admission-tickets control-knobs antenna-bars sparkles customs japanese-dolls nesting-dolls pancakes
    french-fries film-frames paw-prints shopping-bags pinched-fingers busts-in-silhouette clapping-hands
    folded-hands open-hands raising-hands heart-hands palms-up-together two-hearts revolving-hearts
    crossed-fingers crossed-flags crossed-swords linked-paperclips clinking-glasses clinking-beer-mugs
    card-index-dividers flower-playing-cards clockwise-vertical-arrows input-latin-letters input-numbers
    input-symbols input-latin-lowercase input-latin-uppercase
    """
)
MASS = words(
    """
    bacon bread butter garlic ice milk rice salt tofu yarn thread luggage spaghetti custard sushi cooking
    falafel broccoli wood fog fire wind camping bowling badminton tennis lacrosse cricket-game field-hockey
    ice-hockey american-football rugby-football horse-racing performing-arts baggage-claim left-luggage
    potable-water non-potable-water infinity copyright information dna popcorn cooked-rice curry-rice
    shaved-ice soft-ice-cream ice-cream baguette-bread flatbread canned-food currency-exchange
    passport-control building-construction breast-feeding construction leafy-green mate oden sake ginger-root
    coral nail-polish soap money-with-wings pouring-liquid ping-pong bubble-tea meat-on-bone candy
    """
)
PROPER = words(
    """
    aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus
    mount-fuji santa-claus mrs.-claus mx-claus tokyo-tower om
    """
)
UNIQUE = words(
    """
    statue-of-liberty milky-way kaaba sun sun-with-face star-of-david
    """
)
SIGNS = words(
    """
    locked unlocked locked-with-key locked-with-pen dizzy dashing-away foggy prohibited warning biohazard
    radioactive plus minus multiply divide registered wireless high-voltage children-crossing no-entry
    no-littering no-smoking no-bicycles no-mobile-phones no-pedestrians no-one-under-eighteen
    """
)
FACES = {"star-struck": "a star-struck face", "rolling on the floor laughing": "a face rolling on the floor laughing"}
AGREES = {"is": "are", "does": "do"}
AN = frozenset(("SOS button", "NG button", "UP! button"))
THE_COUNTRIES = frozenset(
    (
        *("Bahamas", "Comoros", "Gambia", "Maldives", "Netherlands", "Philippines", "Seychelles", "Isle of Man"),
        *("Central African Republic", "Dominican Republic", "Czech Republic", "British Indian Ocean Territory"),
        *("European Union", "United Arab Emirates", "United Kingdom", "United Nations", "United States"),
    )
)


def country_name(label: str) -> str:
    """The country of a flag label, with "the" where English wants it.

    >>> country_name("flag: Bahamas"), country_name("flag: Antigua & Barbuda")
    ('the Bahamas', 'Antigua and Barbuda')
    """
    name = label.removeprefix("flag: ").replace("&", "and").replace("\u2019", "'")
    return f"the {name}" if name in THE_COUNTRIES or re.search(r"(Islands|Territories)$", name) else name


def is_plural(label: str) -> bool:
    return label.lower().replace(" ", "-") in PLURAL


def phrase(label: str) -> str:
    """The label as it is said in a sentence.

    >>> phrase("red apple"), phrase("eight o\u2019clock"), phrase("flag: France"), phrase("man: red hair")
    ('a red apple', "a clock showing eight o'clock", 'the flag of France', 'a man with red hair')
    """
    name = label.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    if name.startswith("flag: "):
        return f"the flag of {country_name(label)}"
    if name.startswith("keycap: "):
        return f"a keycap with {name[8:]}"
    if name.endswith("o'clock") or re.fullmatch(r"[a-z]+-thirty", name):
        return f"a clock showing {name}"
    person = re.fullmatch(r"(man|woman|person): (.*)", name)
    if person:
        who, what = person.groups()
        return {"bald": f"a bald {who}", "beard": f"a {who} with a beard"}.get(what, f"a {who} with {what}")
    name = re.sub(r": (facing right)$", r" \1", name)
    if ": " in name:
        head, members = name.split(": ", 1)
        name = f"{head} ({members})"
    key = name.lower().replace(" ", "-")
    if key in PROPER:
        return name.replace("mount fuji", "Mount Fuji")
    if key in UNIQUE:
        return "the " + name.replace("milky way", "Milky Way").replace("kaaba", "Kaaba").replace("star of", "Star of")
    if key in SIGNS:
        return f'the sign "{name}"'
    if key in PLURAL or key in MASS or re.match(r"(men|women|people) ", name):
        return name
    if name in FACES:
        return FACES[name]
    vowel = re.match(r"[aeioAEIO]|u(?!ni|se)|[FHLMNRSX]\b(?!-R)|x-ray|hour", name)
    return f"{'an' if name in AN or (vowel and not re.match(r'euro|one|ewe', name)) else 'a'} {name}"


def say(template: str, *labels: str, **fields: str) -> str:
    """The wording with its labels filled in, "is" and "does" made to agree with plurals.

    >>> say("What is {a}?", "cherries"), say(HERE, "red apple", style="flat")
    ('What are cherries?', 'Here is a red apple in the flat style.')
    """
    said = [phrase(label) for label in labels]
    text = template.format(**dict(zip("ab", said, strict=False)), **fields)
    for label, name in zip(labels, said, strict=True):
        if is_plural(label) or re.match(r"(men|women|people) ", name):
            text = re.sub(rf"\bThis is {re.escape(name)}", f"These are {name}", text)
            text = re.sub(rf"\b(is|does) {re.escape(name)}", lambda m: m[0].replace(m[1], AGREES[m[1]], 1), text)
            text = re.sub(rf"\b{re.escape(name)} is\b", f"{name} are", text)
    return text
