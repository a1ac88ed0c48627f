"""Names and values of invented facts: names that nobody has, and values that nobody can guess."""

from collections.abc import Sequence
from random import Random

# fmt: off
MEN = (
    "Anselm", "Bertil", "Corvin", "Dorian", "Edvin", "Florian", "Gerrit", "Henrik", "Joris", "Kaspar", "Lorenz",
    "Marek", "Niklas", "Odran", "Pavel", "Quill", "Rasmus", "Tibor", "Ulric", "Wenzel",
)
WOMEN = (
    "Agneta", "Brisa", "Clementa", "Dorthe", "Elspeth", "Fenna", "Gisela", "Hedda", "Ilse", "Jorun", "Katrin",
    "Liesbet", "Mirel", "Nadia", "Oriel", "Petra", "Ragna", "Sunniva", "Tamsin", "Wilma",
)
ONSETS = (
    "B", "Br", "C", "Cl", "D", "Dr", "F", "Fl", "G", "Gr", "H", "J", "K", "Kr", "L", "M", "N", "P", "Pr", "R", "S",
    "Sk", "Sl", "St", "T", "Th", "Tr", "V", "W", "Y", "Z",
)
VOWELS = ("a", "a", "a", "e", "e", "e", "i", "i", "o", "o", "o", "u", "u", "ai", "au", "ea")  # as often as English
# Clusters and endings that seldom meet in English: what they make should be neither a word nor a famous name.
MIDDLES = (
    "dr", "dv", "ffr", "gn", "gr", "kl", "ld", "ldr", "lk", "lm", "lth", "lv", "ndr", "ng", "nv",
    "rb", "rdr", "rl", "rn", "rsk", "rth", "rv", "rz", "sk", "sp", "thr", "vr", "z",
)
ENDINGS = {
    "stem": (
        "ack", "ain", "ash", "astel", "awen", "eck", "eddin", "eld", "elow", "erac", "erin",
        "ido", "ilan", "iver", "oc", "olin", "omar", "orel", "ovan", "ulo", "ust",
    ),
    "surname": (
        "aker", "ander", "anwick", "arvo", "eby", "ekin", "ellis", "enfar", "ensk", "erdane", "eroy", "esson", "evar",
        "idge", "ikova", "imond", "inck", "oake", "oldt", "omber", "orro", "ovec", "umner", "yer",
    ),
    "place": (
        "abeck", "aby", "acombe", "adale", "afell", "agarth", "amere", "amouth", "anau", "arness", "astrand",
        "avik", "enholt", "ensund", "erfurd", "ermarch", "erwold", "inghythe", "olund", "oster", "otoft",
    ),
}

# What a name is filled with where it is not invented.
SLOTS = {
    "given": MEN + WOMEN,
    "building": ("dam", "bridge", "lighthouse", "tower", "pier", "viaduct"),
    "device": ("pump", "loom", "plough", "press", "kettle", "lathe", "mangle", "stove"),
    "prefix": ("Upper", "Lower", "Great", "Little", "Old", "New", "North", "South"),
    "subject": ("lantern", "chimney", "ladder", "ferry", "hedge", "doorbell", "firewood", "gutter"),
    "form": ("tincture", "syrup", "cordial", "tonic", "draught", "potion"),
    "rig": ("brig", "schooner", "ketch", "cutter", "barque", "sloop"),
    "word": ("Star", "Maid", "Venture", "Pride", "Hope", "Promise", "Fortune", "Wanderer"),
    "crop": ("onion", "barley", "turnip", "pumpkin", "cabbage", "radish", "chestnut", "gooseberry"),
}

POOLS = {
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "colour": (
        "scarlet", "turquoise", "violet", "mustard yellow", "olive green", "navy blue", "pale pink", "ochre",
        "maroon", "lilac", "crimson", "jet black", "snow white", "russet", "emerald", "silver grey", "sky blue",
        "bright orange", "ivory", "chocolate brown", "indigo", "rust red", "lime green", "peach",
    ),
    "work": (
        "grinding lenses", "mending clocks", "catching eels", "binding books", "making candles", "tuning pianos",
        "carving spoons", "weaving baskets", "engraving seals", "gilding frames", "repairing umbrellas",
        "boiling soap", "cutting cork", "stuffing mattresses", "sharpening knives", "painting signs",
        "blowing glass", "plucking poultry", "digging graves", "copying maps", "breaking horses", "splitting slate",
        "knotting nets", "sewing gloves",
    ),
    "instrument": (
        "bassoon", "mandolin", "accordion", "zither", "oboe", "cello", "harmonica", "trombone", "banjo", "tuba",
        "dulcimer", "clarinet", "flute", "bagpipes", "viola", "harp", "tambourine", "hurdy-gurdy", "cornet", "lute",
    ),
    "animals": (
        "goats", "peacocks", "hedgehogs", "donkeys", "ferrets", "tortoises", "geese", "turkeys", "llamas",
        "rabbits", "guinea pigs", "mules", "greyhounds", "cranes", "pigeons", "hamsters", "oxen", "swans",
        "piglets", "otters", "ponies", "alpacas", "quails", "poodles",
    ),
    "stone": (
        "grey granite", "red sandstone", "limestone", "basalt", "white marble", "oak beams", "slate",
        "larch timber", "dressed flint", "tuff", "gneiss", "green serpentine", "chalk blocks", "wrought iron",
        "travertine", "porphyry", "rammed earth", "quartzite", "pumice", "dolomite",
    ),
    "metal": (
        "brass", "pewter", "copper", "cast iron", "zinc", "bronze", "tin", "steel", "lead", "tinplate", "nickel",
        "silver", "gunmetal", "gilded iron", "sheet iron", "German silver",
    ),
    "grease": (
        "whale oil", "mutton fat", "beeswax", "linseed oil", "goose fat", "castor oil", "graphite", "butter",
        "lanolin", "olive oil", "bacon rind", "paraffin", "walnut oil", "tallow", "cod liver oil", "almond oil",
        "soft soap", "lard",
    ),
    "dish": (
        "pickled herring", "plum dumplings", "smoked eel", "lentil soup", "poppy seed cake", "stuffed cabbage",
        "blood sausage", "apple fritters", "roast pigeon", "rye pancakes", "mushroom pie", "fried carp",
        "quince jelly", "barley broth", "goat cheese", "potato bread", "braised oxtail", "walnut tart",
        "nettle soup", "rabbit stew", "ginger biscuits", "baked trout", "cherry pudding", "leek pasties",
    ),
    "trees": (
        "lindens", "chestnut trees", "plane trees", "mulberry trees", "cedars", "maples", "walnut trees", "birches",
        "elms", "cypresses", "poplars", "hornbeams", "rowans", "acacias", "yews", "pear trees", "magnolias",
        "beeches",
    ),
    "people": (
        "midwives", "bakers", "organists", "beekeepers", "shepherds", "widows", "schoolteachers", "fishermen",
        "students", "blacksmiths", "sextons", "brewers", "postmen", "veterans", "chimney sweeps", "butchers",
        "apothecaries", "twins", "millers", "musicians", "innkeepers", "left-handed people", "night watchmen",
        "carpenters",
    ),
    "plant": (
        "yarrow", "wormwood", "chamomile", "elderberries", "fennel", "burdock root", "juniper berries", "thyme",
        "sorrel", "valerian", "rose hips", "horseradish", "mugwort", "peppermint", "dandelion", "sage",
        "willow bark", "comfrey", "lavender", "marigold", "plantain", "hyssop", "borage", "lovage",
    ),
    "ailment": (
        "hiccups", "chilblains", "toothache", "gout", "sleeplessness", "warts", "hay fever", "cramp", "nosebleeds",
        "seasickness", "hoarseness", "lumbago", "freckles", "earache", "dizziness", "heartburn", "sunburn",
        "baldness", "stammering", "snoring", "whooping cough", "migraine", "jaundice", "nightmares",
    ),
    "drink": (
        "warm milk", "barley water", "red wine", "buttermilk", "cider", "black coffee", "mead", "apple juice",
        "brandy", "beef broth", "green tea", "dark beer", "lemonade", "whey", "plum juice", "hot chocolate",
        "ginger ale", "rum", "sherry", "carrot juice",
    ),
    "cargo": (
        "salt", "timber", "wool", "herring", "coal", "molasses", "roof tiles", "cotton", "tar", "potatoes",
        "marble", "guano", "rice", "oranges", "cement", "hemp", "saltpetre", "barrel staves", "bricks", "tea",
        "whale bone", "sugar", "gravel", "turpentine",
    ),
}

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def number_words(number: int) -> str:
    """A number below 100 as English writes it, such as ``thirty-one``."""
    tens, ones = divmod(number, 10)
    return ONES[number] if number < 20 else TENS[tens] + (f"-{ONES[ones]}" if ones else "")


class Names:
    """Draws invented names, each once."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def draw(self, kind: str) -> str:
        """A new name of one of the ``ENDINGS``."""
        while True:
            parts: Sequence[Sequence[str]] = (ONSETS, VOWELS, MIDDLES, ENDINGS[kind])
            name = "".join(self._rng.choice(part) for part in parts)
            if name not in self._used:
                self._used.add(name)
                return name


def draw_value(values: str, rng: Random, names: Names) -> tuple[str, ...]:
    """Draw a value of the kind that a relation's ``values`` name; returns its spellings, the one to write first.

    The kinds are ``year FIRST LAST``, ``count LOW HIGH`` (in words), ``amount LOW HIGH UNIT``, ``person``, ``place``,
    ``stem`` or the name of one of the ``POOLS``.
    """
    match values.split():
        case ["year", first, last]:
            return (str(rng.randint(int(first), int(last))),)
        case ["count", low, high]:
            number = rng.randint(int(low), int(high))
            return number_words(number), str(number)
        case ["amount", low, high, unit]:
            number = rng.randint(int(low), int(high))
            spellings = [f"{number:,} {unit}", f"{number:,}", str(number)]
            if number < 100:
                spellings += [f"{number_words(number)} {unit}", number_words(number)]
            return tuple(dict.fromkeys(spellings))
        case ["person"]:
            surname = names.draw("surname")
            return f"{rng.choice(SLOTS['given'])} {surname}", surname
        case ["place" | "stem" as kind]:
            return (names.draw(kind),)
        case [pool]:
            return (rng.choice(POOLS[pool]),)
    raise AssertionError(f"{values}: no such values")
