"""Rules of thumb for English: plurals, articles, and whether a text mentions a word. No such rule is complete."""

import re
import unicodedata
from functools import cache, lru_cache

IRREGULAR = {  # plural: singular; words in -men and in -s follow rules
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "lice": "louse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "dice": "die",
    "cacti": "cactus",
    "octopi": "octopus",
    "fungi": "fungus",
}
SINGULAR_IN_S = frozenset("atlas bus canvas chaos christmas cosmos gas lens news rhinoceros thermos".split())
MASS = frozenset(  # nouns that a photo shows without an article
    """
    air anger architecture art asphalt ballet beer blood bread brutality butter cannabis chaos cheese chocolate
    clay clothing coal cocaine coffee concrete cotton cream cruelty dirt dust electricity erotica fire flour fog
    food fruit fur furniture glitter gold golf gore graffiti grass hair happiness harassment harm hate honey
    humiliation hunger ice jewellery jewelry juice justice lava leather lightning love luggage makeup marijuana
    meat metal milk money moss mud music nakedness nature news nudity oil paper pasta plastic porn pornography
    poverty racism rain rice rust sadness salt sand seaweed silk silver skin smoke snow steel suffering suicide
    sugar tea tennis theft tobacco traffic vandalism vegetation violence war water weather wine wood wool yoga
    """.split()
)
DETERMINERS = frozenset("a an the my your his her our their this that these those some many several no".split())
NUMBERS = frozenset("two three four five six seven eight nine ten".split())
PREPOSITIONS = frozenset("of in on with without at from by for under over near behind beside made".split())
LIKE_A_CONSONANT = re.compile(r"eu|ew|one\b|once|u(?!ni[nmd])ni|us[eu]|ut[ei]|urin|uku|uto")
SILENT_H = re.compile(r"hour|honest|hono|heir")


@lru_cache(4096)
def tokens(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case and without accents: "Salvador Dalí's" is salvador, dali, s."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    letters = [letter for letter in plain if not unicodedata.combining(letter)]
    return tuple(re.findall(r"\w+", "".join(letters)))


@cache
def forms(word: str) -> frozenset[str]:
    """Return a lower-case word and all that it may be the plural of: "wolves" may be of wolve, wolf or wolfe."""
    found = {word, IRREGULAR.get(word, word)}
    if word.endswith("men"):
        found.add(f"{word[:-3]}man")
    if word.endswith("s") and not word.endswith("ss") and word not in SINGULAR_IN_S:
        found.add(word[:-1])
    if re.search(r"(s|x|z|ch|sh|o)es$", word):
        found.add(word[:-2])
    if word.endswith("ies"):
        found.add(f"{word[:-3]}y")
    if word.endswith("ves"):
        found |= {f"{word[:-3]}f", f"{word[:-3]}fe"}
    return frozenset(found)


def mentions(text: str, *phrases: str) -> bool:
    """Return whether one of the phrases stands in a text, word for word, each in the singular or the plural."""
    words = tokens(text)
    for phrase in phrases:
        wanted = tokens(phrase)
        for i in range(len(words) - len(wanted) + 1):
            if wanted and _alike(words[i : i + len(wanted)], wanted):
                return True
    return False


def same(text: str, phrase: str) -> bool:
    """Return whether a text is this phrase and nothing else, whatever its case, accents and plurals."""
    words, wanted = tokens(text), tokens(phrase)
    return bool(wanted) and len(words) == len(wanted) and _alike(words, wanted)


def _alike(words: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return all(forms(word) & forms(other) for word, other in zip(words, wanted, strict=True))


def noun_phrase(noun: str) -> str:
    """Put "a" or "an" before a noun that takes one: no plural, no proper name, no mass noun, none with an article."""
    words = noun.lower().split()
    head = _head(words)
    counted = words[0] in DETERMINERS or words[0] in NUMBERS or words[0].isdigit()
    if noun[0].isupper() or counted or head in MASS or _plural(head):
        return noun
    return f"{'an' if _sounds_like_a_vowel(words[0]) else 'a'} {noun}"


def _head(words: list[str]) -> str:
    """Return the word that decides the article: "glass" of "glass of red wine", "wine" of "red wine"."""
    for i, word in enumerate(words):
        if i and word in PREPOSITIONS:
            return words[i - 1]
    return words[-1]


def _plural(word: str) -> bool:
    if word in IRREGULAR or word.endswith("men"):
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in SINGULAR_IN_S


def _sounds_like_a_vowel(word: str) -> bool:
    if SILENT_H.match(word):
        return True
    return word[0] in "aeiou" and not LIKE_A_CONSONANT.match(word)
