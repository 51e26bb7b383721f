"""How words change: the tables of German grammar, and words that inflect by them.

An adjective, article or verb form is looked up, never guessed: the tables below are those of any
grammar book, and everything irregular stands in the word's own dictionary entry.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum


class Case(IntEnum):
    """German cases, as columns of the tables below.

    English has three forms as well: subject, object, and after a preposition (who, whom, which).
    """

    NOMINATIVE = 0
    ACCUSATIVE = 1
    DATIVE = 2


class Person(IntEnum):
    """Whom a verb agrees with. English "you" is one friend here: German du."""

    FIRST = 0
    SECOND = 1
    THIRD = 2
    FIRST_PLURAL = 3
    THIRD_PLURAL = 4


class Tense(Enum):
    """English tenses; German says the first two alike."""

    PRESENT = "sleeps"
    PROGRESSIVE = "is sleeping"
    PAST = "slept"


# Rows are masculine, feminine, neuter and plural; columns are the cases.
DEFINITE_ARTICLE = {
    "m": ("der", "den", "dem"),
    "f": ("die", "die", "der"),
    "n": ("das", "das", "dem"),
    "p": ("die", "die", "den"),
}
STRONG_ENDING = {
    "m": ("er", "en", "em"),
    "f": ("e", "e", "er"),
    "n": ("es", "es", "em"),
    "p": ("e", "e", "en"),
}
THIRD_PERSON = {
    "m": ("er", "ihn", "ihm"),
    "f": ("sie", "sie", "ihr"),
    "n": ("es", "es", "ihm"),
    "p": ("sie", "sie", "ihnen"),
}
HABEN = ("habe", "hast", "hat", "haben", "haben")
SEIN = ("bin", "bist", "ist", "sind", "sind")


@dataclass(frozen=True, eq=False)
class Noun:
    """A noun with the forms that its dictionary entry gives."""

    english: str
    english_plural: str
    german: str
    german_plural: str
    gender: str  # m, f, n
    kind: str  # person, animal, ...: which adjectives fit
    weak: bool = False  # der Junge, den Jungen
    mass: bool = False  # bread, milk: no plural, no "a"

    def inflect(self, case: Case, plural: bool) -> str:
        """The German form."""
        if not plural:
            oblique = self.weak and case is not Case.NOMINATIVE
            return self.german_plural if oblique else self.german
        needs_n = case is Case.DATIVE and self.german_plural[-1] not in "ns"
        return self.german_plural + "n" if needs_n else self.german_plural


@dataclass(frozen=True, eq=False)
class Adjective:
    """An adjective; `stem` carries the endings (teuer, teur-), comparatives where they are used."""

    english: str
    german: str
    stem: str
    english_comparative: str = ""
    german_comparative: str = ""


class Declension(Enum):
    """What a determiner's endings are, and so what the adjective after it must still show."""

    ARTICLE = "der, die, das; adjective weak"
    DER = "strong endings; adjective weak"
    EIN = "strong endings with three gaps; adjective weak, strong at the gaps"
    PARALLEL = "strong endings; adjective strong as well"
    NONE = "no endings, or no word at all; adjective strong"


@dataclass(frozen=True, eq=False)
class Determiner:
    """An article or its like. `number` restricts the noun: singular, plural or any."""

    english: str
    english_plural: str
    german: str
    declension: Declension
    number: str = "any"
    definite: bool = True

    def inflect(self, case: Case, gender: str) -> str:
        """The German form."""
        if self.declension is Declension.ARTICLE:
            return DEFINITE_ARTICLE[gender][case]
        if self.declension is Declension.NONE or self._has_gap(case, gender):
            return self.german
        return self.german + STRONG_ENDING[gender][case]

    def adjective_ending(self, case: Case, gender: str) -> str:
        """The ending of an adjective behind it: one of the two words has to show the case."""
        if (
            self.declension in (Declension.NONE, Declension.PARALLEL)  # strong
            or self._has_gap(case, gender)  # mixed
        ):
            return STRONG_ENDING[gender][case]
        is_plain = gender != "p" and (
            case is Case.NOMINATIVE or (case is Case.ACCUSATIVE and gender != "m")
        )
        return "e" if is_plain else "en"

    def _has_gap(self, case: Case, gender: str) -> bool:
        """Ein Mann, ein Kind: nothing where dieser and dieses have an ending."""
        gaps = (("m", Case.NOMINATIVE), ("n", Case.NOMINATIVE), ("n", Case.ACCUSATIVE))
        return self.declension is Declension.EIN and (gender, case) in gaps


THE = Determiner("the", "the", "", Declension.ARTICLE)
A = Determiner("a", "", "ein", Declension.EIN, "singular", definite=False)
BARE = Determiner("", "", "", Declension.NONE, "plural", definite=False)
NO = Determiner("no", "no", "kein", Declension.EIN, definite=False)


@dataclass(frozen=True, eq=False)
class Verb:
    """A verb with the principal parts of both dictionaries.

    `third` is the German third person singular without its prefix (ruft, sieht): the second person
    and all stem changes follow from it.
    """

    base: str
    past: str
    participle_ing: str
    third_s: str
    infinitive: str  # without the prefix
    third: str
    auxiliary: str  # hat, ist
    participle: str
    prefix: str = ""  # separable
    particle: str = ""  # English adverb: pick up the child, pick him up
    preposition: str = ""  # English preposition that German does not have: look for the child
    subject_case: Case = Case.NOMINATIVE
    object_case: Case = Case.ACCUSATIVE
    is_state: bool = False  # lasts, has no progressive: belong
    is_instant: bool = False  # has no progressive either: find
    is_fun: bool = False  # may be done gern
    present_forms: tuple[str, ...] = ()  # where German is irregular
    preterite_forms: tuple[str, ...] = ()  # where German prefers it to the perfect

    @property
    def is_copula(self) -> bool:
        """Whether it is "to be", which asks and negates without "do"."""
        return self.base == "be"

    @property
    def whole_infinitive(self) -> str:
        """As in the dictionary: anrufen."""
        return self.prefix + self.infinitive

    @property
    def zu_infinitive(self) -> str:
        """With zu, which goes inside a separable verb: anzurufen."""
        return f"{self.prefix}zu{self.infinitive}" if self.prefix else f"zu {self.infinitive}"

    def present(self, person: Person) -> str:
        """The German present without the prefix."""
        if self.present_forms:
            return self.present_forms[person]
        if person is Person.FIRST:
            return self.infinitive.removesuffix("en") + "e"
        if person is Person.SECOND:
            stem = self.third.removesuffix("t")
            return self.third if stem[-1] in "sßz" else stem + "st"
        return self.third if person is Person.THIRD else self.infinitive


@dataclass(frozen=True, eq=False)
class Modal:
    """What turns a verb into an infinitive: can, want to, will, like to.

    German forms are per person. Where English says it with an adverb's help ("likes to sing") and
    German with the adverb alone ("singt gern"), there are no forms but `adverb`.
    """

    english: str  # can; want (to)
    english_past: str = ""
    english_third: str = ""
    present: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    present_negative: tuple[str, ...] = ()  # must not: darf nicht
    adverb: str = ""

    @property
    def is_auxiliary(self) -> bool:
        """Whether English says "can not sleep", rather than "does not want to sleep"."""
        return not self.english_third


@dataclass(frozen=True, eq=False)
class Adverb:
    """An adverb of time, or an interrogative one."""

    english: str
    german: str
    frequent: bool = False  # English puts it before the verb: often
    negatable: bool = True  # whether a negation beside it reads well in both languages


@dataclass(frozen=True, eq=False)
class Preposition:
    """A preposition in one of its meanings: in (where, dative), into (whither, accusative)."""

    english: str
    german: str
    case: Case
