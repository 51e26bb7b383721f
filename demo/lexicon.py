"""The words of the demo corpus, and which of them go together.

Nouns and verbs are written as in a dictionary: article and plural of a noun, third person and
perfect of a verb. Frames say who may do what to whom, so that the sentences make some sense.
"""

from dataclasses import dataclass, replace
from typing import Any

from morphology import (
    BARE,
    HABEN,
    SEIN,
    THE,
    A,
    Adjective,
    Adverb,
    Case,
    Declension,
    Determiner,
    Modal,
    Noun,
    Preposition,
    Tense,
    Verb,
)

GENDERS = {"der": "m", "die": "f", "das": "n"}


# --- nouns ---------------------------------------------------------------------------------------


def read_nouns(kind: str, table: str) -> dict[str, Noun]:
    """Read lines "english [plural] | article german | plural [weak]"; no plural: a mass noun."""
    nouns = {}
    for line in table.strip().splitlines():
        english, german, plural, *_ = [*(part.strip() for part in line.split("|")), ""]
        singular, *irregular = english.split()
        article, german = german.split()
        german_plural, *weak = plural.split() or [""]
        nouns[singular] = Noun(
            english=singular,
            english_plural=irregular[0] if irregular else pluralize(singular),
            german=german,
            german_plural=german_plural,
            gender=GENDERS[article],
            kind=kind,
            weak=bool(weak),
            mass=not german_plural,
        )
    return nouns


def pluralize(word: str) -> str:
    """Add the regular English -s, of nouns and of verbs."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "o")) else "s")


PEOPLE = read_nouns(
    "person",
    """
    man men         | der Mann        | Männer
    woman women     | die Frau        | Frauen
    child children  | das Kind        | Kinder
    boy             | der Junge       | Jungen weak
    girl            | das Mädchen     | Mädchen
    teacher         | die Lehrerin    | Lehrerinnen
    doctor          | der Arzt        | Ärzte
    neighbour       | der Nachbar     | Nachbarn weak
    baker           | der Bäcker      | Bäcker
    student         | der Student     | Studenten weak
    grandmother     | die Großmutter  | Großmütter
    grandfather     | der Großvater   | Großväter
    friend          | der Freund      | Freunde
    king            | der König       | Könige
    queen           | die Königin     | Königinnen
    guest           | der Gast        | Gäste
    painter         | die Malerin     | Malerinnen
    farmer          | der Bauer       | Bauern weak
    sister          | die Schwester   | Schwestern
    brother         | der Bruder      | Brüder
    """,
)
ANIMALS = read_nouns(
    "animal",
    """
    dog         | der Hund   | Hunde
    cat         | die Katze  | Katzen
    horse       | das Pferd  | Pferde
    bird        | der Vogel  | Vögel
    mouse mice  | die Maus   | Mäuse
    bear        | der Bär    | Bären weak
    fox         | der Fuchs  | Füchse
    duck        | die Ente   | Enten
    """,
)
READING = read_nouns(
    "reading",
    """
    book       | das Buch        | Bücher
    letter     | der Brief       | Briefe
    newspaper  | die Zeitung     | Zeitungen
    poem       | das Gedicht     | Gedichte
    story      | die Geschichte  | Geschichten
    """,
)
FOOD = read_nouns(
    "food",
    """
    apple            | der Apfel      | Äpfel
    pear             | die Birne      | Birnen
    cake             | der Kuchen     | Kuchen
    egg              | das Ei         | Eier
    potato potatoes  | die Kartoffel  | Kartoffeln
    bread            | das Brot
    cheese           | der Käse
    soup             | die Suppe
    """,
)
DRINKS = read_nouns(
    "drink",
    """
    coffee  | der Kaffee
    tea     | der Tee
    milk    | die Milch
    water   | das Wasser
    """,
)
THINGS = read_nouns(
    "thing",
    """
    table     | der Tisch        | Tische
    chair     | der Stuhl        | Stühle
    lamp      | die Lampe        | Lampen
    key       | der Schlüssel    | Schlüssel
    coat      | der Mantel       | Mäntel
    hat       | der Hut          | Hüte
    bag       | die Tasche       | Taschen
    picture   | das Bild         | Bilder
    clock     | die Uhr          | Uhren
    umbrella  | der Regenschirm  | Regenschirme
    flower    | die Blume        | Blumen
    ball      | der Ball         | Bälle
    box       | die Kiste        | Kisten
    cup       | die Tasse        | Tassen
    """,
)
VEHICLES = read_nouns(
    "vehicle",
    """
    car      | das Auto     | Autos
    bicycle  | das Fahrrad  | Fahrräder
    boat     | das Boot     | Boote
    train    | der Zug      | Züge
    """,
)
PLACES = read_nouns(
    "place",
    """
    house     | das Haus      | Häuser
    garden    | der Garten    | Gärten
    town      | die Stadt     | Städte
    village   | das Dorf      | Dörfer
    school    | die Schule    | Schulen
    street    | die Straße    | Straßen
    kitchen   | die Küche     | Küchen
    room      | das Zimmer    | Zimmer
    forest    | der Wald      | Wälder
    park      | der Park      | Parks
    church    | die Kirche    | Kirchen
    castle    | das Schloss   | Schlösser
    station   | der Bahnhof   | Bahnhöfe
    market    | der Markt     | Märkte
    lake      | der See       | Seen
    river     | der Fluss     | Flüsse
    """,
)
LANDMARKS = read_nouns(
    "landmark",
    """
    bridge    | die Brücke   | Brücken
    mountain  | der Berg     | Berge
    tree      | der Baum     | Bäume
    door      | die Tür      | Türen
    window    | das Fenster  | Fenster
    wall      | die Wand     | Wände
    """,
)
NOUNS = PEOPLE | ANIMALS | READING | FOOD | DRINKS | THINGS | VEHICLES | PLACES | LANDMARKS
NAMES = (("Anna", "f"), ("Lena", "f"), ("Paul", "m"), ("Felix", "m"))


def nouns(words: str) -> tuple[Noun, ...]:
    """Look up English singulars."""
    return tuple(NOUNS[word] for word in words.split())


# --- adjectives and determiners ------------------------------------------------------------------


def read_adjectives(table: str) -> dict[str, Adjective]:
    """Read lines "english | german [stem] [| english comparative | german comparative]"."""
    adjectives = {}
    for line in table.strip().splitlines():
        english, german, *comparatives = (part.strip() for part in line.split("|"))
        german, *stem = german.split()
        adjectives[english] = Adjective(english, german, stem[0] if stem else german, *comparatives)
    return adjectives


ADJECTIVES = read_adjectives(
    """
    old        | alt            | older           | älter
    young      | jung           | younger         | jünger
    small      | klein          | smaller         | kleiner
    big        | groß           | bigger          | größer
    clever     | klug           | cleverer        | klüger
    brave      | mutig          | braver          | mutiger
    rich       | reich          | richer          | reicher
    famous     | berühmt        | more famous     | berühmter
    beautiful  | schön          | more beautiful  | schöner
    expensive  | teuer teur     | more expensive  | teurer
    cheap      | billig         | cheaper         | billiger
    heavy      | schwer         | heavier         | schwerer
    tired      | müde müd
    hungry     | hungrig
    lazy       | faul
    happy      | glücklich
    sad        | traurig
    friendly   | freundlich
    poor       | arm
    curious    | neugierig
    wild       | wild
    black      | schwarz
    white      | weiß
    red        | rot
    green      | grün
    blue       | blau
    new        | neu
    broken     | kaputt
    long       | lang
    short      | kurz
    boring     | langweilig
    funny      | lustig
    fresh      | frisch
    warm       | warm
    cold       | kalt
    quiet      | ruhig
    dark       | dunkel dunkl
    """
)


def adjectives(words: str) -> tuple[Adjective, ...]:
    """Look up English adjectives."""
    return tuple(ADJECTIVES[word] for word in words.split())


COLOURS = adjectives("black white red green blue")
FITTING = {
    "person": adjectives(
        "old young small big clever brave rich famous"
        " tired hungry lazy happy sad friendly poor curious"
    ),
    "animal": adjectives(
        "old young small big clever brave tired hungry lazy wild curious black white"
    ),
    "reading": adjectives("old new beautiful long short boring funny sad"),
    "food": adjectives("fresh warm cold cheap expensive"),
    "drink": adjectives("fresh warm cold"),
    "thing": adjectives("old new small big beautiful expensive cheap heavy broken") + COLOURS,
    "vehicle": adjectives("old new small big expensive cheap broken") + COLOURS,
    "place": adjectives("old small big beautiful dark quiet"),
    "landmark": adjectives("old small big beautiful"),
}
UNFITTING = {
    ADJECTIVES["old"]: nouns("child boy girl"),
    ADJECTIVES["young"]: nouns("grandmother grandfather"),
    ADJECTIVES["expensive"]: nouns("flower potato"),
    ADJECTIVES["broken"]: nouns("coat picture bag"),
}
# What they can be for a while; of things, what they always are.
STATES = FITTING | {
    "person": adjectives("tired hungry happy sad curious lazy brave friendly rich poor"),
    "animal": adjectives("tired hungry curious lazy wild brave"),
}
DEGREES = (("", ""), ("", ""), ("", ""), ("very", "sehr"), ("very", "sehr"), ("too", "zu"))
ABSOLUTE = COLOURS + adjectives("broken new fresh wild")
ONCE = adjectives("young small young poor rich")
WEATHER = adjectives("warm cold dark")

POSSESSIVES = tuple(
    Determiner(english, english, german, Declension.EIN)
    for english, german in (
        ("my", "mein"),
        ("your", "dein"),
        ("his", "sein"),
        ("her", "ihr"),
        ("our", "unser"),
        ("their", "ihr"),
    )
)
THIS = Determiner("this", "these", "dies", Declension.DER)
EVERY = Determiner("every", "", "jed", Declension.DER, "singular")
ALL = Determiner("", "all", "all", Declension.DER, "plural")
QUANTITIES = tuple(
    Determiner("", english, german, declension, "plural", definite=False)
    for english, german, declension in (
        ("many", "viel", Declension.PARALLEL),
        ("some", "einig", Declension.PARALLEL),
        ("two", "zwei", Declension.NONE),
        ("three", "drei", Declension.NONE),
    )
)
# Repeated ones are drawn more often. Who is asked about or denied something is known.
SUBJECT_DETERMINERS = (THE,) * 12 + POSSESSIVES + (THIS, THIS, A, A, EVERY, ALL, *QUANTITIES)
OBJECT_DETERMINERS = (THE,) * 8 + (A,) * 7 + POSSESSIVES + (THIS, THIS, BARE, BARE, *QUANTITIES)
KNOWN_DETERMINERS = (THE,) * 8 + (*POSSESSIVES, THIS, THIS)
DENIED_DETERMINERS = (THE,) * 4 + (*POSSESSIVES, THIS) + (A,) * 6 + (BARE,) * 4
RELATIVE_DETERMINERS = (THE,) * 6 + (A, A, THIS, EVERY, ALL)
PLACE_DETERMINERS = (THE,) * 9 + (A, A, THIS)
_OWNED = nouns(
    "child teacher doctor neighbour grandmother grandfather friend guest sister brother"
    " house garden room kitchen school village town castle door window"
)
_OWNED_KINDS = ("animal", "reading", "food", "thing", "vehicle")


def fitting(determiner: Determiner, noun: Noun) -> Determiner:
    """The determiner, or one that goes better with the noun: the station, not my station."""
    is_living = noun.kind in ("person", "animal")
    if determiner in POSSESSIVES:
        return determiner if noun.kind in _OWNED_KINDS or noun in _OWNED else THE
    if determiner in (EVERY, ALL):
        return determiner if is_living else THE
    if noun.mass:
        return determiner if determiner.number == "any" else BARE
    return THE if determiner is BARE and is_living else determiner


# --- prepositions and where they lead ------------------------------------------------------------

IN = Preposition("in", "in", Case.DATIVE)
INTO = Preposition("into", "in", Case.ACCUSATIVE)
IN_STREET = Preposition("in", "auf", Case.DATIVE)
AT = Preposition("at", "an", Case.DATIVE)
AT_MARKET = Preposition("at", "auf", Case.DATIVE)
TO = Preposition("to", "zu", Case.DATIVE)
ON = Preposition("on", "auf", Case.DATIVE)
ONTO = Preposition("onto", "auf", Case.ACCUSATIVE)
ON_WALL = Preposition("on", "an", Case.DATIVE)
ONTO_WALL = Preposition("on", "an", Case.ACCUSATIVE)
UNDER = Preposition("under", "unter", Case.DATIVE)
TO_UNDER = Preposition("under", "unter", Case.ACCUSATIVE)
BEHIND = Preposition("behind", "hinter", Case.DATIVE)
TO_BEHIND = Preposition("behind", "hinter", Case.ACCUSATIVE)
BEFORE = Preposition("in front of", "vor", Case.DATIVE)
BESIDE = Preposition("next to", "neben", Case.DATIVE)
TO_BESIDE = Preposition("next to", "neben", Case.ACCUSATIVE)
PUT_ON = Preposition("on", "auf", Case.ACCUSATIVE)
THROUGH = Preposition("through", "durch", Case.ACCUSATIVE)
AROUND = Preposition("around", "um", Case.ACCUSATIVE)
OUT_OF = Preposition("out of", "aus", Case.DATIVE)
FROM = Preposition("from", "von", Case.DATIVE)
WITH = Preposition("with", "mit", Case.DATIVE)
WITHOUT = Preposition("without", "ohne", Case.ACCUSATIVE)
FOR = Preposition("for", "für", Case.ACCUSATIVE)
WAIT_FOR = Preposition("for", "auf", Case.ACCUSATIVE)
THINK_OF = Preposition("of", "an", Case.ACCUSATIVE)
DREAM_OF = Preposition("of", "von", Case.DATIVE)
TALK_ABOUT = Preposition("about", "über", Case.ACCUSATIVE)
TALK_TO = Preposition("to", "mit", Case.DATIVE)

Setting = tuple[Preposition, tuple[Noun, ...]]

_ENCLOSED = nouns("house garden town village school kitchen room forest park church castle")
_BUILDINGS = nouns("house school church castle station")
_BESIDE_WATER = nouns("lake river station")
WHERE: tuple[Setting, ...] = (
    (IN, _ENCLOSED),
    (IN, _ENCLOSED),
    (IN, _ENCLOSED),
    (AT, _BESIDE_WATER),
    (AT_MARKET, nouns("market")),
    (ON, nouns("bridge mountain")),
    (IN_STREET, nouns("street")),
    (UNDER, nouns("tree bridge")),
    (BEHIND, _BUILDINGS),
    (BEFORE, _BUILDINGS),
    (BESIDE, nouns("door window tree station")),
)
HOMES: tuple[Setting, ...] = ((IN, nouns("house town village castle forest")),)
WATERS: tuple[Setting, ...] = ((IN, nouns("lake river")),)
WHITHER: tuple[Setting, ...] = (
    (INTO, _ENCLOSED),
    (INTO, _ENCLOSED),
    (TO, nouns("station market lake river school church")),
    (ONTO, nouns("bridge mountain street")),
    (THROUGH, nouns("garden town village forest park")),
    (AROUND, nouns("house lake castle church tree")),
    (OUT_OF, nouns("house school forest church castle kitchen room")),
    (FROM, nouns("station market lake river")),
)
DESTINATIONS = WHITHER[:3]
DRIVES: tuple[Setting, ...] = (
    (TO, nouns("station market lake river school church")),
    (THROUGH, nouns("town village forest park")),
)
WHENCE = WHITHER[6:]
ARRIVALS: tuple[Setting, ...] = (
    (AT, nouns("station lake river")),
    (IN, nouns("town village castle")),
)
COLLECTS_WHERE: tuple[Setting, ...] = ((AT, nouns("station")), (IN, nouns("school town")))
SHOPS: tuple[Setting, ...] = ((AT_MARKET, nouns("market")), (IN, nouns("town village")))
HANGS_WHERE: tuple[Setting, ...] = ((ON_WALL, nouns("wall")),)
HANG_WHERE: tuple[Setting, ...] = ((ONTO_WALL, nouns("wall")),)
LIES_WHERE: tuple[Setting, ...] = (
    (ON, nouns("table chair")),
    (UNDER, nouns("table chair")),
    (BESIDE, nouns("lamp box")),
    (IN, nouns("box bag kitchen room")),
)
PUT_WHERE: tuple[Setting, ...] = (
    (PUT_ON, nouns("table chair")),
    (TO_UNDER, nouns("table chair")),
    (TO_BESIDE, nouns("lamp box")),
    (INTO, nouns("box bag")),
)
STANDS_WHERE: tuple[Setting, ...] = (
    (ON, nouns("table box")),
    (BESIDE, nouns("door window")),
    (BEHIND, nouns("door")),
    (BEFORE, nouns("window house")),
    (IN, nouns("kitchen room")),
)
PLACE_WHERE: tuple[Setting, ...] = (
    (PUT_ON, nouns("table box")),
    (TO_BESIDE, nouns("door window")),
    (TO_BEHIND, nouns("door")),
)

# --- verbs ---------------------------------------------------------------------------------------


def read_verbs(table: str) -> dict[str, Verb]:
    """Read lines "english | past [ing] | german infinitive, third person, perfect | [marks]".

    The English entry is a verb, perhaps with an adverb (pick up) or a preposition that German does
    without (look (for)). Marks: dative (the case of its object), experiencer (its English
    subject is a German dative: mir gefällt), state (lasts), instant (over at once), fun (one may
    like to do it).
    """
    verbs = {}
    for line in table.strip().splitlines():
        english, english_past, german, marks = (part.strip() for part in line.split("|"))
        base, _, adverb = english.partition(" ")
        past, *irregular_ing = english_past.split()
        regular_ing = base.removesuffix("e") + "ing"
        infinitive, third, perfect = german.split(", ")
        third, _, prefix = third.partition(" ")
        auxiliary, participle = perfect.split()
        is_experienced = "experiencer" in marks
        object_case = Case.DATIVE if "dative" in marks else Case.ACCUSATIVE
        verbs[english.replace("(", "").replace(")", "")] = Verb(
            base=base,
            past=past,
            participle_ing=irregular_ing[0] if irregular_ing else regular_ing,
            third_s=pluralize(base),
            infinitive=infinitive.removeprefix(prefix),
            third=third,
            auxiliary=auxiliary,
            participle=participle,
            prefix=prefix,
            particle="" if adverb.startswith("(") else adverb,
            preposition=adverb.strip("()") if adverb.startswith("(") else "",
            subject_case=Case.DATIVE if is_experienced else Case.NOMINATIVE,
            object_case=Case.NOMINATIVE if is_experienced else object_case,
            is_state="state" in marks or is_experienced,
            is_instant="instant" in marks,
            is_fun="fun" in marks,
        )
    return verbs


VERBS = read_verbs(
    """
    sleep        | slept         | schlafen, schläft, hat geschlafen              | fun
    laugh        | laughed       | lachen, lacht, hat gelacht                     | fun
    work         | worked        | arbeiten, arbeitet, hat gearbeitet             | fun
    dance        | danced        | tanzen, tanzt, hat getanzt                     | fun
    sing         | sang          | singen, singt, hat gesungen                    | fun
    play         | played        | spielen, spielt, hat gespielt                  | fun
    swim         | swam swimming | schwimmen, schwimmt, ist geschwommen           | fun
    live         | lived         | wohnen, wohnt, hat gewohnt                     | state fun
    sit          | sat sitting   | sitzen, sitzt, hat gesessen                    | fun
    get up       | got getting   | aufstehen, steht auf, ist aufgestanden         |
    fall asleep  | fell          | einschlafen, schläft ein, ist eingeschlafen    |
    come back    | came          | zurückkommen, kommt zurück, ist zurückgekommen |
    arrive       | arrived       | ankommen, kommt an, ist angekommen             |
    leave        | left          | abfahren, fährt ab, ist abgefahren             |
    rain         | rained        | regnen, regnet, hat geregnet                   |
    snow         | snowed        | schneien, schneit, hat geschneit               |
    go           | went          | gehen, geht, ist gegangen                      | fun
    run          | ran running   | laufen, läuft, ist gelaufen                    | fun
    come         | came          | kommen, kommt, ist gekommen                    |
    drive        | drove         | fahren, fährt, ist gefahren                    | fun
    lie          | lay lying     | liegen, liegt, hat gelegen                     |
    stand        | stood         | stehen, steht, hat gestanden                   |
    hang         | hung          | hängen, hängt, hat gehangen                    |
    put          | put putting   | legen, legt, hat gelegt                        |
    place        | placed        | stellen, stellt, hat gestellt                  |
    see          | saw           | sehen, sieht, hat gesehen                      | instant
    read         | read          | lesen, liest, hat gelesen                      | fun
    write        | wrote         | schreiben, schreibt, hat geschrieben           | fun
    buy          | bought        | kaufen, kauft, hat gekauft                     |
    sell         | sold          | verkaufen, verkauft, hat verkauft              |
    eat          | ate           | essen, isst, hat gegessen                      | fun
    drink        | drank         | trinken, trinkt, hat getrunken                 | fun
    find         | found         | finden, findet, hat gefunden                   | instant
    look (for)   | looked        | suchen, sucht, hat gesucht                     |
    carry        | carried       | tragen, trägt, hat getragen                    |
    love         | loved         | lieben, liebt, hat geliebt                     | state
    paint        | painted       | malen, malt, hat gemalt                        | fun
    repair       | repaired      | reparieren, repariert, hat repariert           |
    visit        | visited       | besuchen, besucht, hat besucht                 |
    hear         | heard         | hören, hört, hat gehört                        | instant
    wash         | washed        | waschen, wäscht, hat gewaschen                 |
    call         | called        | anrufen, ruft an, hat angerufen                |
    invite       | invited       | einladen, lädt ein, hat eingeladen             |
    pick up      | picked        | abholen, holt ab, hat abgeholt                 |
    open         | opened        | aufmachen, macht auf, hat aufgemacht           |
    close        | closed        | zumachen, macht zu, hat zugemacht              |
    bring along  | brought       | mitbringen, bringt mit, hat mitgebracht        |
    take along   | took          | mitnehmen, nimmt mit, hat mitgenommen          |
    clean up     | cleaned       | aufräumen, räumt auf, hat aufgeräumt           |
    help         | helped        | helfen, hilft, hat geholfen                    | dative
    thank        | thanked       | danken, dankt, hat gedankt                     | dative
    trust        | trusted       | vertrauen, vertraut, hat vertraut              | dative state
    answer       | answered      | antworten, antwortet, hat geantwortet          | dative
    congratulate | congratulated | gratulieren, gratuliert, hat gratuliert        | dative
    listen (to)  | listened      | zuhören, hört zu, hat zugehört                 | dative
    follow       | followed      | folgen, folgt, ist gefolgt                     | dative
    belong (to)  | belonged      | gehören, gehört, hat gehört                    | dative state
    like         | liked         | gefallen, gefällt, hat gefallen                | experiencer
    wait         | waited        | warten, wartet, hat gewartet                   |
    think        | thought       | denken, denkt, hat gedacht                     | fun
    dream        | dreamt        | träumen, träumt, hat geträumt                  | fun
    speak        | spoke         | sprechen, spricht, hat gesprochen              | fun
    give         | gave          | geben, gibt, hat gegeben                       |
    show         | showed        | zeigen, zeigt, hat gezeigt                     |
    send         | sent          | schicken, schickt, hat geschickt               |
    bring        | brought       | bringen, bringt, hat gebracht                  |
    lend         | lent          | leihen, leiht, hat geliehen                    |
    tell         | told          | erzählen, erzählt, hat erzählt                 |
    say          | said          | sagen, sagt, hat gesagt                        | state
    hope         | hoped         | hoffen, hofft, hat gehofft                     | state
    believe      | believed      | glauben, glaubt, hat geglaubt                  | state
    ask          | asked         | fragen, fragt, hat gefragt                     | state
    try          | tried         | versuchen, versucht, hat versucht              |
    forget       | forgot        | vergessen, vergisst, hat vergessen             | state
    be           | was           | sein, ist, ist gewesen                         | state
    have         | had           | haben, hat, hat gehabt                         | state
    know         | knew          | wissen, weiß, hat gewusst                      | state
    """
)
SAY, HOPE, BELIEVE, ASK = (VERBS[key] for key in ("say", "hope", "believe", "ask"))
TRY, FORGET, RAIN, SNOW = (VERBS[key] for key in ("try", "forget", "rain", "snow"))
BE = replace(
    VERBS["be"],
    present_forms=SEIN,
    preterite_forms=("war", "warst", "war", "waren", "waren"),
)
HAVE = replace(
    VERBS["have"],
    third_s="has",
    present_forms=HABEN,
    preterite_forms=("hatte", "hattest", "hatte", "hatten", "hatten"),
)
KNOW = replace(
    VERBS["know"],
    present_forms=("weiß", "weißt", "weiß", "wissen", "wissen"),
    preterite_forms=("wusste", "wusstest", "wusste", "wussten", "wussten"),
)
DETERMINERS_OF = {
    VERBS["like"]: KNOWN_DETERMINERS,
    HAVE: (*((A,) * 6), BARE, BARE, *QUANTITIES),
}
# A picture hat gehangen, somebody hat es gehängt.
VERBS |= {"have": HAVE, "hang up": replace(VERBS["hang"], participle="gehängt")}


@dataclass(frozen=True)
class Frame:
    """Who does what: the nouns that fit each part of a verb's clause.

    `places` are where it may happen, or has to if `placed`; goals are never left out.
    """

    verb: Verb
    subjects: tuple[Noun, ...]
    objects: tuple[Noun, ...] = ()
    recipients: tuple[Noun, ...] = ()
    goals: tuple[Setting, ...] = ()
    places: tuple[Setting, ...] = ()
    placed: bool = False
    accompanied: bool = False  # may be done with somebody


_PEOPLE = tuple(PEOPLE.values())
_ANIMALS = tuple(ANIMALS.values())
_LIVING = _PEOPLE + _ANIMALS
_FLAT = nouns("book letter newspaper key coat hat umbrella picture")
_UPRIGHT = nouns("lamp cup chair box bag flower")
_GOODS = nouns(
    "lamp coat hat bag picture clock umbrella box chair flower cup car bicycle boat book"
)
_FOOD = tuple(FOOD.values())
_SMALL = nouns("key hat ball bag book letter cat mouse bird box")
_LOST = nouns("key hat ball bag book child dog cat umbrella")
_MODELS = nouns("picture flower house castle bridge horse tree mountain")
_MACHINES = nouns("car bicycle boat clock lamp chair umbrella door window")
_WASHABLE = nouns("car cup coat dog horse bicycle")
_OPENING = nouns("door window box bag letter umbrella")
_BROUGHT = nouns("cake book ball dog flower letter picture soup friend")
_TAKEN = nouns("umbrella coat bag dog child key newspaper bicycle")
_PLEASANT = nouns("picture poem story book hat coat car town house castle garden lamp cake soup")
_DREAMS = nouns("cake castle horse mouse lake cheese king queen")
_CUSTOMERS = nouns("king queen farmer doctor baker painter")


def frame(
    key: str,
    subjects: tuple[Noun, ...],
    objects: tuple[Noun, ...] = (),
    recipients: tuple[Noun, ...] = (),
    **more: Any,
) -> Frame:
    """A frame of the verb of that name."""
    return Frame(VERBS[key], subjects, objects, recipients, **more)


INTRANSITIVE: tuple[Frame, ...] = (
    frame("sleep", _LIVING, places=WHERE),
    frame("laugh", _PEOPLE, places=WHERE),
    frame("work", _PEOPLE, places=WHERE, accompanied=True),
    frame("dance", _PEOPLE, places=WHERE, accompanied=True),
    frame("sing", _PEOPLE, places=WHERE, accompanied=True),
    frame("play", _LIVING, places=WHERE, accompanied=True),
    frame("swim", _LIVING, places=WATERS, accompanied=True),
    frame("live", _PEOPLE, places=HOMES, placed=True),
    frame("sit", _LIVING, places=WHERE, placed=True),
    frame("get up", _PEOPLE),
    frame("fall asleep", _LIVING, places=WHERE),
    frame("come back", _LIVING),
    frame("arrive", _PEOPLE + nouns("train"), places=ARRIVALS),
    frame("leave", nouns("train boat car")),
)
MOTION: tuple[Frame, ...] = (
    frame("go", _LIVING, goals=WHITHER, accompanied=True),
    frame("run", _LIVING, goals=WHITHER, accompanied=True),
    frame("come", _LIVING, goals=WHENCE, accompanied=True),
    frame("drive", _PEOPLE, goals=DRIVES, accompanied=True),
)
POSITION: tuple[Frame, ...] = (
    frame("lie", _FLAT, places=LIES_WHERE, placed=True),
    frame("stand", _UPRIGHT, places=STANDS_WHERE, placed=True),
    frame("hang", nouns("picture clock coat hat"), places=HANGS_WHERE, placed=True),
)
PLACING: tuple[Frame, ...] = (
    frame("put", _PEOPLE, _FLAT, goals=PUT_WHERE),
    frame("place", _PEOPLE, _UPRIGHT, goals=PLACE_WHERE),
    frame("hang up", _PEOPLE, nouns("picture clock coat hat"), goals=HANG_WHERE),
)
TRANSITIVE: tuple[Frame, ...] = (
    frame("see", _LIVING, _LIVING, places=WHERE),
    frame("hear", _LIVING, _LIVING, places=WHERE),
    frame("read", _PEOPLE, tuple(READING.values()), places=WHERE),
    frame("write", _PEOPLE, nouns("book letter poem story"), places=WHERE),
    frame("buy", _PEOPLE, _GOODS + _FOOD, places=SHOPS),
    frame("buy", _PEOPLE, _GOODS, goals=((FOR, _PEOPLE),)),
    frame("sell", _PEOPLE, _GOODS, places=SHOPS),
    frame("eat", _LIVING, _FOOD, places=WHERE),
    frame("drink", _PEOPLE, tuple(DRINKS.values()), places=WHERE),
    frame("find", _LIVING, _SMALL, places=WHERE),
    frame("look for", _LIVING, _LOST, places=WHERE),
    frame("carry", _PEOPLE, nouns("box bag chair table child lamp"), goals=DESTINATIONS),
    frame("love", _PEOPLE, _LIVING),
    frame("paint", _PEOPLE, _MODELS, places=WHERE),
    frame("repair", _PEOPLE, _MACHINES, places=WHERE),
    frame("visit", _PEOPLE, _PEOPLE + nouns("castle school church village town")),
    frame("wash", _PEOPLE, _WASHABLE, places=WHERE),
    frame("have", _PEOPLE, _GOODS + _ANIMALS + nouns("brother sister friend garden house")),
    frame("call", _PEOPLE, _PEOPLE),
    frame("invite", _PEOPLE, _PEOPLE),
    frame("pick up", _PEOPLE, (*_PEOPLE, NOUNS["letter"]), places=COLLECTS_WHERE),
    frame("open", _PEOPLE, _OPENING),
    frame("close", _PEOPLE, _OPENING),
    frame("bring along", _PEOPLE, _BROUGHT),
    frame("take along", _PEOPLE, _TAKEN),
    frame("clean up", _PEOPLE, nouns("room kitchen garden house")),
)
DATIVE: tuple[Frame, ...] = (
    frame("help", _PEOPLE, _PEOPLE),
    frame("thank", _PEOPLE, _PEOPLE),
    frame("trust", _PEOPLE, _PEOPLE),
    frame("answer", _PEOPLE, _PEOPLE),
    frame("congratulate", _PEOPLE, _PEOPLE),
    frame("listen to", _PEOPLE, _PEOPLE),
    frame("follow", _LIVING, _LIVING),
    frame("belong to", _GOODS + nouns("dog horse garden house"), _PEOPLE),
    frame("like", _PEOPLE, _PLEASANT),
)
PREPOSITIONAL: tuple[Frame, ...] = (
    frame("wait", _PEOPLE, goals=((WAIT_FOR, _PEOPLE + nouns("train letter")),)),
    frame("think", _PEOPLE, goals=((THINK_OF, _PEOPLE + nouns("dog story house")),)),
    frame("dream", _LIVING, goals=((DREAM_OF, _DREAMS),)),
    frame("speak", _PEOPLE, goals=((TALK_TO, _PEOPLE),)),
    frame("speak", _PEOPLE, goals=((TALK_ABOUT, nouns("king queen book story picture town")),)),
    frame("work", _PEOPLE, goals=((FOR, _CUSTOMERS),)),
)
DITRANSITIVE: tuple[Frame, ...] = (
    frame("give", _PEOPLE, nouns("apple flower key book hat ball letter cake cup egg"), _PEOPLE),
    frame("show", _PEOPLE, nouns("picture house garden letter castle horse room boat"), _PEOPLE),
    frame("send", _PEOPLE, nouns("letter picture book poem flower newspaper"), _PEOPLE),
    frame("bring", _PEOPLE, nouns("soup coffee tea milk water bread newspaper cake"), _PEOPLE),
    frame("lend", _PEOPLE, nouns("book bicycle car boat umbrella coat bag"), _PEOPLE),
    frame("tell", _PEOPLE, nouns("story"), _PEOPLE),
)
ACTIVITIES = (
    *INTRANSITIVE[:7],
    *(each for each in TRANSITIVE if each.verb.base in ("read", "paint", "eat", "drink", "clean")),
)
FRAMES: tuple[Frame, ...] = (
    INTRANSITIVE + MOTION + POSITION + PLACING + TRANSITIVE + DATIVE + PREPOSITIONAL + DITRANSITIVE
)

# --- modals, adverbs, conjunctions ---------------------------------------------------------------

MAY = Modal("may", present=("darf", "darfst", "darf", "dürfen", "dürfen"))
CAN = Modal("can", present=("kann", "kannst", "kann", "können", "können"))
MUST = Modal(
    "must",
    present=("muss", "musst", "muss", "müssen", "müssen"),
    present_negative=MAY.present,
)
SHOULD = Modal("should", present=("sollte", "solltest", "sollte", "sollten", "sollten"))
WANT = Modal(
    "want",
    "wanted",
    "wants",
    present=("will", "willst", "will", "wollen", "wollen"),
    past=("wollte", "wolltest", "wollte", "wollten", "wollten"),
)
HAVE_TO = Modal(
    "have",
    "had",
    "has",
    present=MUST.present,
    past=("musste", "musstest", "musste", "mussten", "mussten"),
)
WILL = Modal("will", present=("werde", "wirst", "wird", "werden", "werden"))
LIKE_TO = Modal("like", "liked", "likes", adverb="gern")
OF_THE_LIVING: tuple[Modal, ...] = (CAN, MUST, SHOULD, WANT, WANT, HAVE_TO, MAY, WILL, WILL)
CONDITIONAL = (WILL, CAN, SHOULD, MUST)
OF_ALL: tuple[Modal, ...] = (MUST, SHOULD, HAVE_TO, WILL, WILL)
WISHED = (HAVE, VERBS["live"])  # states that one may want, or come to
WISHES: tuple[Modal, ...] = (WANT, WILL)

PAST_TIMES: tuple[Adverb, ...] = (
    Adverb("yesterday", "gestern"),
    Adverb("this morning", "heute Morgen"),
    Adverb("last week", "letzte Woche"),
    Adverb("on Monday", "am Montag"),
    Adverb("two days ago", "vor zwei Tagen", negatable=False),
)
PRESENT_TIMES: tuple[Adverb, ...] = (Adverb("now", "jetzt"), Adverb("today", "heute"))
FUTURE_TIMES: tuple[Adverb, ...] = (
    Adverb("tomorrow", "morgen"),
    Adverb("next week", "nächste Woche"),
    Adverb("soon", "bald", negatable=False),
)
SEASONS: tuple[Adverb, ...] = (
    Adverb("in the evening", "am Abend"),
    Adverb("in winter", "im Winter"),
)
SOMETIMES = Adverb("sometimes", "manchmal", frequent=True, negatable=False)
HABITS: tuple[Adverb, ...] = (
    *SEASONS,
    Adverb("every day", "jeden Tag", negatable=False),
    Adverb("often", "oft", frequent=True, negatable=False),
    Adverb("always", "immer", frequent=True, negatable=False),
    SOMETIMES,
    Adverb("never", "nie", frequent=True, negatable=False),
)
TIMES = {
    Tense.PAST: PAST_TIMES,
    Tense.PROGRESSIVE: PRESENT_TIMES,
    Tense.PRESENT: HABITS,
}
WHY = Adverb("why", "warum")
WHEN = Adverb("when", "wann")
WHERE_IS = Adverb("where", "wo")
WHERE_TO = Adverb("where", "wohin")

THAT = ("that", "dass")
WHETHER = ("whether", "ob")
BECAUSE = ("because", "weil")
ALTHOUGH = ("although", "obwohl")
IF = ("if", "wenn")
WHILE = ("while", "während")
WHEN_PAST = ("when", "als")
BUT = (", but", ", aber")
AND = ("and", "und")
BACKGROUNDS = (BECAUSE, BECAUSE, ALTHOUGH, IF, WHILE, WHEN_PAST)
SO = (", so", ", deshalb")
