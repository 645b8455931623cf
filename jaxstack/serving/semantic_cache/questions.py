"""Made-up questions with known meanings: intents, each with a few wordings, and slots filled from lists.

Two questions ask the same if intent and slots are the same. The wordings of an intent share words with each other and
with other intents; questions of one intent with different slots differ in a word or two, and in their answers.
"""

import numpy as np
from jaxtyping import Int

# Slot -> what fills it.
_SLOTS: dict[str, tuple[str, ...]] = {
    "city": (
        "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Tbilisi", "Montreal", "Perth", "Dakar", "Turin", "Kyoto",
        "Riga", "Cusco", "Leeds", "Austin", "Bergen", "Cairo", "Denver", "Edinburgh", "Fes", "Graz", "Havana",
    ),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "this weekend", "next week"),
    "language": (
        "Python", "Rust", "Go", "Java", "Kotlin", "Swift", "Ruby", "Haskell", "Scala", "Julia", "Lua", "Perl",
    ),
    "task": (
        "sort a list", "reverse a string", "read a file", "parse JSON", "open a socket", "hash a password",
        "merge two dictionaries", "format a date", "start a thread", "remove duplicates", "round a number",
        "split a sentence", "write a unit test", "download a page", "compress a folder", "count words",
    ),
    "element": (
        "helium", "iron", "gold", "copper", "neon", "zinc", "carbon", "oxygen", "sodium", "lead", "silver", "nickel",
    ),
    "property": ("melting point", "boiling point", "atomic number", "atomic mass", "density", "symbol"),
    "dish": (
        "risotto", "ramen", "paella", "goulash", "pad thai", "lasagne", "hummus", "borscht", "ceviche", "pancakes",
        "shakshuka", "tiramisu", "falafel", "gazpacho", "pierogi", "biryani",
    ),
    "people": ("two", "three", "four", "six", "eight", "ten"),
    "product": (
        "kettle", "headphones", "backpack", "lamp", "keyboard", "toaster", "jacket", "monitor", "blender", "tent",
        "camera", "sofa", "printer", "bicycle", "watch", "drill",
    ),
    "problem": ("arrived broken", "is late", "is the wrong colour", "stopped working", "has a part missing"),
    "amount": ("10", "25", "40", "75", "100", "250", "500", "900"),
    "from": ("euros", "dollars", "pounds", "yen", "francs", "pesos", "rupees", "kroner"),
    "to": ("zloty", "forints", "rand", "lira", "reais", "won"),
    "word": (
        "gratitude", "window", "bridge", "autumn", "lightning", "kitchen", "freedom", "shadow", "harbour", "silence",
        "feather", "promise", "thunder", "orchard", "candle", "journey",
    ),
    "tongue": ("French", "Polish", "Swahili", "Korean", "Turkish", "Finnish", "Welsh", "Hindi"),
    "body": ("Mars", "Venus", "Jupiter", "Saturn", "Mercury", "Neptune", "Pluto", "Europa", "Titan", "the Moon"),
    "quantity": ("mass", "radius", "gravity", "surface temperature", "length of a day", "distance from the Sun"),
}  # fmt: skip

# Slots of an intent, and its wordings.
_INTENTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("city", "day"), (
        "What is the weather like in {city} {day}?", "How is the weather in {city} {day}?",
        "Will I need an umbrella in {city} {day}?", "Give me the forecast for {city} {day}.",
        "{city} weather {day}",
    )),
    (("language", "task"), (
        "How do I {task} in {language}?", "What is the best way to {task} in {language}?",
        "Show me how to {task} with {language}.", "{language}: {task}, example code",
        "I want to {task} using {language}, how can I do that?",
    )),
    (("element", "property"), (
        "What is the {property} of {element}?", "Tell me the {property} of {element}.",
        "{element} {property}", "Do you know the {property} of the element {element}?",
    )),
    (("dish", "people"), (
        "How do I make {dish} for {people} people?", "Give me a recipe for {dish} for {people}.",
        "I am cooking {dish} for {people} people, what do I need?", "{dish} recipe, serves {people}",
    )),
    (("product", "problem"), (
        "My {product} {problem}, what should I do?", "The {product} I ordered {problem}. Can I get a refund?",
        "I bought a {product} and it {problem}, please help.", "What can I do if my {product} {problem}?",
    )),
    (("amount", "from", "to"), (
        "How much is {amount} {from} in {to}?", "Convert {amount} {from} to {to}.",
        "What are {amount} {from} worth in {to}?", "{amount} {from} in {to}",
    )),
    (("word", "tongue"), (
        "How do you say {word} in {tongue}?", "Translate {word} into {tongue}.",
        "What is the {tongue} word for {word}?", "{word} in {tongue}",
    )),
    (("body", "quantity"), (
        "What is the {quantity} of {body}?", "Tell me the {quantity} of {body}.",
        "How large is the {quantity} of {body}?", "{body} {quantity}",
    )),
)  # fmt: skip
_OPENINGS = ("", "", "", "Hi, ", "Hello! ", "Please: ", "Quick question: ", "Hey, ", "Good morning. ")
_CLOSINGS = ("", "", "", " Thanks!", " Thank you.", " Keep it short.", " Please.")
# Zipf's, over the questions of an intent.
_EXPONENT = 0.9


def questions(count: int, rng: np.random.Generator) -> tuple[list[str], Int[np.ndarray, "count"]]:
    """Questions, no two spelled alike, and what each means: a number that stands for intent and slots."""
    sizes = [int(np.prod([len(_SLOTS[slot]) for slot in slots])) for slots, _ in _INTENTS]
    ranks = [rng.permutation(size) for size in sizes]
    shares = []
    for size in sizes:
        weights = np.arange(1, size + 1.0) ** -_EXPONENT
        shares.append(np.cumsum(weights / weights.sum()))
    offsets = np.cumsum([0, *sizes])
    texts: dict[str, int] = {}
    while len(texts) < count:
        intent = int(rng.integers(len(_INTENTS)))
        drawn = min(int(np.searchsorted(shares[intent], rng.random())), sizes[intent] - 1)
        meaning = int(ranks[intent][drawn])
        slots, wordings = _INTENTS[intent]
        filled, rest = {}, meaning
        for slot in slots:
            rest, place = divmod(rest, len(_SLOTS[slot]))
            filled[slot] = _SLOTS[slot][place]
        text = wordings[int(rng.integers(len(wordings)))].format(**filled)
        text = _OPENINGS[int(rng.integers(len(_OPENINGS)))] + text + _CLOSINGS[int(rng.integers(len(_CLOSINGS)))]
        texts.setdefault(text, int(offsets[intent]) + meaning)
    return list(texts), np.array(list(texts.values()))
