"""Who invents the sentences: draws words that fit each other; the grammar says them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import lexicon
from grammar import (
    HER,
    HIM,
    IT,
    ME,
    THEM,
    US,
    WHAT,
    WHO,
    YOU,
    Both,
    Clause,
    Coordinate,
    Infinitive,
    Name,
    Nominal,
    NounPhrase,
    Phrase,
    Predicate,
    RelativePronoun,
    Subordinate,
    pronoun_for,
    question,
    statement,
)
from lexicon import Frame, Setting
from morphology import (
    BARE,
    THE,
    Adjective,
    Adverb,
    Case,
    Determiner,
    Noun,
    Person,
    Preposition,
    Tense,
    Verb,
)

MIN_WORDS, MAX_WORDS = 5, 16

Pair = tuple[str, str]
T = TypeVar("T")

PRONOUNS = (ME, YOU, HIM, HER, US, THEM)
NAMES = tuple(Name(name, gender) for name, gender in lexicon.NAMES)
NOUNS = tuple(lexicon.NOUNS.values())
PEOPLE = tuple(lexicon.PEOPLE.values())
# Which word a form belongs to, to see when one comes twice.
SINGULARS = {form: noun.english for noun in NOUNS for form in (noun.english, noun.english_plural)}
SINGULARS |= {name.name.lower(): name.name for name in NAMES}

OF_PEOPLE = [frame for frame in lexicon.FRAMES if frame.subjects[0] in PEOPLE]
EVENTS = [frame for frame in OF_PEOPLE if not frame.verb.is_state]
ATTITUDES = [frame for frame in OF_PEOPLE if frame.verb.is_state]
ACTIONS = [
    frame
    for frame in lexicon.PLACING + lexicon.TRANSITIVE + lexicon.DATIVE[:6] + lexicon.DITRANSITIVE
    if not frame.verb.is_state
]
ERRANDS = [
    frame
    for frame in ACTIONS
    if frame.verb.base
    in ("buy", "sell", "visit", "help", "pick", "look", "repair", "thank", "paint")
    and not frame.goals
]


def settings_of(noun: Noun, settings: Sequence[Setting]) -> list[Preposition]:
    """The prepositions that these settings have for the noun."""
    return [preposition for preposition, nouns in settings if noun in nouns]


# Which parts a noun can take, and in which frames.
ROLES = {
    noun: {
        "subject": [each for each in lexicon.FRAMES if noun in each.subjects],
        "object": [each for each in lexicon.FRAMES if noun in each.objects],
        "recipient": [each for each in lexicon.FRAMES if noun in each.recipients],
        "goal": [each for each in lexicon.FRAMES if settings_of(noun, each.goals)],
        "place": [each for each in lexicon.FRAMES if settings_of(noun, each.places)],
    }
    for noun in NOUNS
}


class Author:
    """Writes one pair of sentences after the other, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        # Of all of `random`, Python promises that only random() stays the same in later versions.
        self._random = random.Random(seed).random
        kinds: tuple[tuple[int, Callable[[], Pair]], ...] = (
            (32, self.event),
            (4, self.state),
            (4, self.comparison),
            (8, self.yes_no_question),
            (8, self.open_question),
            (12, self.report),
            (12, self.circumstance),
            (6, self.contrast),
            (8, self.relative_subject),
            (8, self.relative_object),
            (5, self.attempt),
            (4, self.errand),
        )
        self._kinds = [kind for weight, kind in kinds for _ in range(weight)]

    def write(self) -> Pair:
        """An English sentence and its German translation."""
        while True:
            english, german = self.pick(self._kinds)()
            has_length = MIN_WORDS <= count_words(english) <= MAX_WORDS
            if has_length and count_words(german) <= MAX_WORDS and not stumbles(english):
                return english, german

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each as likely as the others."""
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    # --- sentences -------------------------------------------------------------------------------

    def event(self) -> Pair:
        """Tomorrow the king will not give the child an apple."""
        denied = self.chance(0.2)
        clause = self.clause(self.pick(lexicon.FRAMES), known=denied)
        return statement(self.open_with_time(self.told(replace(clause, negative=denied))))

    def state(self) -> Pair:
        """The old clock was too expensive."""
        return statement(self.being(self.subject(NOUNS, known=True), self.pick_tense()))

    def comparison(self) -> Pair:
        """My bicycle is older than the red car."""
        kind = self.pick(("person", "animal", "thing", "vehicle"))
        nouns = [noun for noun in NOUNS if noun.kind == kind]
        subject = plain(self.subject(nouns, known=True))
        than = self.noun_phrase(without(nouns, subject), lexicon.KNOWN_DETERMINERS, described=0.2)
        gradable = [
            each
            for each in lexicon.FITTING[kind]
            if each.german_comparative and each not in than.adjectives
        ]
        predicate = Predicate(self.pick(gradable), than=than)
        return statement(Clause(subject, lexicon.BE, goal=predicate, tense=self.pick_tense()))

    def yes_no_question(self) -> Pair:
        """Did you see the bear in the garden?"""
        clause = self.clause(self.pick(lexicon.FRAMES), known=True)
        # Nobody asks others what they do themselves.
        return self.yes_no_question() if clause.subject is ME else question(self.told(clause))

    def open_question(self) -> Pair:
        """Whom does the boy want to help?"""
        clause = self.pick((self.ask_who, self.ask_whom, self.ask_adverb, self.ask_adverb))()
        return self.open_question() if clause.subject is ME else question(clause)

    def report(self) -> Pair:
        """The queen said that the bread was fresh."""
        verb = self.pick((lexicon.SAY, lexicon.KNOW, lexicon.HOPE, lexicon.BELIEVE, lexicon.ASK))
        denied = verb is lexicon.KNOW and self.chance(0.6)
        conjunction = lexicon.WHETHER if verb is lexicon.ASK or denied else lexicon.THAT
        tense = self.pick_tense()
        if self.chance(0.2):
            clause = self.being(self.subject(NOUNS, known=True), tense)
        else:
            clause = self.clause(self.pick(lexicon.FRAMES), known=conjunction is lexicon.WHETHER)
            clause = self.told(clause, past=True if tense is Tense.PAST else None)
        reporter = self.subject(PEOPLE, known=True)
        matrix = Clause(reporter, verb, tense=tense, negative=denied)
        return statement(replace(matrix, tail=Subordinate(conjunction, clause)))

    def circumstance(self) -> Pair:
        """Because the dog is tired, it is sleeping in the kitchen."""
        frame = self.pick(EVENTS)
        name, pronoun = self.mentions(frame)
        if self.chance(0.6):
            main, subordinate = self.with_background(self.clause(frame, subject=name), pronoun)
            return statement(replace(main, tail=subordinate))
        if self.chance(0.3):
            main, subordinate = self.with_background(self.clause(frame, subject=name), None)
        else:
            main, subordinate = self.with_background(self.clause(frame, subject=pronoun), name)
        return statement(replace(main, lead=subordinate))

    def contrast(self) -> Pair:
        """The lamp is old, but it is beautiful. The boy is tired, so he is sleeping."""
        return statement(self.pick((self.but, self.so, self.both, self.object_because))())

    def relative_subject(self) -> Pair:
        """The boy whom the bear followed was very brave."""
        past = self.chance(0.5)
        host = self.relative_host(self.pick(NOUNS))
        frames = [each for each in ROLES[host.noun]["subject"] if each not in lexicon.POSITION]
        if not frames or self.chance(0.4):
            tense = Tense.PAST if past else Tense.PRESENT
            return statement(self.being(self.with_relative(host, past), tense))
        frame = self.pick(frames)
        subject = self.with_relative(host, past, frame.verb)
        return statement(self.told(self.clause(frame, subject=subject, brief=True), past=past))

    def relative_object(self) -> Pair:
        """Lena found the key that you looked for."""
        past = self.chance(0.5)
        frame = self.pick([each for each in ACTIONS if not each.goals])
        host = self.relative_host(self.pick(frame.objects))
        clause = self.clause(frame, brief=True)
        clause = replace(clause, object=self.with_relative(host, past, frame.verb))
        return statement(self.told(clause, timed=False, past=past))

    def attempt(self) -> Pair:
        """Lena forgot to bring along the cake."""
        subject = self.subject(PEOPLE, known=True)
        verb = self.pick((lexicon.TRY, lexicon.FORGET))
        action = self.clause(self.pick(ACTIONS), subject=subject, brief=True)
        return statement(
            self.open_with_time(self.told(Clause(subject, verb, tail=Infinitive(action))))
        )

    def errand(self) -> Pair:
        """The baker is going to the market to sell his bicycle."""
        frame = self.pick(lexicon.MOTION[:2])
        subject = self.subject(PEOPLE, known=True)
        goal = self.phrase(lexicon.DESTINATIONS, subject)
        errand = self.clause(self.pick(ERRANDS), subject=subject, brief=True)
        clause = Clause(subject, frame.verb, goal=goal, tail=Infinitive(errand, purpose=True))
        return statement(self.open_with_time(self.told(clause)))

    # --- questions -------------------------------------------------------------------------------

    def ask_who(self) -> Clause:
        """Who repaired the clock?"""
        clause = self.told(self.clause(self.pick(OF_PEOPLE), subject=HIM, known=True))
        return replace(clause, subject=WHO)

    def ask_whom(self) -> Clause:
        """Whom is she helping? What did he eat? To whom, for whom?"""
        frame = self.pick(
            lexicon.TRANSITIVE + lexicon.DATIVE + lexicon.DITRANSITIVE + lexicon.PREPOSITIONAL
        )
        clause = self.told(self.clause(frame, known=True, brief=True))
        if frame.recipients:
            return replace(clause, recipient=WHO)
        if isinstance(clause.goal, Phrase):
            goal = replace(clause.goal, nominal=WHO)
            return replace(clause, goal=goal) if frame.goals[0][1][0] in PEOPLE else self.ask_whom()
        kinds = {noun.kind for noun in frame.objects}
        if kinds <= {"person", "animal"}:
            return replace(clause, object=WHO)
        if kinds & {"person", "animal"} or frame.verb.object_case is Case.DATIVE:
            return self.ask_whom()
        return replace(clause, object=WHAT)

    def ask_adverb(self) -> Clause:
        """Why, when, where, and where to."""
        adverb = self.pick((lexicon.WHY, lexicon.WHEN, lexicon.WHERE_IS, lexicon.WHERE_TO))
        if adverb is lexicon.WHERE_TO:
            subject = self.subject(PEOPLE, known=True)
            clause = Clause(subject, self.pick(lexicon.MOTION[:2]).verb)
            return replace(self.told(clause, timed=False), time=adverb, time_first=True)
        frames: Sequence[Frame] = lexicon.FRAMES
        if adverb is lexicon.WHERE_IS:
            frames = [frame for frame in frames if frame.places]
        if adverb is lexicon.WHEN:
            frames = [frame for frame in frames if not frame.verb.is_state]
        clause = self.clause(self.pick(frames), known=True, brief=adverb is lexicon.WHERE_IS)
        if adverb is lexicon.WHERE_IS:
            clause = replace(clause, place=None)
        clause = self.told(clause, timed=False)
        return replace(clause, time=adverb, time_first=True)

    # --- clauses beside clauses ------------------------------------------------------------------

    def mentions(self, frame: Frame) -> tuple[Nominal, Nominal]:
        """The same one twice, by name and by pronoun; or two different ones."""
        living = [noun for noun in frame.subjects if noun.kind in ("person", "animal")]
        name = self.subject(living, known=True)
        pronoun = pronoun_for(name)
        if pronoun and self.chance(0.75):
            return name, pronoun
        return name, self.other(name)

    def other(self, one: Nominal) -> Nominal:
        """Another person."""
        return self.noun_phrase(without(PEOPLE, one), lexicon.KNOWN_DETERMINERS)

    def with_background(self, main: Clause, someone: Nominal | None) -> tuple[Clause, Subordinate]:
        """When, why or despite what it happens: how somebody is, or the weather."""
        conjunction = self.pick(lexicon.BACKGROUNDS)
        if conjunction is lexicon.IF:
            main = replace(main, modal=self.pick(lexicon.CONDITIONAL))
            return main, Subordinate(conjunction, self.reason(someone, Tense.PRESENT))
        if conjunction is lexicon.WHEN_PAST and someone:
            young = Predicate(self.pick(lexicon.ONCE))
            background = Clause(someone, lexicon.BE, goal=young, tense=Tense.PAST)
            return at(main, Tense.PAST), Subordinate(conjunction, background)
        tense = self.pick((Tense.PAST, Tense.PROGRESSIVE))
        if conjunction is lexicon.WHILE and someone:
            activity = self.clause(self.pick(lexicon.ACTIVITIES), subject=someone, brief=True)
            return at(main, tense), Subordinate(conjunction, at(activity, tense))
        conjunction = self.pick((lexicon.BECAUSE, lexicon.ALTHOUGH))
        return at(main, tense), Subordinate(conjunction, self.reason(someone, tense))

    def reason(self, someone: Nominal | None, tense: Tense) -> Clause:
        """What somebody is like, or likes; or the weather.

        The weather names nobody: it can stand beside a pronoun whose name is in the other clause,
        but not in place of the name.
        """
        if someone is None or (someone.is_pronoun and self.chance(0.3)):
            return self.weather(tense)
        if kind_of(someone) == "person" and self.chance(0.3):
            return at(self.clause(self.pick(ATTITUDES), subject=someone, brief=True), tense)
        return self.being(someone, tense)

    def weather(self, tense: Tense) -> Clause:
        """It is raining; it is cold."""
        if self.chance(0.5):
            return Clause(IT, self.pick((lexicon.RAIN, lexicon.SNOW)), tense=tense)
        adjective = Predicate(self.pick(lexicon.WEATHER), self.pick(lexicon.DEGREES))
        return at(Clause(IT, lexicon.BE, goal=adjective), tense)

    def being(self, subject: Nominal, tense: Tense) -> Clause:
        """Somebody or something is somehow."""
        adjective = self.pick(lexicon.STATES[kind_of(subject)])
        degree = ("", "") if adjective in lexicon.ABSOLUTE else self.pick(lexicon.DEGREES)
        return at(Clause(plain(subject), lexicon.BE, goal=Predicate(adjective, degree)), tense)

    def but(self) -> Clause:
        """The lamp is old, but it is beautiful."""
        nouns = [noun for noun in NOUNS if noun.gender != "n" or noun not in PEOPLE]
        subject = self.noun_phrase(nouns, lexicon.KNOWN_DETERMINERS)
        tense = self.pick_tense()
        first, second = self.being(subject, tense), self.being(subject, tense)
        if first.english().split()[-1] == second.english().split()[-1]:
            return self.but()  # the same adjective, whatever its degree
        second = replace(second, subject=pronoun_for(subject) or subject)
        return replace(first, tail=Coordinate(lexicon.BUT, second))

    def so(self) -> Clause:
        """The boy was tired, so he slept in the garden."""
        frame = self.pick(EVENTS)
        first, second = self.mentions(frame)
        tense = self.pick((Tense.PAST, Tense.PROGRESSIVE))
        effect = at(self.clause(frame, subject=second), tense)
        cause = self.being(first, tense)
        return replace(cause, tail=Coordinate(lexicon.SO, effect, inverts=True))

    def both(self) -> Clause:
        """The dog is sleeping and the cat is playing."""
        tense = self.pick((Tense.PAST, Tense.PROGRESSIVE))
        first, second = (self.clause(self.pick(OF_PEOPLE), brief=True) for _ in range(2))
        return replace(at(first, tense), tail=Coordinate(lexicon.AND, at(second, tense)))

    def object_because(self) -> Clause:
        """I sold the lamp because it was broken: "it" has the gender of the German lamp."""
        frame = self.pick(lexicon.TRANSITIVE[2:])
        nouns = [noun for noun in frame.objects if noun.kind in ("thing", "vehicle", "reading")]
        if not nouns:
            return self.object_because()
        subject = self.subject(PEOPLE, known=True)
        thing = self.noun_phrase(nouns, lexicon.KNOWN_DETERMINERS, described=0.0)
        tense = self.pick((Tense.PAST, Tense.PROGRESSIVE))
        main = at(Clause(subject, frame.verb, object=thing), tense)
        reason = replace(self.being(thing, tense), subject=pronoun_for(thing) or thing)
        conjunction = self.pick((lexicon.BECAUSE, lexicon.ALTHOUGH))
        return replace(main, tail=Subordinate(conjunction, reason))

    # --- relative clauses ------------------------------------------------------------------------

    def relative_host(self, noun: Noun) -> NounPhrase:
        """What a relative clause is to tell more about."""
        determiners = (THE, THE, lexicon.THIS) if noun.mass else lexicon.RELATIVE_DETERMINERS
        return self.noun_phrase((noun,), determiners, described=0.25)

    def with_relative(self, phrase: NounPhrase, past: bool, but: Verb | None = None) -> NounPhrase:
        """Tell more about it: the phrase takes any part that it can have in another clause."""
        pronoun, noun = RelativePronoun(phrase), phrase.noun
        role = self.pick([role for role, frames in ROLES[noun].items() if frames])
        frame = self.pick(ROLES[noun][role])
        if frame.verb is but:
            return self.with_relative(phrase, past, but)
        subject = phrase if role == "subject" else None
        clause = self.clause(frame, subject=subject, known=True, brief=True)
        part: Nominal | Phrase = pronoun
        if role in ("goal", "place"):
            settings = frame.goals if role == "goal" else frame.places
            part = Phrase(self.pick(settings_of(noun, settings)), pronoun)
        clause = self.told(clause, timed=False, past=past)
        parts: dict[str, Any] = {role: part}
        return replace(phrase, relative=replace(clause, **parts))

    # --- one clause ------------------------------------------------------------------------------

    def clause(
        self,
        frame: Frame,
        subject: Nominal | None = None,
        known: bool = False,
        brief: bool = False,
    ) -> Clause:
        """Fill a frame; `brief` leaves out what can be left out."""
        subject = subject or self.subject(frame.subjects, known)
        parts: dict[str, Any] = {}
        if frame.objects:
            determiners = lexicon.DENIED_DETERMINERS if known else lexicon.OBJECT_DETERMINERS
            if frame.verb in lexicon.DETERMINERS_OF:
                determiners = lexicon.DETERMINERS_OF[frame.verb]
            parts["object"] = self.object(frame.objects, subject, determiners)
        if frame.recipients:
            known_ones = lexicon.KNOWN_DETERMINERS
            parts["recipient"] = self.object(frame.recipients, subject, known_ones)
        if frame.goals:
            parts["goal"] = self.phrase(frame.goals, subject)
        if frame.placed or (frame.places and not brief and self.chance(0.4)):
            parts["place"] = self.phrase(frame.places, subject)
        if frame.accompanied and not brief and self.chance(0.2):
            preposition = self.pick((lexicon.WITH, lexicon.WITH, lexicon.WITHOUT))
            companion = self.object(PEOPLE, subject, lexicon.KNOWN_DETERMINERS)
            parts["companion"] = Phrase(preposition, companion)
        return Clause(subject, frame.verb, **parts)

    def pick_tense(self) -> Tense:
        """Of what has no progressive."""
        return self.pick((Tense.PRESENT, Tense.PAST))

    def told(self, clause: Clause, timed: bool = True, past: bool | None = None) -> Clause:
        """Give the clause a tense or a modal, and perhaps a time that goes with it."""
        if past is None:
            past = self.chance(0.3)
        if self.chance(0.3) and not (past and clause.verb.is_state):
            clause, times = self.with_modal(clause, past)
        else:
            tense = self.pick((Tense.PRESENT, Tense.PROGRESSIVE))
            clause = at(clause, Tense.PAST if past else tense)
            times = lexicon.TIMES[clause.tense]
        is_settled = clause.verb.is_state or (clause.verb.is_instant and not past)
        if not timed or is_settled or self.chance(0.4):
            return clause
        times = [time for time in times if time.negatable or not clause.negative]
        return replace(clause, time=self.pick(times)) if times else clause

    def with_modal(self, clause: Clause, past: bool) -> tuple[Clause, Sequence[Adverb]]:
        """Add a modal that suits the subject, with the times that suit the modal."""
        if not past and can_gladly(clause) and self.chance(0.3):
            return replace(clause, modal=lexicon.LIKE_TO), lexicon.SEASONS
        if clause.verb.is_state and clause.verb not in lexicon.WISHED:
            return at(clause, Tense.PRESENT), ()
        is_alive = kind_of(clause.subject) in ("person", "animal")
        modals = lexicon.OF_THE_LIVING if is_alive else lexicon.OF_ALL
        if clause.verb in lexicon.WISHED:
            modals = lexicon.WISHES
        modal = self.pick([each for each in modals if each.past or not past])
        if modal is lexicon.MAY and clause.negative:
            modal = lexicon.CAN  # "may not" has two meanings
        tense, times = Tense.PRESENT, lexicon.FUTURE_TIMES
        if past:
            tense, times = Tense.PAST, lexicon.PAST_TIMES
        return replace(clause, modal=modal, tense=tense), times

    def open_with_time(self, clause: Clause) -> Clause:
        """Put the time first, now and then: German then moves the subject behind the verb."""
        can_open = clause.time and (not clause.time.frequent or clause.time is lexicon.SOMETIMES)
        return replace(clause, time_first=True) if can_open and self.chance(0.5) else clause

    # --- nominals --------------------------------------------------------------------------------

    def noun_phrase(
        self,
        choices: Sequence[Noun],
        determiners: Sequence[Determiner],
        singular: bool = False,
        described: float = 0.4,
    ) -> NounPhrase:
        """A determiner, perhaps an adjective or two, and one of the nouns."""
        noun = self.pick(choices)
        determiner = lexicon.fitting(self.pick(determiners), noun)
        adjectives = self.adjectives(noun) if self.chance(described) else ()
        may_be_plural = determiner.number == "any" and not singular and not noun.mass
        is_plural = determiner.number == "plural" or (may_be_plural and self.chance(0.25))
        return NounPhrase(determiner, noun, is_plural and not noun.mass, adjectives)

    def adjectives(self, noun: Noun) -> tuple[Adjective, ...]:
        """One that fits the noun, or one and a colour."""
        first = self.pick(lexicon.FITTING[noun.kind])
        if noun in lexicon.UNFITTING.get(first, ()):
            return self.adjectives(noun)
        takes_colour = noun.kind in ("thing", "vehicle") and first not in lexicon.COLOURS
        if takes_colour and self.chance(0.2):
            return first, self.pick(lexicon.COLOURS)
        return (first,)

    def subject(self, choices: Sequence[Noun], known: bool = False) -> Nominal:
        """Who does it; somebody known already, if it is to be asked or denied."""
        determiners = lexicon.KNOWN_DETERMINERS if known else lexicon.SUBJECT_DETERMINERS
        if choices[0] in PEOPLE and self.chance(0.3):
            return self.pick(NAMES) if self.chance(0.25) else self.pick(PRONOUNS)
        first = self.noun_phrase(choices, determiners)
        if first.determiner is THE and self.chance(0.08):
            others = [
                noun for noun in choices if noun.kind == first.noun.kind and noun != first.noun
            ]
            if others:
                return Both(first, self.noun_phrase(others, (THE,), singular=True, described=0.2))
        return first

    def object(
        self, choices: Sequence[Noun], subject: Nominal, determiners: Sequence[Determiner]
    ) -> Nominal:
        """Whom or what it is done to; not the subject itself."""
        if choices[0] in PEOPLE and self.chance(0.3):
            return self.pick([each for each in (*PRONOUNS, *NAMES) if differ(each, subject)])
        others = without(choices, subject)
        return self.noun_phrase(others or choices, determiners)

    def phrase(self, settings: Sequence[Setting], subject: Nominal) -> Phrase:
        """A place or a prepositional object."""
        preposition, choices = self.pick(settings)
        if choices[0] in PEOPLE:
            return Phrase(preposition, self.object(choices, subject, lexicon.KNOWN_DETERMINERS))
        others = without(choices, subject)
        nominal = self.noun_phrase(
            others or choices, lexicon.PLACE_DETERMINERS, singular=True, described=0.3
        )
        return Phrase(preposition, nominal)


def at(clause: Clause, tense: Tense) -> Clause:
    """The clause in this tense, or the one nearest to it that English has for its verb.

    "They read" and "they put" could be present or past; the progressive is in no doubt.
    """
    verb = clause.verb
    if tense is Tense.PROGRESSIVE and (verb.is_state or verb.is_instant):
        tense = Tense.PRESENT
    is_third = clause.subject.person is Person.THIRD
    if tense is Tense.PRESENT and verb.past == verb.base and not is_third:
        tense = Tense.PROGRESSIVE
    return replace(clause, tense=tense)


def kind_of(nominal: Nominal) -> str:
    """What kind of thing it is; "it" is an animal here, other pronouns and names are persons."""
    if isinstance(nominal, Both):
        return kind_of(nominal.first)
    if isinstance(nominal, NounPhrase):
        return nominal.noun.kind
    return "animal" if nominal.english(Case.NOMINATIVE) == "it" else "person"


def plain(nominal: Nominal) -> Nominal:
    """The nominal without its adjectives, or the small bear might be big."""
    if isinstance(nominal, Both):
        return Both(plain(nominal.first), plain(nominal.second))
    return replace(nominal, adjectives=()) if isinstance(nominal, NounPhrase) else nominal


def nouns_of(nominal: Nominal) -> tuple[Noun, ...]:
    """The nouns in it."""
    if isinstance(nominal, Both):
        return nouns_of(nominal.first) + nouns_of(nominal.second)
    return (nominal.noun,) if isinstance(nominal, NounPhrase) else ()


def without(choices: Sequence[Noun], nominal: Nominal) -> list[Noun]:
    """The nouns that are not in the nominal."""
    used = nouns_of(nominal)
    return [noun for noun in choices if noun not in used]


def differ(one: Nominal, other: Nominal) -> bool:
    """Whether they are not the same person, so that neither language wants a reflexive."""
    both = {one, other}
    return len(both) == 2 and both != {ME, US}


def can_gladly(clause: Clause) -> bool:
    """Whether "likes to" and gern suit the clause."""
    is_open = clause.object is None or (
        isinstance(clause.object, NounPhrase) and clause.object.determiner is BARE
    )
    return is_open and clause.verb.is_fun


def count_words(text: str) -> int:
    """Words between spaces."""
    return len(text.split())


def stumbles(english: str) -> bool:
    """Whether a noun comes twice, or any word twice in a row: we gave her her book."""
    words = english.lower().rstrip(".?").replace(",", "").split()
    nouns = [SINGULARS[word] for word in words if word in SINGULARS]
    is_doubled = any(word == following for word, following in pairwise(words))
    return is_doubled or len(nouns) != len(set(nouns))
