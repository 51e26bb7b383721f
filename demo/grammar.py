"""A small synchronous grammar: each phrase is built once and says itself in English and in German.

The English is regular. The German is where the work lies, and what a model has to learn:

- articles, adjectives and nouns agree in gender, number and case;
- the finite verb comes second in a statement, first in a question, last in a subordinate clause;
- infinitives, participles and separable prefixes close the clause, far from the finite verb;
- pronouns come before adverbs, and indefinite objects after places.

Every rule is a function of the phrase alone, so an English sentence has one translation.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from morphology import (
    DEFINITE_ARTICLE,
    HABEN,
    NO,
    SEIN,
    THE,
    THIRD_PERSON,
    Adjective,
    Adverb,
    Case,
    Determiner,
    Modal,
    Noun,
    Person,
    Preposition,
    Tense,
    Verb,
)

CONTRACTIONS = {
    "an dem": "am",
    "an das": "ans",
    "in dem": "im",
    "in das": "ins",
    "von dem": "vom",
    "zu dem": "zum",
    "zu der": "zur",
}


class Order(Enum):
    """Where the finite verb of a German clause stands."""

    FIRST = "yes/no question"
    SECOND = "statement"
    FINAL = "subordinate clause"


def join(words: Iterable[str]) -> str:
    """Join the words that are not empty with single spaces."""
    return " ".join(filter(None, words))


def sentence(text: str, mark: str = ".") -> str:
    """Capitalise, let commas that meet become one, and end with the mark."""
    text = re.sub(r"\s*,[\s,]*", ", ", text).strip(" ,")
    return text[0].upper() + text[1:] + mark


@dataclass(frozen=True, eq=False)
class Nominal(ABC):
    """Anything that can be a subject or an object."""

    @property
    def person(self) -> Person:
        """Whom the verb agrees with."""
        return Person.THIRD

    @property
    def is_pronoun(self) -> bool:
        """Personal pronouns stand at the head of the German middle field."""
        return False

    @property
    def is_definite(self) -> bool:
        """Indefinite objects come late in German, and are negated with kein."""
        return True

    @property
    def moves(self) -> bool:
        """Whether it opens its clause whatever its role: who, das."""
        return False

    @abstractmethod
    def english(self, case: Case) -> str:
        """The English words."""

    @abstractmethod
    def german(self, case: Case) -> str:
        """The German words."""


@dataclass(frozen=True, eq=False)
class Pronoun(Nominal):
    """A personal pronoun."""

    english_forms: tuple[str, str]
    german_forms: tuple[str, str, str]
    who: Person

    @property
    def person(self) -> Person:
        """Its grammatical person."""
        return self.who

    @property
    def is_pronoun(self) -> bool:
        """Always."""
        return True

    def english(self, case: Case) -> str:
        """He, him."""
        return self.english_forms[min(case, 1)]

    def german(self, case: Case) -> str:
        """Er, ihn, ihm."""
        return self.german_forms[case]


ME = Pronoun(("I", "me"), ("ich", "mich", "mir"), Person.FIRST)
YOU = Pronoun(("you", "you"), ("du", "dich", "dir"), Person.SECOND)
HIM = Pronoun(("he", "him"), THIRD_PERSON["m"], Person.THIRD)
HER = Pronoun(("she", "her"), THIRD_PERSON["f"], Person.THIRD)
US = Pronoun(("we", "us"), ("wir", "uns", "uns"), Person.FIRST_PLURAL)
THEM = Pronoun(("they", "them"), THIRD_PERSON["p"], Person.THIRD_PLURAL)
IT = Pronoun(("it", "it"), THIRD_PERSON["n"], Person.THIRD)


@dataclass(frozen=True, eq=False)
class Name(Nominal):
    """A person's name."""

    name: str
    gender: str

    def english(self, case: Case) -> str:  # noqa: ARG002 - the same in every case
        """The name."""
        return self.name

    def german(self, case: Case) -> str:  # noqa: ARG002 - the same in every case
        """The name."""
        return self.name


@dataclass(frozen=True, eq=False)
class NounPhrase(Nominal):
    """Determiner, adjectives, noun, and perhaps a relative clause."""

    determiner: Determiner
    noun: Noun
    plural: bool = False
    adjectives: tuple[Adjective, ...] = ()
    relative: "Clause | None" = None

    @property
    def gender(self) -> str:
        """Row of the tables: m, f, n or p."""
        return "p" if self.plural else self.noun.gender

    @property
    def person(self) -> Person:
        """It or they."""
        return Person.THIRD_PLURAL if self.plural else Person.THIRD

    @property
    def is_definite(self) -> bool:
        """As its determiner says."""
        return self.determiner.definite

    def english(self, case: Case) -> str:  # noqa: ARG002 - English nouns have one
        """An old house that the king sells."""
        determiner = self.determiner.english_plural if self.plural else self.determiner.english
        noun = self.noun.english_plural if self.plural else self.noun.english
        rest = join([*(adjective.english for adjective in self.adjectives), noun])
        if determiner == "a" and rest[0] in "aeiou":
            determiner = "an"
        return join([determiner, rest, self.relative.english() if self.relative else ""])

    def german(self, case: Case) -> str:
        """Ein altes Haus, das der König verkauft,."""
        ending = self.determiner.adjective_ending(case, self.gender)
        return join(
            [
                self.determiner.inflect(case, self.gender),
                *(adjective.stem + ending for adjective in self.adjectives),
                self.noun.inflect(case, self.plural),
                self.german_relative(),
            ]
        )

    def german_relative(self) -> str:
        """The relative clause between commas, if there is one."""
        return f", {self.relative.german(Order.FINAL)}," if self.relative else ""

    def without_relative(self) -> "NounPhrase":
        """The same without its relative clause."""
        return replace(self, relative=None)


@dataclass(frozen=True, eq=False)
class Both(Nominal):
    """Two nominals joined by "and"."""

    first: Nominal
    second: Nominal

    @property
    def person(self) -> Person:
        """They."""
        return Person.THIRD_PLURAL

    def english(self, case: Case) -> str:
        """The dog and the cat."""
        return f"{self.first.english(case)} and {self.second.english(case)}"

    def german(self, case: Case) -> str:
        """Der Hund und die Katze."""
        return f"{self.first.german(case)} und {self.second.german(case)}"


@dataclass(frozen=True, eq=False)
class RelativePronoun(Nominal):
    """Who, whom, that, which: gender and number from the noun, case from its own clause."""

    antecedent: NounPhrase

    @property
    def person(self) -> Person:
        """The antecedent's."""
        return self.antecedent.person

    @property
    def moves(self) -> bool:
        """Always."""
        return True

    def english(self, case: Case) -> str:
        """Who, whom, whom of people; that, that, which of all else."""
        is_person = self.antecedent.noun.kind == "person"
        return (("who", "whom", "whom") if is_person else ("that", "that", "which"))[case]

    def german(self, case: Case) -> str:
        """Like the article but for denen."""
        gender = self.antecedent.gender
        if gender == "p" and case is Case.DATIVE:
            return "denen"
        return DEFINITE_ARTICLE[gender][case]


@dataclass(frozen=True, eq=False)
class Interrogative(Nominal):
    """Who or what."""

    english_forms: tuple[str, str]
    german_forms: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """Always."""
        return True

    def english(self, case: Case) -> str:
        """Who, whom."""
        return self.english_forms[min(case, 1)]

    def german(self, case: Case) -> str:
        """Wer, wen, wem."""
        return self.german_forms[case]


WHO = Interrogative(("who", "whom"), ("wer", "wen", "wem"))
WHAT = Interrogative(("what", "what"), ("was", "was"))


# --- what else a clause holds --------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """A preposition with its nominal."""

    preposition: Preposition
    nominal: Nominal

    @property
    def moves(self) -> bool:
        """With its nominal: with whom, in dem."""
        return self.nominal.moves

    def english(self) -> str:
        """In the old house."""
        return f"{self.preposition.english} {self.nominal.english(Case.DATIVE)}"

    def german(self) -> str:
        """Im alten Haus: preposition and article melt where they can."""
        text = f"{self.preposition.german} {self.nominal.german(self.preposition.case)}"
        if isinstance(self.nominal, NounPhrase) and self.nominal.determiner is THE:
            head, article, rest = text.split(" ", 2)
            head = CONTRACTIONS.get(f"{head} {article}", f"{head} {article}")
            return f"{head} {rest}"
        return text


@dataclass(frozen=True)
class Predicate:
    """An adjective after "to be", without ending in German; compared with `than` if given."""

    adjective: Adjective
    degree: tuple[str, str] = ("", "")
    than: Nominal | None = None

    @property
    def moves(self) -> bool:
        """Never."""
        return False

    def english(self) -> str:
        """Very old; older than the house."""
        if self.than:
            return f"{self.adjective.english_comparative} than {self.than.english(Case.NOMINATIVE)}"
        return join([self.degree[0], self.adjective.english])

    def german(self) -> str:
        """Sehr alt; älter als das Haus."""
        if self.than:
            return f"{self.adjective.german_comparative} als {self.than.german(Case.NOMINATIVE)}"
        return join([self.degree[1], self.adjective.german])


@dataclass(frozen=True)
class Subordinate:
    """A clause behind a conjunction that sends its German verb to the end."""

    conjunction: tuple[str, str]
    clause: "Clause"

    def english(self) -> str:
        """Because he is tired."""
        return f"{self.conjunction[0]} {self.clause.english()}"

    def german(self) -> str:
        """Weil er müde ist."""
        return f", {self.conjunction[1]} {self.clause.german(Order.FINAL)},"


@dataclass(frozen=True)
class Coordinate:
    """A second main clause; `conjunction` holds its own commas."""

    conjunction: tuple[str, str]
    clause: "Clause"
    inverts: bool = False  # deshalb is the first part of its clause, aber is not

    def english(self) -> str:
        """But it is beautiful."""
        return f"{self.conjunction[0]} {self.clause.english()}"

    def german(self) -> str:
        """Aber sie ist schön; deshalb ist sie schön."""
        order = Order.FIRST if self.inverts else Order.SECOND
        return f"{self.conjunction[1]} {self.clause.german(order)}"


@dataclass(frozen=True)
class Infinitive:
    """A clause without a subject of its own: to find the key. With a purpose: um ... zu."""

    clause: "Clause"
    purpose: bool = False

    def english(self) -> str:
        """To find the key."""
        return join(["to", self.clause.verb.base, self.clause.english_rest()])

    def german(self) -> str:
        """Um den Schlüssel zu finden."""
        words = ["um" if self.purpose else "", *self.clause.german_middle()]
        words += [self.clause.verb.zu_infinitive, self.clause.german_relatives()]
        return f", {join(words)},"


@dataclass(frozen=True)
class Clause:
    """One verb with all that belongs to it.

    Args:
        subject: the English subject.
        verb: its verb.
        object: the direct object, in the case that the verb asks for.
        recipient: dative object before it.
        companion: with his dog.
        place: where it happens.
        goal: what belongs closest to the verb: where to, a prepositional object, a predicate.
        time: an adverb; `time_first` opens the clause with it.
        tense: of the English clause.
        modal: turns the verb into an infinitive.
        negative: whether it is denied.
        lead: a subordinate clause before this one.
        tail: what follows the whole clause.
    """

    subject: Nominal
    verb: Verb
    object: Nominal | None = None
    recipient: Nominal | None = None
    companion: Phrase | None = None
    place: Phrase | None = None
    goal: Phrase | Predicate | None = None
    time: Adverb | None = None
    time_first: bool = False
    tense: Tense = Tense.PRESENT
    modal: Modal | None = None
    negative: bool = False
    lead: Subordinate | None = None
    tail: Subordinate | Coordinate | Infinitive | None = None

    @property
    def moves(self) -> bool:
        """Whether a part of it opens it, as in relative clauses and questions for that part."""
        parts = (
            self.subject,
            self.object,
            self.recipient,
            self.companion,
            self.place,
            self.goal,
        )
        return any(part.moves for part in parts if part)

    # English

    def english(self, question: bool = False) -> str:
        """The English words, as a statement or a question."""
        inverts = question and not self.subject.moves
        auxiliary, verb = self._english_verb(inverts)
        subject = self.subject.english(Case.NOMINATIVE)
        frequent = self.time if self.time and self.time.frequent else None
        return join(
            [
                self._english_front(),
                *([auxiliary, subject] if inverts else [subject, auxiliary]),
                frequent.english if frequent and not self.time_first else "",
                verb,
                self.english_rest(),
            ]
        )

    def _english_front(self) -> str:
        if self.lead:
            return f"{self.lead.english()},"
        if self.object and self.object.moves:
            return self.object.english(Case.ACCUSATIVE)
        if self.recipient and self.recipient.moves:
            return f"to {self.recipient.english(Case.DATIVE)}"
        for phrase in (self.companion, self.place, self.goal):
            if phrase and phrase.moves:
                return phrase.english()
        return self.time.english if self.time and self.time_first else ""

    def _english_verb(self, inverts: bool) -> tuple[str, str]:
        """The auxiliary that inverts and takes "not" (perhaps none), and the rest."""
        person, verb = self.subject.person, self.verb
        denial = " not" if self.negative else ""
        if self.modal and self.modal.is_auxiliary:
            return (self.modal.english + denial).replace("can not", "cannot"), verb.base
        if self.modal is None and verb.is_copula:
            return english_be(person, self.tense) + denial, ""
        if self.tense is Tense.PROGRESSIVE:
            return english_be(person, Tense.PRESENT) + denial, verb.participle_ing
        if self.modal:
            base, past, third = (
                self.modal.english,
                self.modal.english_past,
                self.modal.english_third,
            )
            rest = f"to {verb.base}"
        else:
            base, past, third, rest = verb.base, verb.past, verb.third_s, ""
        is_third = person is Person.THIRD
        if inverts or self.negative:
            present = "does" if is_third else "do"
            return ("did" if self.tense is Tense.PAST else present) + denial, join([base, rest])
        present = third if is_third else base
        return "", join([past if self.tense is Tense.PAST else present, rest])

    def english_rest(self) -> str:
        """All behind the verb."""
        recipient = self.recipient if self.recipient and not self.recipient.moves else None
        last_time = self.time and not self.time_first and not self.time.frequent
        return join(
            [
                recipient.english(Case.ACCUSATIVE) if recipient else "",
                *self._english_object(),
                *(
                    phrase.english()
                    for phrase in (self.goal, self.companion, self.place)
                    if phrase and not phrase.moves
                ),
                self.time.english if self.time and last_time else "",
                self.tail.english() if self.tail else "",
            ]
        )

    def _english_object(self) -> list[str]:
        words = self.object.english(Case.ACCUSATIVE) if self.object else ""
        if self.object and self.object.moves:
            words = ""
        if self.object and self.object.is_pronoun:
            return [self.verb.preposition, words, self.verb.particle]
        return [self.verb.particle, self.verb.preposition, words]

    # German

    def german(self, order: Order) -> str:
        """The German words with the finite verb where `order` says."""
        finite, closing = self._german_verb(order)
        front = self._german_front(order)
        subject = self.subject.german(self.verb.subject_case)
        if self.subject.moves or (order is Order.SECOND and not front):
            front, subject = subject, ""
        middle = join([subject, *self.german_middle()])
        field = [middle, closing, finite] if order is Order.FINAL else [finite, middle, closing]
        return join(
            [front, *field, self.german_relatives(), self.tail.german() if self.tail else ""]
        )

    def _german_front(self, order: Order) -> str:
        """What opens the clause, if it is not the subject."""
        if self.lead:
            return self.lead.german()
        if self.object and self.object.moves:
            return self.object.german(self.verb.object_case)
        if self.recipient and self.recipient.moves:
            return self.recipient.german(Case.DATIVE)
        for phrase in (self.companion, self.place, self.goal):
            if phrase and phrase.moves:
                return phrase.german()
        is_first = self.time and self.time_first and order is Order.SECOND
        return self.time.german if self.time and is_first else ""

    def _german_verb(self, order: Order) -> tuple[str, str]:
        """The finite verb, and what closes the clause beside it."""
        verb = self.verb
        is_past = self.tense is Tense.PAST
        agrees_with = self.object if verb.object_case is Case.NOMINATIVE else self.subject
        person = (agrees_with or self.subject).person
        if self.modal and self.modal.present:
            forms = self.modal.past if is_past else self.modal.present
            if self.negative and self.modal.present_negative:
                forms = self.modal.present_negative
            return forms[person], verb.whole_infinitive
        if is_past and verb.preterite_forms:
            return verb.preterite_forms[person], ""
        if is_past:
            return (SEIN if verb.auxiliary == "ist" else HABEN)[person], verb.participle
        if order is Order.FINAL:
            return verb.prefix + verb.present(person), ""
        return verb.present(person), verb.prefix

    def german_middle(self) -> list[str]:
        """All between the finite verb and what closes the clause, the subject aside."""
        objects = [
            (nominal, case)
            for nominal, case in (
                (self.recipient, Case.DATIVE),
                (self.object, self.verb.object_case),
            )
            if nominal and not nominal.moves
        ]
        pronouns = [pair for pair in objects if pair[0].is_pronoun]
        nouns = [pair for pair in objects if not pair[0].is_pronoun]
        definite = [pair for pair in nouns if pair[0].is_definite]
        indefinite = [pair for pair in nouns if not pair[0].is_definite]
        gern = self.modal.adverb if self.modal else ""
        takes_kein = self.negative and bool(indefinite) and not gern
        if takes_kein:
            indefinite = [(deny(nominal), case) for nominal, case in indefinite]
        return [
            *(nominal.german(case) for nominal, case in pronouns),
            self.time.german if self.time and not self.time_first else "",
            *(in_place(nominal).german(case) for nominal, case in definite),
            "nicht" if self.negative and not takes_kein else "",
            gern,
            self.companion.german() if self.companion and not self.companion.moves else "",
            self.place.german() if self.place and not self.place.moves else "",
            *(in_place(nominal).german(case) for nominal, case in indefinite),
            self.goal.german() if self.goal and not self.goal.moves else "",
        ]

    def german_relatives(self) -> str:
        """Relative clauses of the objects, which wait until the clause is closed."""
        objects = (self.recipient, self.object)
        return join(each.german_relative() for each in objects if isinstance(each, NounPhrase))


def in_place(nominal: Nominal) -> Nominal:
    """The nominal as it stands inside its clause: its relative clause comes later."""
    return nominal.without_relative() if isinstance(nominal, NounPhrase) else nominal


def deny(nominal: Nominal) -> Nominal:
    """Kein Haus for ein Haus."""
    return replace(nominal, determiner=NO) if isinstance(nominal, NounPhrase) else nominal


def english_be(person: Person, tense: Tense) -> str:
    """The form of "to be"."""
    if tense is Tense.PAST:
        return "was" if person in (Person.FIRST, Person.THIRD) else "were"
    return {Person.FIRST: "am", Person.THIRD: "is"}.get(person, "are")


def statement(clause: Clause) -> tuple[str, str]:
    """The pair of sentences, English and German."""
    return sentence(clause.english()), sentence(clause.german(Order.SECOND))


def question(clause: Clause) -> tuple[str, str]:
    """The pair of questions: with a question word if the clause has one, else yes/no."""
    order = Order.SECOND if clause.moves or clause.time_first else Order.FIRST
    return sentence(clause.english(question=True), "?"), sentence(clause.german(order), "?")


def pronoun_for(nominal: Nominal) -> Pronoun | None:
    """The pronoun that takes up a nominal: German follows the gender of the noun.

    None where the two genders of a person disagree (das Mädchen), or there is nothing to take up.
    """
    if isinstance(nominal, Pronoun):
        return nominal
    if nominal.person is Person.THIRD_PLURAL:
        return THEM
    if isinstance(nominal, Name):
        return HIM if nominal.gender == "m" else HER
    if not isinstance(nominal, NounPhrase):
        return None
    if nominal.noun.kind == "person":
        return {"m": HIM, "f": HER}.get(nominal.noun.gender)
    return Pronoun(("it", "it"), THIRD_PERSON[nominal.noun.gender], Person.THIRD)
