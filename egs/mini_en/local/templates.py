"""Sentences for speech synthesis written by small grammars: numbers, dates, names, commands, questions.

They are the everyday language that 19th-century prose lacks. Everything is spelled out in words, so what is
spoken and what is the transcript are the same. All sentences and word lists (conf/lexicon.txt) are our own.
"""

import random
from pathlib import Path


def read_lexicon(path: Path) -> dict[str, list[str]]:
    """The word lists of a file of paragraphs: `name:` and then entries between semicolons."""
    lists = {}
    for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        name, _, entries = block.partition(":")
        lists[name.strip()] = [" ".join(entry.split()) for entry in entries.split(";")]
    return lists


LEXICON = read_lexicon(Path(__file__).parents[1] / "conf" / "lexicon.txt")
ONES = LEXICON["ones"]
TENS = LEXICON["tens"]
ORDINALS = LEXICON["ordinals"]
DAYS = LEXICON["days"]
MONTHS = LEXICON["months"]
FIRST = LEXICON["first"]
LAST = LEXICON["last"]
CITIES = LEXICON["cities"]
ROOMS = LEXICON["rooms"]
DEVICES = LEXICON["devices"]
THINGS = LEXICON["things"]
ADJECTIVES = LEXICON["adjectives"]
PEOPLE = LEXICON["people"]
PAST = LEXICON["past"]
WHEN = LEXICON["when"]
WEATHER = LEXICON["weather"]
DISHES = LEXICON["dishes"]
COFFEE = LEXICON["coffee"]
SIZES = LEXICON["sizes"]
ROASTS = LEXICON["roasts"]
SHOTS = LEXICON["shots"]
EXTRAS = LEXICON["extras"]
SONGS = LEXICON["songs"]
PHONE_TYPES = LEXICON["phone_types"]
LETTERS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]


def cardinal(number: int) -> str:
    """0 <= number < 10**9 in words (American style, no "and")."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f" {ONES[ones]}" if ones else "")
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            head, rest = divmod(number, size)
            return f"{cardinal(head)} {name}" + (f" {cardinal(rest)}" if rest else "")
    raise AssertionError(number)


def ordinal(number: int) -> str:
    """1 <= number < 100 in words ("twenty third")."""
    if number <= 20:
        return ORDINALS[number - 1]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]} {ORDINALS[ones - 1]}" if ones else TENS[tens][:-1] + "ieth"


def year(rng: random.Random) -> str:
    """A year from 1600 to 2099 as it is read out."""
    one = rng.choice
    century, rest = one([16, 17, 18, 19, 19, 19, 20, 20]), rng.randrange(100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" {ONES[rest]}" if rest else "")
    head = cardinal(century)
    return f"{head} hundred" if rest == 0 else f"{head} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def clock(rng: random.Random) -> str:
    """A time of day as it is said."""
    one = rng.choice
    hour, minute = (
        rng.randrange(1, 13),
        one([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, rng.randrange(60)]),
    )
    if minute == 0:
        return f"{ONES[hour]} o'clock"
    pick = rng.randrange(3)
    if pick == 0 and minute in (15, 30):
        return f"{'half' if minute == 30 else 'a quarter'} past {ONES[hour]}"
    return f"{ONES[hour]} {'oh ' if minute < 10 else ''}{cardinal(minute)}" + one(["", " a m", " p m"])


def digits(rng: random.Random, count: int) -> str:
    """`count` single digits."""
    one = rng.choice
    words = [*ONES[:10], *ONES[1:10], "oh"]
    return " ".join(one(words) for _ in range(count))


def numbers(rng: random.Random) -> str:
    """One sentence about numbers, money, dates or times; never empty."""
    one = rng.choice
    number = cardinal(rng.randrange(10 ** rng.randrange(1, 7)))
    small = rng.randrange(2, 100)
    return one(
        [
            lambda: digits(rng, rng.randrange(1, 11)),
            lambda: number,
            lambda: (
                f"{number} {one(['dollars', 'people', 'miles', 'kilometres', 'years', 'pounds', 'books'])}"
            ),
            lambda: f"My number is {digits(rng, 7)}",
            lambda: f"The code is {digits(rng, 4)}",
            lambda: f"It costs {cardinal(small)} dollars and {cardinal(rng.randrange(5, 100))} cents",
            lambda: f"{one(MONTHS)} {ordinal(rng.randrange(1, 32))}",
            lambda: f"The {ordinal(rng.randrange(1, 32))} of {one(MONTHS)} {year(rng)}",
            lambda: f"On {one(DAYS)}, {one(MONTHS)} {ordinal(rng.randrange(1, 32))}, at {clock(rng)}",
            lambda: f"He was born in {year(rng)}",
            lambda: f"The train leaves at {clock(rng)}",
            lambda: f"Chapter {cardinal(small)}, page {cardinal(rng.randrange(1, 600))}",
            lambda: f"{cardinal(small)} percent of the {one(['people', 'money', 'work', 'time', 'votes'])}",
            lambda: f"{cardinal(small)} point {digits(rng, rng.randrange(1, 4))}",
            lambda: f"Flight {one(LETTERS)} {one(LETTERS)} {digits(rng, 3)} to {one(CITIES)}",
            lambda: f"{cardinal(small)} {one(['plus', 'minus', 'times'])} {cardinal(rng.randrange(1, 20))}",
            lambda: " ".join(one(LETTERS) for _ in range(rng.randrange(2, 6))),
        ]
    )()


def commands(rng: random.Random) -> str:
    """One spoken command to a device, a phone menu or a coffee counter."""
    one = rng.choice
    person, room, device = f"{one(FIRST)} {one(LAST)}", one(ROOMS), one(DEVICES)
    drink = f"{one(SIZES)} {one(['', one(ROASTS) + ' roast '])}{one(COFFEE)}"
    shots = f"{one(SHOTS)} shot"
    return one(
        [
            lambda: f"Turn {one(['on', 'off'])} the {device} in the {room}",
            lambda: f"Please {one(['open', 'close', 'lock', 'check'])} the {room} {one(['door', 'window'])}",
            lambda: f"Set the {room} to {cardinal(rng.randrange(55, 90))} degrees",
            lambda: f"Set {one(['a timer', 'an alarm'])} for {clock(rng)}",
            lambda: f"Set a timer for {cardinal(rng.randrange(2, 60))} minutes",
            lambda: f"Call {person} {one(['', 'at ' + one(PHONE_TYPES)])}",
            lambda: f"Send a message to {person}, I will be there at {clock(rng)}",
            lambda: f"Play {one(SONGS)}{one(['', ' in the ' + room])}",
            lambda: (
                f"{one(['Stop', 'Pause', 'Play', 'Next', 'Louder', 'Quieter', 'Cancel', 'Help'])}, please"
            ),
            lambda: f"Remind me to {one(['buy', 'sell', 'clean', 'fix'])} the {one(THINGS)} on {one(DAYS)}",
            lambda: f"Can I get a {drink} {one(EXTRAS)}",
            lambda: f"I would like a {shots} {drink}, {one(EXTRAS)}, please",
            lambda: f"{one(['Make', 'Get', 'Bring', 'Prepare'])} me a {drink} {one(EXTRAS)}",
            lambda: f"I'll have a {shots} {one(COFFEE)}",
            lambda: (
                f"Press {cardinal(rng.randrange(10))} for {one(['sales', 'service', 'help', 'messages'])}"
            ),
            lambda: (
                f"Please enter your {one(['number', 'code', 'extension'])}, then press the "
                f"{one(['pound', 'star'])} key"
            ),
            lambda: (
                f"Go {one(['forward', 'back', 'left', 'right', 'up', 'down'])} "
                f"{cardinal(rng.randrange(1, 30))} {one(['meters', 'steps', 'feet', 'inches'])}"
            ),
            lambda: (
                f"The person at extension {digits(rng, 4)} "
                f"is {one(['busy', 'not available', 'on the phone'])}"
            ),
        ]
    )()


def talk(rng: random.Random) -> str:
    """One everyday statement or question."""
    one = rng.choice
    who, thing, adjective = one(PEOPLE), one(THINGS), one(ADJECTIVES)
    name, city = one(FIRST), one(CITIES)
    return one(
        [
            lambda: f"{who.capitalize()} {one(PAST)} the {adjective} {thing} {one(WHEN)}.",
            lambda: f"{one(WHEN).capitalize()}, {who} {one(PAST)} a {one(ADJECTIVES)} {thing}.",
            lambda: f"Where is the {adjective} {thing}?",
            lambda: f"How {one(['far', 'much', 'old', 'big'])} is the {thing} in {city}?",
            lambda: (
                f"What will the weather be like in {city} {one(['today', 'tomorrow', 'on ' + one(DAYS)])}?"
            ),
            lambda: f"There will be {one(WEATHER)} and {one(WEATHER)} in {city}.",
            lambda: f"Do you like {one(DISHES)}?",
            lambda: f"I had {one(DISHES)} and {one(DISHES)} for {one(['breakfast', 'lunch', 'dinner'])}.",
            lambda: f"My name is {name} {one(LAST)}, and I live in {city}.",
            lambda: f"{name} and {one(FIRST)} are going to {city} on {one(DAYS)}.",
            lambda: f"Did {who} tell you about the {thing}?",
            lambda: f"Why don't we meet at the {thing} at {clock(rng)}?",
            lambda: f"I can't find my {adjective} {thing}, have you seen it?",
            lambda: f"She said that {who} {one(PAST)} it {one(WHEN)}.",
            lambda: f"{name} thinks the {thing} is too {adjective}.",
            lambda: (
                f"We don't know whether {who} will come {one(['today', 'tomorrow', 'next week', 'at all'])}."
            ),
            lambda: f"It isn't {adjective}, it's {one(ADJECTIVES)}.",
            lambda: f"Mister {one(LAST)} and Doctor {one(LAST)} {one(PAST)} the {thing}.",
            lambda: f"You're {one(['right', 'wrong', 'late', 'early', 'welcome', 'very kind'])}, {name}.",
            lambda: (
                f"{one(['Good morning', 'Good evening', 'Hello', 'Goodbye', 'Thank you', 'Excuse me'])}, "
                f"{one(['sir', 'madam', name, 'everybody', 'Mister ' + one(LAST)])}."
            ),
        ]
    )()


def sentences(count: int, seed: int) -> list[str]:
    """`count` different sentences: 30 % numbers, 30 % commands, 40 % talk; the same for the same seed."""
    rng = random.Random(seed)
    out: dict[str, None] = {}
    while len(out) < count:
        kind = rng.choices([numbers, commands, talk], [3, 3, 4])[0]
        out.setdefault(" ".join(kind(rng).split()), None)
    return list(out)
