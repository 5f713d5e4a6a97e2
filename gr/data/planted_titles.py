"""Titles of the planted catalogue: words that tell the topic and the subtopic, and words that tell nothing but the item apart."""

import numpy as np
from numpy.typing import NDArray

# One row per topic: its name, and the words of which one stands beside it in each of its titles. No word is in two rows.
TOPICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Camping", ("Tent", "Lantern", "Hammock")),
    ("Coffee", ("Espresso", "Grinder", "Percolator")),
    ("Nails", ("Lacquer", "Manicure", "Cuticle")),
    ("Hair", ("Shampoo", "Conditioner", "Hairbrush")),
    ("Skin", ("Moisturizer", "Serum", "Toner")),
    ("Fragrance", ("Perfume", "Cologne", "Incense")),
    ("Baking", ("Cake", "Cookie", "Dough")),
    ("Garden", ("Seed", "Trowel", "Planter")),
    ("Cycling", ("Bicycle", "Pedal", "Saddle")),
    ("Fishing", ("Lure", "Tackle", "Reel")),
    ("Yoga", ("Asana", "Pilates", "Meditation")),
    ("Running", ("Marathon", "Jogging", "Sprint")),
    ("Photography", ("Camera", "Tripod", "Lens")),
    ("Audio", ("Headphone", "Speaker", "Turntable")),
    ("Gaming", ("Joystick", "Console", "Arcade")),
    ("Puzzles", ("Jigsaw", "Riddle", "Maze")),
    ("Painting", ("Watercolor", "Easel", "Canvas")),
    ("Knitting", ("Yarn", "Crochet", "Needle")),
    ("Woodwork", ("Chisel", "Sander", "Router")),
    ("Plumbing", ("Faucet", "Drain", "Valve")),
    ("Lighting", ("Chandelier", "Sconce", "Bulb")),
    ("Bedding", ("Pillow", "Duvet", "Mattress")),
    ("Dogs", ("Puppy", "Leash", "Kennel")),
    ("Cats", ("Kitten", "Litter", "Catnip")),
    ("Aquarium", ("Fishbowl", "Coral", "Goldfish")),
    ("Baby", ("Stroller", "Diaper", "Pacifier")),
    ("Office", ("Stapler", "Notebook", "Envelope")),
    ("School", ("Backpack", "Eraser", "Crayon")),
    ("Music", ("Guitar", "Ukulele", "Drum")),
    ("Dance", ("Ballet", "Tango", "Leotard")),
    ("Swimming", ("Goggle", "Snorkel", "Swimsuit")),
    ("Skiing", ("Ski", "Snowboard", "Mitten")),
    ("Tennis", ("Racket", "Wimbledon", "Badminton")),
    ("Golf", ("Caddie", "Putter", "Fairway")),
    ("Soccer", ("Goalpost", "Goalkeeper", "Cleat")),
    ("Climbing", ("Carabiner", "Harness", "Crampon")),
    ("Tea", ("Teapot", "Matcha", "Chai")),
    ("Wine", ("Corkscrew", "Decanter", "Winery")),
    ("Grilling", ("Barbecue", "Smoker", "Charcoal")),
    ("Cookware", ("Skillet", "Saucepan", "Wok")),
    ("Cleaning", ("Mop", "Detergent", "Sponge")),
    ("Storage", ("Basket", "Hanger", "Shelf")),
    ("Travel", ("Suitcase", "Passport", "Luggage")),
    ("Watches", ("Wristwatch", "Chronograph", "Stopwatch")),
    ("Jewelry", ("Necklace", "Bracelet", "Earring")),
    ("Automotive", ("Dashboard", "Windshield", "Tire")),
    ("Astronomy", ("Telescope", "Planetarium", "Eyepiece")),
    ("Robotics", ("Robot", "Servo", "Drone")),
)
SUBTOPICS = ("Starter", "Travel-Size", "Refill", "Deluxe", "Repair", "Cleaner", "Organizer", "Gift", "Spare", "Upgrade")
FORMS = ("Kit", "Set", "Pack", "Box")
BRANDS = (
    *("Alvera", "Brimco", "Cadwell", "Dorvan", "Elmira", "Fenwick", "Galora", "Harlow", "Ivanti", "Jorvik", "Kestrel", "Lumora"),
    *(
        "Marlowe",
        "Nordby",
        "Oakhurst",
        "Pellana",
        "Quintel",
        "Rosmar",
        "Solvane",
        "Tavira",
        "Umbra",
        "Velmont",
        "Wexley",
        "Zorana",
    ),
)
SHADES = (
    *("Amber", "Azure", "Beige", "Black", "Bronze", "Coral-Red", "Crimson", "Emerald", "Golden", "Gray", "Indigo", "Ivory"),
    *("Jade", "Lavender", "Maroon", "Navy", "Olive", "Orchid", "Peach", "Ruby", "Scarlet", "Silver", "Turquoise", "White"),
)
MAX_TOPICS, MAX_SUBTOPICS = len(TOPICS), len(SUBTOPICS)
# How many titles a (topic, subtopic) cell has; a catalogue fills at most half of them, so that drawing a fresh title stays quick.
TITLES_PER_CELL = 3 * len(BRANDS) * len(FORMS) * len(SHADES)


def compose_titles(
    topic: NDArray[np.integer], subtopic: NDArray[np.integer], rng: np.random.Generator
) -> list[tuple[str, tuple[str, ...]]]:
    """A unique title and the attributes (brand, topic, subtopic) of each item.

    ``topic``, ``subtopic``: (items,) class numbers. All other words are drawn without regard to any class, so whatever else an
    item belongs to cannot be read from its title. Example: "Kestrel Camping Lantern Refill Kit Amber".
    """
    taken: set[str] = set()
    titles: list[tuple[str, tuple[str, ...]]] = []
    for t, s in zip(topic.tolist(), subtopic.tolist(), strict=True):
        name, nouns = TOPICS[t]
        while True:
            brand, noun, form, shade = (words[rng.integers(len(words))] for words in (BRANDS, nouns, FORMS, SHADES))
            title = f"{brand} {name} {noun} {SUBTOPICS[s]} {form} {shade}"
            if title not in taken:
                break
        taken.add(title)
        titles.append((title, (brand, name, SUBTOPICS[s])))
    return titles
