"""Sentences for speech synthesis written by small grammars: numbers, dates, names, commands, questions.

They are the everyday language that 19th-century prose lacks. Everything is spelled out in words, so what is
spoken and what is the transcript are the same. All sentences and word lists here are this project's own.
"""

import random

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FIRST = (
    "James Mary John Patricia Robert Jennifer Michael Linda William Elizabeth David Barbara Richard Susan Joseph "
    "Jessica Thomas Sarah Charles Karen Daniel Nancy Matthew Lisa Anthony Betty Mark Margaret Paul Sandra Steven "
    "Ashley Andrew Kimberly Kenneth Emily Joshua Donna Kevin Michelle Brian Carol George Amanda Edward Melissa Ronald "
    "Deborah Timothy Stephanie Jason Rebecca Jeffrey Laura Ryan Helen Jacob Amy Gary Anna Nicholas Rose Eric Emma Peter "
    "Grace Frank Alice Henry Olivia Simon Lucy Oscar Ruth Victor Julia Martin Claire Leo Sophie Adam Hannah Tom Kate Sam "
    "Maria Ahmed Priya Wei Chen Carlos Elena Ivan Fatima Hiroshi Yuki Omar Leila"
).split()
LAST = (
    "Smith Johnson Williams Brown Jones Miller Davis Wilson Anderson Taylor Thomas Moore Jackson Martin Lee Thompson "
    "White Harris Clark Lewis Robinson Walker Young Allen King Wright Scott Hill Green Adams Baker Nelson Carter Mitchell "
    "Roberts Turner Phillips Campbell Parker Evans Edwards Collins Stewart Morris Rogers Reed Cook Morgan Bell Murphy "
    "Bailey Cooper Richardson Cox Howard Ward Peterson Gray Watson Brooks Kelly Sanders Price Bennett Wood Barnes Ross "
    "Henderson Coleman Jenkins Perry Powell Long Patterson Hughes Flores Washington Butler Simmons Foster Bryant"
).split()
CITIES = (
    "London;Paris;New York;Chicago;Boston;Berlin;Madrid;Rome;Toronto;Sydney;Tokyo;Beijing;Shanghai;Singapore;Dublin;"
    "Edinburgh;San Francisco;Los Angeles;Seattle;Denver;Houston;Atlanta;Miami;Vienna;Prague;Amsterdam;Oslo;Stockholm;"
    "Moscow;Cairo;Lagos;Nairobi;Delhi;Mumbai;Bangkok;Lisbon;Zurich;Montreal;Vancouver;Melbourne"
).split(";")
ROOMS = (
    "kitchen;living room;bedroom;bathroom;hall;garage;garden;office;dining room;basement;attic;study;guest room;"
    "front porch;laundry room"
).split(";")
DEVICES = (
    "light;lights;lamp;fan;heater;television;radio;air conditioner;music;speaker;alarm;camera;oven;coffee machine;"
    "washing machine;dishwasher;vacuum cleaner;thermostat;computer;printer"
).split(";")
THINGS = (
    "book;letter;newspaper;table;chair;window;door;key;phone;bag;coat;hat;shirt;pair of shoes;umbrella;ticket;passport;map;"
    "picture;clock;watch;ring;box;bottle;cup of tea;glass of water;plate;knife;sandwich;cake;apple;orange;loaf of bread;"
    "bicycle;car;bus;train;boat;plane;horse;dog;cat;bird;fish;tree;flower;stone;river;bridge;house;school;hospital;"
    "station;airport;hotel;restaurant;library;museum;church;market;bank;shop;theatre;park;beach;mountain;island"
).split(";")
ADJECTIVES = (
    "old new big small red blue green black white brown yellow heavy light cheap expensive clean dirty quiet noisy "
    "beautiful strange broken empty full warm cold wet dry soft hard long short narrow wide round famous simple"
).split()
PEOPLE = (
    "my brother;my sister;my mother;my father;our neighbour;the teacher;the doctor;the driver;his friend;her husband;"
    "the old man;the young woman;a student;the manager;the engineer;their daughter;the boy;the girl;the captain;"
    "my uncle;her aunt;the nurse;the lawyer;the farmer;the children;the workers;some people;everybody"
).split(";")
PAST = (
    "found;lost;bought;sold;saw;painted;carried;broke;fixed;dropped;opened;forgot;remembered;wanted;needed;described;"
    "asked for;looked for;thought about;talked about;pointed at;took away;brought back;gave away"
).split(";")
WHEN = (
    "yesterday;last night;this morning;last week;two days ago;a year ago;in the afternoon;before breakfast;after lunch;"
    "at midnight;on the way home;in the winter;during the holidays;early in the spring;as usual;for the first time"
).split(";")
WEATHER = (
    "rain;snow;wind;sun;fog;thunder;heavy rain;light snow;clear skies;cloudy weather;a storm;hail;sunshine;frost"
).split(";")
DISHES = (
    "pizza;soup;salad;fried rice;noodles;chicken;fish and chips;a cheese sandwich;pancakes;ice cream;chocolate cake;roast beef;"
    "vegetable curry;scrambled eggs;an apple pie;grilled salmon;mashed potatoes;a bowl of cereal;hot chocolate;orange juice"
).split(";")
COFFEE = "espresso;latte;mocha;cappuccino;americano;iced coffee;flat white;regular coffee".split(";")
SIZES = "small medium large".split()
ROASTS = "light medium dark".split()
SHOTS = "single;double;triple".split(";")
EXTRAS = (
    "with milk;with a little milk;with no milk;with soy milk;with almond milk;with cream;with sugar;with brown sugar;"
    "with two sugars;with one sugar;with honey;without sugar;with sweetener;with a lot of sugar"
).split(";")
SONGS = "jazz;classical music;rock music;some piano music;the news;the weather report;my favourite song;an audio book".split(";")
PHONE_TYPES = "work;home;mobile;office".split(";")
LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()


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
    century, rest = rng.choice([16, 17, 18, 19, 19, 19, 20, 20]), rng.randrange(100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" {ONES[rest]}" if rest else "")
    head = cardinal(century)
    return f"{head} hundred" if rest == 0 else f"{head} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def clock(rng: random.Random) -> str:
    hour, minute = rng.randrange(1, 13), rng.choice([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, rng.randrange(60)])
    if minute == 0:
        return f"{ONES[hour]} o'clock"
    pick = rng.randrange(3)
    if pick == 0 and minute in (15, 30):
        return f"{'half' if minute == 30 else 'a quarter'} past {ONES[hour]}"
    return f"{ONES[hour]} {'oh ' if minute < 10 else ''}{cardinal(minute)}" + rng.choice(["", " a m", " p m"])


def digits(rng: random.Random, count: int) -> str:
    words = [*ONES[:10], *ONES[1:10], "oh"]
    return " ".join(rng.choice(words) for _ in range(count))


def numbers(rng: random.Random) -> str:
    """One sentence about numbers, money, dates or times; never empty."""
    number = cardinal(rng.randrange(10 ** rng.randrange(1, 7)))
    small = rng.randrange(2, 100)
    return rng.choice(
        [
            lambda: digits(rng, rng.randrange(1, 11)),
            lambda: number,
            lambda: f"{number} {rng.choice(['dollars', 'people', 'miles', 'kilometres', 'years', 'pounds', 'books'])}",
            lambda: f"My number is {digits(rng, 7)}",
            lambda: f"The code is {digits(rng, 4)}",
            lambda: f"It costs {cardinal(small)} dollars and {cardinal(rng.randrange(5, 100))} cents",
            lambda: f"{rng.choice(MONTHS)} {ordinal(rng.randrange(1, 32))}",
            lambda: f"The {ordinal(rng.randrange(1, 32))} of {rng.choice(MONTHS)} {year(rng)}",
            lambda: f"On {rng.choice(DAYS)}, {rng.choice(MONTHS)} {ordinal(rng.randrange(1, 32))}, at {clock(rng)}",
            lambda: f"He was born in {year(rng)}",
            lambda: f"The train leaves at {clock(rng)}",
            lambda: f"Chapter {cardinal(small)}, page {cardinal(rng.randrange(1, 600))}",
            lambda: f"{cardinal(small)} percent of the {rng.choice(['people', 'money', 'work', 'time', 'votes'])}",
            lambda: f"{cardinal(small)} point {digits(rng, rng.randrange(1, 4))}",
            lambda: f"Flight {rng.choice(LETTERS)} {rng.choice(LETTERS)} {digits(rng, 3)} to {rng.choice(CITIES)}",
            lambda: f"{cardinal(small)} {rng.choice(['plus', 'minus', 'times'])} {cardinal(rng.randrange(1, 20))}",
            lambda: " ".join(rng.choice(LETTERS) for _ in range(rng.randrange(2, 6))),
        ]
    )()


def commands(rng: random.Random) -> str:
    """One spoken command to a device, a phone menu or a coffee counter."""
    person, room, device = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(ROOMS), rng.choice(DEVICES)
    drink = f"{rng.choice(SIZES)} {rng.choice(['', rng.choice(ROASTS) + ' roast '])}{rng.choice(COFFEE)}"
    shots = f"{rng.choice(SHOTS)} shot"
    return rng.choice(
        [
            lambda: f"Turn {rng.choice(['on', 'off'])} the {device} in the {room}",
            lambda: f"Please {rng.choice(['open', 'close', 'lock', 'check'])} the {room} {rng.choice(['door', 'window'])}",
            lambda: f"Set the {room} to {cardinal(rng.randrange(55, 90))} degrees",
            lambda: f"Set {rng.choice(['a timer', 'an alarm'])} for {clock(rng)}",
            lambda: f"Set a timer for {cardinal(rng.randrange(2, 60))} minutes",
            lambda: f"Call {person} {rng.choice(['', 'at ' + rng.choice(PHONE_TYPES)])}",
            lambda: f"Send a message to {person}, I will be there at {clock(rng)}",
            lambda: f"Play {rng.choice(SONGS)}{rng.choice(['', ' in the ' + room])}",
            lambda: f"{rng.choice(['Stop', 'Pause', 'Play', 'Next', 'Louder', 'Quieter', 'Cancel', 'Help'])}, please",
            lambda: f"Remind me to {rng.choice(['buy', 'sell', 'clean', 'fix'])} the {rng.choice(THINGS)} on {rng.choice(DAYS)}",
            lambda: f"Can I get a {drink} {rng.choice(EXTRAS)}",
            lambda: f"I would like a {shots} {drink}, {rng.choice(EXTRAS)}, please",
            lambda: f"{rng.choice(['Make', 'Get', 'Bring', 'Prepare'])} me a {drink} {rng.choice(EXTRAS)}",
            lambda: f"I'll have a {shots} {rng.choice(COFFEE)}",
            lambda: f"Press {cardinal(rng.randrange(10))} for {rng.choice(['sales', 'service', 'help', 'messages'])}",
            lambda: f"Please enter your {rng.choice(['number', 'code', 'extension'])}, then press the "
            f"{rng.choice(['pound', 'star'])} key",
            lambda: f"Go {rng.choice(['forward', 'back', 'left', 'right', 'up', 'down'])} {cardinal(rng.randrange(1, 30))} "
            f"{rng.choice(['meters', 'steps', 'feet', 'inches'])}",
            lambda: f"The person at extension {digits(rng, 4)} is {rng.choice(['busy', 'not available', 'on the phone'])}",
        ]
    )()


def talk(rng: random.Random) -> str:
    """One everyday statement or question."""
    who, thing, adjective = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(ADJECTIVES)
    name, city = rng.choice(FIRST), rng.choice(CITIES)
    return rng.choice(
        [
            lambda: f"{who.capitalize()} {rng.choice(PAST)} the {adjective} {thing} {rng.choice(WHEN)}.",
            lambda: f"{rng.choice(WHEN).capitalize()}, {who} {rng.choice(PAST)} a {rng.choice(ADJECTIVES)} {thing}.",
            lambda: f"Where is the {adjective} {thing}?",
            lambda: f"How {rng.choice(['far', 'much', 'old', 'big'])} is the {thing} in {city}?",
            lambda: f"What will the weather be like in {city} {rng.choice(['today', 'tomorrow', 'on ' + rng.choice(DAYS)])}?",
            lambda: f"There will be {rng.choice(WEATHER)} and {rng.choice(WEATHER)} in {city}.",
            lambda: f"Do you like {rng.choice(DISHES)}?",
            lambda: f"I had {rng.choice(DISHES)} and {rng.choice(DISHES)} for {rng.choice(['breakfast', 'lunch', 'dinner'])}.",
            lambda: f"My name is {name} {rng.choice(LAST)}, and I live in {city}.",
            lambda: f"{name} and {rng.choice(FIRST)} are going to {city} on {rng.choice(DAYS)}.",
            lambda: f"Did {who} tell you about the {thing}?",
            lambda: f"Why don't we meet at the {thing} at {clock(rng)}?",
            lambda: f"I can't find my {adjective} {thing}, have you seen it?",
            lambda: f"She said that {who} {rng.choice(PAST)} it {rng.choice(WHEN)}.",
            lambda: f"{name} thinks the {thing} is too {adjective}.",
            lambda: f"We don't know whether {who} will come {rng.choice(['today', 'tomorrow', 'next week', 'at all'])}.",
            lambda: f"It isn't {adjective}, it's {rng.choice(ADJECTIVES)}.",
            lambda: f"Mister {rng.choice(LAST)} and Doctor {rng.choice(LAST)} {rng.choice(PAST)} the {thing}.",
            lambda: f"You're {rng.choice(['right', 'wrong', 'late', 'early', 'welcome', 'very kind'])}, {name}.",
            lambda: f"{rng.choice(['Good morning', 'Good evening', 'Hello', 'Goodbye', 'Thank you', 'Excuse me'])}, "
            f"{rng.choice(['sir', 'madam', name, 'everybody', 'Mister ' + rng.choice(LAST)])}.",
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
