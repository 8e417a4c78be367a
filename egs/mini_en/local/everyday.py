"""More sentences by small grammars: dates, money, names and spelling, answers, questions, instructions.

Like templates.py (whose helpers it uses) everything is spelled out in words and all sentences are our own.
"""

import random

from templates import (
    ADJECTIVES,
    CITIES,
    DAYS,
    DEVICES,
    DISHES,
    FIRST,
    LAST,
    LETTERS,
    LEXICON,
    MONTHS,
    PAST,
    PEOPLE,
    ROOMS,
    THINGS,
    WEATHER,
    WHEN,
    cardinal,
    clock,
    digits,
    ordinal,
    year,
)

UNITS = LEXICON["units"]
FRACTIONS = LEXICON["fractions"]
STREETS = LEXICON["streets"]
ROADS = LEXICON["roads"]
DOING = LEXICON["doing"]
REASONS = LEXICON["reasons"]
JOBS = LEXICON["jobs"]
VERBS = LEXICON["verbs"]
APPS = LEXICON["apps"]
POLITENESS = LEXICON["politeness"]
CALLS = LEXICON["calls"]
YES = LEXICON["yes"]
NO = LEXICON["no"]
PLACES = LEXICON["places"]
OPENERS = LEXICON["openers"]
SKIPS = LEXICON["skips"]
SHORTEST = LEXICON["shortest"]
FILLERS = ["", "", "", "Well, ", "So, ", "Oh, ", "Okay, ", "Now, ", "Look, ", "Actually, ", "You know, "]


def money(rng: random.Random) -> str:
    """An amount of money as it is said."""
    one, big = rng.choice, cardinal(rng.randrange(1, 10 ** rng.randrange(1, 5)))
    cents = cardinal(rng.randrange(1, 100))
    return one(
        [
            f"{big} dollars",
            f"{big} dollars and {cents} cents",
            f"{cents} cents",
            f"{big} pounds",
            f"{big} euros",
            f"{one(['ten', 'fifty', 'two hundred', 'six'])} {one(['thousand', 'million'])} dollars",
        ]
    )


def date(rng: random.Random) -> str:
    """A date as it is said."""
    one, month, day = rng.choice, rng.choice(MONTHS), ordinal(rng.randrange(1, 32))
    return one(
        [
            f"{month} {day}",
            f"{month} the {day}",
            f"the {day} of {month}",
            f"{month} {day}, {year(rng)}",
            f"{one(DAYS)} the {day}",
            f"{one(DAYS)}, {month} {day}",
            f"{one(['early', 'late'])} {month} {year(rng)}",
        ]
    )


def figures(rng: random.Random) -> str:
    """A sentence about an amount, a date, a time, a measure, a place or a number."""
    one, number = rng.choice, cardinal(rng.randrange(2, 10 ** rng.randrange(1, 5)))
    name, unit = one(FIRST), one(UNITS)
    return one(
        [
            lambda: f"That will be {money(rng)}, please.",
            lambda: f"He paid {money(rng)} for the {one(THINGS)}.",
            lambda: f"The bill comes to {money(rng)}.",
            lambda: f"She was born on {date(rng)} in {one(CITIES)}.",
            lambda: f"The meeting is on {date(rng)} at {clock(rng)}.",
            lambda: f"We moved to {one(CITIES)} in {one(MONTHS)} {year(rng)}.",
            lambda: f"It is {clock(rng)}.",
            lambda: f"The {one(['train', 'bus', 'flight', 'boat'])} to {one(CITIES)} leaves at {clock(rng)}.",
            lambda: f"It takes {cardinal(rng.randrange(2, 90))} minutes to get to {one(CITIES)}.",
            lambda: f"It is about {number} {unit} from here.",
            lambda: f"I need {number} {unit} of it.",
            lambda: f"{one(FRACTIONS).capitalize()} of the {one(PLACES)} closed.",
            lambda: f"We live at {cardinal(rng.randrange(1, 2000))} {one(STREETS)} {one(ROADS)}.",
            lambda: f"Call {name} at {digits(rng, 3)}, {digits(rng, 3)}, {digits(rng, 4)}.",
            lambda: f"Room {cardinal(rng.randrange(900))} is on the {ordinal(rng.randrange(1, 30))} floor.",
            lambda: f"It will be {cardinal(rng.randrange(1, 40))} below zero on {one(DAYS)}.",
            lambda: f"{name} finished in the {ordinal(rng.randrange(1, 60))} place.",
            lambda: f"Version {cardinal(rng.randrange(1, 30))} point {cardinal(rng.randrange(1, 20))}.",
            lambda: f"In {year(rng)}, more than {number} people lived in {one(CITIES)}.",
            lambda: f"Add {one(FRACTIONS)} cup of {one(['sugar', 'flour', 'milk', 'water', 'rice', 'oil'])}.",
            lambda: f"From {date(rng)} to {date(rng)}.",
        ]
    )()


def names(rng: random.Random) -> str:
    """A sentence with names, or one that spells a word letter by letter."""
    one, first, last = rng.choice, rng.choice(FIRST), rng.choice(LAST)
    spelled = " ".join(one([first, last, one(CITIES).split()[0]]).upper())
    plate = " ".join(one(LETTERS) for _ in range(3))
    return one(
        [
            lambda: f"My name is {last}, that is {' '.join(last.upper())}.",
            lambda: f"It's spelled {spelled}.",
            lambda: spelled,
            lambda: f"How do you spell {one([first, last])}?",
            lambda: f"The license plate is {plate} {digits(rng, 3)}.",
            lambda: f"Flight {one(LETTERS)} {one(LETTERS)} {digits(rng, 4)} from {one(CITIES)} is delayed.",
            lambda: f"This is {first} {last} speaking.",
            lambda: f"May I speak to {one(['Mister', 'Missus', 'Miss', 'Doctor', 'Professor'])} {last}?",
            lambda: f"{first} {last} is {one(JOBS)} from {one(CITIES)}.",
            lambda: f"Captain {last} and his {one(['wife', 'son', 'brother'])} {first} came {one(WHEN)}.",
            lambda: f"Have you met {first}, {one(FIRST)} and {one(FIRST)}?",
            lambda: f"{first}'s {one(['mother', 'sister', 'uncle'])} {one(PAST)} the {one(THINGS)}.",
            lambda: f"{one(CITIES)}, {one(CITIES)}, and {one(CITIES)}.",
        ]
    )()


def answers(rng: random.Random) -> str:
    """A short answer, an exclamation or a polite phrase."""
    one, name = rng.choice, rng.choice(FIRST)
    return (
        one(FILLERS)
        + one(
            [
                lambda: one(SHORTEST),
                lambda: f"yes, {one(YES)}.",
                lambda: f"no, {one(NO)}.",
                lambda: f"I {one(['think', 'hope', 'suppose', 'guess', 'am afraid', 'believe'])} so.",
                lambda: f"I don't {one(['know', 'care', 'mind', 'remember', 'think so', 'understand'])}.",
                lambda: f"{one(POLITENESS)}, {name}.",
                lambda: f"{one(CALLS)}!",
                lambda: f"because {one(REASONS)}.",
                lambda: f"{one(['about', 'almost', 'exactly', 'only'])} {cardinal(rng.randrange(2, 100))}.",
                lambda: f"on {one(DAYS)} at {clock(rng)}.",
                lambda: f"in the {one(ROOMS)}, next to the {one(THINGS)}.",
                lambda: f"it was {one(ADJECTIVES)} and {one(ADJECTIVES)}.",
                lambda: (
                    f"let's {one(['go', 'eat', 'start', 'wait', 'try again', 'ask ' + name, 'go home'])}."
                ),
                lambda: f"I'm {one(DOING)}.",
                lambda: f"I'd rather {one(VERBS)} the {one(THINGS)}.",
            ]
        )()
    )


def questions(rng: random.Random) -> str:
    """A question."""
    one, who, thing, name = rng.choice, rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(FIRST)
    return one(
        [
            lambda: f"Who {one(PAST)} the {one(ADJECTIVES)} {thing}?",
            lambda: f"What did {who} say about the {thing}?",
            lambda: f"When are you going to {one(VERBS)} the {thing}?",
            lambda: f"Why didn't {who} {one(VERBS)} it?",
            lambda: f"Which {thing} is {one(ADJECTIVES)}, this one or that one?",
            lambda: f"Whose {thing} is this?",
            lambda: f"How many {one(['books', 'people', 'rooms', 'days', 'letters', 'windows'])} are there?",
            lambda: f"How long have you been {one(DOING)}?",
            lambda: f"Could you {one(VERBS)} the {thing} for me, {name}?",
            lambda: f"Would you like {one(DISHES)} or {one(DISHES)}?",
            lambda: f"Is it going to {one(['rain', 'snow', 'be hot', 'be cold'])} on {one(DAYS)}?",
            lambda: f"Are there any {one(PLACES)} near {one(CITIES)}?",
            lambda: f"Have you ever been to {one(CITIES)}?",
            lambda: f"What time does the {one(OPENERS)} open on {one(DAYS)}?",
            lambda: f"Where were you on {date(rng)}?",
            lambda: f"What is {cardinal(rng.randrange(1, 100))} times {cardinal(rng.randrange(2, 20))}?",
            lambda: f"Aren't you {name}, {one(JOBS)} from {one(CITIES)}?",
            lambda: f"Now that {who} {one(PAST)} the {thing}, is it still {one(ADJECTIVES)}?",
        ]
    )()


def instructions(rng: random.Random) -> str:
    """A request to a person or to a device."""
    one, room, device, thing = rng.choice, rng.choice(ROOMS), rng.choice(DEVICES), rng.choice(THINGS)
    percent = f"{cardinal(rng.randrange(1, 20) * 5)} percent"
    return one(
        [
            lambda: f"{one(['Switch', 'Turn'])} {one(['on', 'off'])} all the lights.",
            lambda: f"{one(['Dim', 'Set', 'Raise'])} the {room} light to {percent}.",
            lambda: f"Turn the {device} {one(['up', 'down'])} {one(['a little', 'a bit', 'to ' + percent])}.",
            lambda: f"Show me {one(APPS)}.",
            lambda: f"{one(['Open', 'Close', 'Start', 'Hide'])} {one(APPS)}.",
            lambda: f"Wake me up at {clock(rng)} on {one(DAYS)}.",
            lambda: f"Add {one(DISHES)} to the shopping list.",
            lambda: f"Read my {one(['first', 'second', 'last', 'next', 'newest'])} message.",
            lambda: f"Tell {one(FIRST)} that {one(REASONS)}.",
            lambda: f"Book a table for {cardinal(rng.randrange(2, 13))} at {clock(rng)}.",
            lambda: f"Navigate to {cardinal(rng.randrange(1, 900))} {one(STREETS)} {one(ROADS)}.",
            lambda: f"{one(VERBS).capitalize()} the {one(ADJECTIVES)} {thing}, then {one(VERBS)} it.",
            lambda: f"Don't {one(VERBS)} the {thing} before {one(DAYS)}.",
            lambda: f"Put the {thing} in the {room} and lock the door.",
            lambda: f"Skip {one(SKIPS)}.",
            lambda: f"What's the forecast, {one(WEATHER)} or {one(WEATHER)}?",
            lambda: f"Schedule {one(['a call', 'lunch', 'a meeting'])} with {one(FIRST)} on {date(rng)}.",
            lambda: f"Translate {one(ADJECTIVES)} into {one(['French', 'German', 'Spanish', 'Italian'])}.",
        ]
    )()


def sentences(count: int, seed: int) -> list[str]:
    """`count` different sentences of the five kinds; the same for the same seed."""
    rng = random.Random(f"everyday {seed}")
    out: dict[str, None] = {}
    while len(out) < count:
        kind = rng.choices([figures, names, answers, questions, instructions], [5, 3, 2, 4, 4])[0]
        sentence = " ".join(kind(rng).split())
        out.setdefault(sentence[0].upper() + sentence[1:], None)
    return list(out)
