"""General knowledge as a table: relations, each with facts that are true and have one answer.

A fact is `subject: answer`, or `subject: (answer, other right answers ...)`. Every relation shows one fact of its own
in front of the question, so that the form of the answer is no riddle; that fact is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Answer = str | tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        name: in the ids of tasks.
        stem: what the answer follows; `{}` stands for the subject.
        question: for yes or no; `{0}` stands for the subject, `{1}` for an answer.
        shown: the fact in front of the question.
        facts: what is asked.
        wrong: wrong answers by subject, where those of the other facts would be too easy to tell, or not wrong.
    """

    name: str
    stem: str
    question: str
    shown: tuple[str, str]
    facts: dict[str, Answer]
    wrong: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _pairs(text: str) -> dict[str, Answer]:
    """`a: b, c: d` -> a dict; `a: b | c` for more than one right answer."""
    found: dict[str, Answer] = {}
    for part in text.replace("\n", " ").split(","):
        subject, _, answer = part.partition(":")
        answers = tuple(a.strip() for a in answer.split("|"))
        found[subject.strip()] = answers if len(answers) > 1 else answers[0]
    return found


def _with_wrong(text: str) -> tuple[dict[str, Answer], dict[str, tuple[str, ...]]]:
    """`subject: answer wrong wrong wrong` -> the facts and their wrong answers."""
    facts: dict[str, Answer] = {}
    wrong: dict[str, tuple[str, ...]] = {}
    for part in text.replace("\n", " ").split(","):
        subject, _, words = part.partition(":")
        answer, *others = words.split()
        facts[subject.strip()], wrong[subject.strip()] = answer, tuple(others)
    return facts, wrong


_PLURALS, _WRONG_PLURALS = _with_wrong("""
    foot: feet foots feets footes, tooth: teeth tooths teeths toothes, man: men mans mens manes,
    woman: women womans womens womanes, goose: geese gooses geeses goosen, child: children childs childrens childes,
    leaf: leaves leafs leafes leave, wolf: wolves wolfs wolfes wolve, knife: knives knifes knifs knive,
    city: cities citys cityes citis, box: boxes boxs boxies boxen, baby: babies babys babyes babis,
    potato: potatoes potatos potates potatae, church: churches churchs churchies churchen,
    ox: oxen oxes oxs oxies, wife: wives wifes wifs wive
""")
_PASTS, _WRONG_PASTS = _with_wrong("""
    go: went goed gone goes, eat: ate eated eaten eats, see: saw seed seen sees, take: took taked taken takes,
    give: gave gived given gives, write: wrote writed written writes, buy: bought buyed buying buys,
    teach: taught teached teaching teaches, think: thought thinked thinking thinks, begin: began beginned begun begins,
    break: broke breaked broken breaks, know: knew knowed known knows, fly: flew flied flown flies,
    bring: brought bringed bringing brings, drive: drove drived driven drives, fall: fell falled fallen falls
""")
_SUMS, _WRONG_SUMS = _with_wrong("""
    1 + 1: 2 1 3 4, 2 + 2: 4 2 3 5, 3 + 4: 7 6 8 9, 5 + 5: 10 9 11 15, 6 + 3: 9 8 10 12, 7 + 5: 12 11 13 14,
    8 + 8: 16 15 17 18, 9 + 4: 13 12 14 15, 10 + 7: 17 16 18 19, 20 + 30: 50 40 60 55, 4 + 2: 6 5 7 8,
    15 + 5: 20 18 21 25, 11 + 3: 14 13 15 16, 9 + 9: 18 17 19 20
""")

RELATIONS = (
    Relation(
        "capital",
        "The capital of {} is",
        "Is {1} the capital of {0}?",
        ("Germany", "Berlin"),
        _pairs("""
            France: Paris, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens, Austria: Vienna,
            Poland: Warsaw, Hungary: Budapest, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki,
            Denmark: Copenhagen, Ireland: Dublin, Russia: Moscow, Japan: Tokyo, Egypt: Cairo, Kenya: Nairobi,
            Cuba: Havana, Peru: Lima, Canada: Ottawa, Iraq: Baghdad, Iran: Tehran, Thailand: Bangkok, Vietnam: Hanoi
        """),
    ),
    Relation(
        "symbol",
        "The chemical symbol for {} is",
        "Is {1} the chemical symbol for {0}?",
        ("iron", "Fe"),
        _pairs("""
            hydrogen: H, oxygen: O, carbon: C, nitrogen: N, helium: He, sodium: Na, potassium: K, calcium: Ca,
            silver: Ag, gold: Au, copper: Cu, zinc: Zn, lead: Pb, tin: Sn, mercury: Hg, chlorine: Cl
        """),
    ),
    Relation(
        "young",
        "A young {} is called a",
        "Is a young {0} called a {1}?",
        ("dog", "puppy"),
        _pairs("""
            cat: kitten, cow: calf, sheep: lamb, horse: foal | colt | filly, pig: piglet, goat: kid, duck: duckling,
            goose: gosling, swan: cygnet, frog: tadpole, bear: cub, kangaroo: joey, deer: fawn
        """),
        {"deer": ("cub", "gosling", "puppy")},  # those of some kinds of deer are called kids, or calves
    ),
    Relation(
        "animals",
        "The {} belongs to the group of animals called",
        "Does the {0} belong to the group of animals called {1}?",
        ("tiger", "mammals"),
        _pairs("""
            eagle: birds, penguin: birds, sparrow: birds, owl: birds, elephant: mammals, rabbit: mammals,
            whale: mammals, salmon: fish, trout: fish, tuna: fish, snake: reptiles, lizard: reptiles,
            crocodile: reptiles, ant: insects, beetle: insects, butterfly: insects, frog: amphibians
        """),
    ),
    Relation(
        "opposite",
        "The opposite of {} is",
        "Is {1} the opposite of {0}?",
        ("big", "small"),
        _pairs("""
            hot: cold, up: down, black: white, open: closed | shut | close, fast: slow, wet: dry, full: empty,
            happy: sad | unhappy, early: late, strong: weak, rich: poor, north: south, east: west, true: false,
            long: short, dirty: clean, first: last, dead: alive | living, thick: thin, day: night
        """),
    ),
    Relation(
        "plural",
        "The plural of {} is",
        "Is {1} the plural of {0}?",
        ("mouse", "mice"),
        _PLURALS,
        _WRONG_PLURALS,
    ),
    Relation(
        "past",
        "The past tense of {} is",
        "Is {1} the past tense of {0}?",
        ("sing", "sang"),
        _PASTS,
        _WRONG_PASTS,
    ),
    Relation(
        "color",
        "The color of {} is",
        "Is {1} the color of {0}?",
        ("a pumpkin", "orange"),
        _pairs("""
            a ripe banana: yellow, fresh grass: green, fresh snow: white, coal: black, blood: red,
            a clear sky at noon: blue, a ripe tomato: red, a carrot: orange, a lemon: yellow, an emerald: green,
            a ruby: red, milk: white, a chestnut: brown, a raven: black
        """),
    ),
    Relation(
        "month",
        "The month that comes after {} is",
        "Is {1} the month that comes after {0}?",
        ("January", "February"),
        _pairs("""
            February: March, March: April, April: May, May: June, June: July, July: August, August: September,
            September: October, October: November, November: December, December: January
        """),
    ),
    Relation(
        "day",
        "The day that comes after {} is",
        "Is {1} the day that comes after {0}?",
        ("Monday", "Tuesday"),
        _pairs("""
            Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, Saturday: Sunday,
            Sunday: Monday
        """),
    ),
    Relation(
        "sum",
        "{} =",
        "Is {0} equal to {1}?",
        ("2 + 3", "5"),
        _SUMS,
        _WRONG_SUMS,
    ),
    Relation(
        "language",
        "The main language of {} is",
        "Is {1} the main language of {0}?",
        ("Germany", "German"),
        _pairs("""
            France: French, Italy: Italian, Japan: Japanese, Russia: Russian, Poland: Polish, Turkey: Turkish,
            Greece: Greek, Egypt: Arabic, Mexico: Spanish, Australia: English, Hungary: Hungarian,
            Brazil: Portuguese, Sweden: Swedish, Vietnam: Vietnamese
        """),
    ),
    Relation(
        "continent",
        "The country of {} lies on the continent of",
        "Does the country of {0} lie on the continent of {1}?",
        ("Uganda", "Africa"),
        _pairs("""
            Kenya: Africa, Nigeria: Africa, Algeria: Africa, France: Europe, Poland: Europe, Italy: Europe,
            India: Asia, Thailand: Asia, Vietnam: Asia, China: Asia, Brazil: South America, Peru: South America,
            Argentina: South America, Canada: North America, Mexico: North America
        """),
    ),
    Relation(
        "job",
        "The word for a person who {} is",
        "Is {1} the word for a person who {0}?",
        ("teaches children in a school", "teacher"),
        _pairs("""
            bakes bread: baker, flies a plane: pilot, cuts hair: barber | hairdresser | hairstylist,
            repairs teeth: dentist, puts out fires: firefighter | fireman, grows crops: farmer,
            makes suits: tailor, works with wood: carpenter | woodworker, repairs water pipes: plumber,
            designs buildings: architect, sells meat: butcher, writes novels: novelist | author | writer,
            treats sick animals: vet | veterinarian
        """),
    ),
    Relation(
        "tool",
        "The tool used to {} is called a",
        "Is the tool used to {0} called a {1}?",
        ("drive nails", "hammer"),
        _pairs("""
            cut wood: saw, turn screws: screwdriver, dig a hole: shovel | spade, sweep the floor: broom,
            measure temperature: thermometer, look at distant stars: telescope,
            look at tiny cells: microscope, find north: compass, boil water for tea: kettle | teapot, open a lock: key
        """),
    ),
)
