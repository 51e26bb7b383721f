"""The demo's grammar against German written by hand, and its corpus against its promises."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))

# E402: these are found by the path that was just set.
import grammar as g  # noqa: E402
import lexicon as lex  # noqa: E402
import make_corpus  # noqa: E402
from author import Author  # noqa: E402
from grammar import Clause, NounPhrase, Phrase, Predicate, RelativePronoun  # noqa: E402
from morphology import BARE, THE, A, Case, Tense  # noqa: E402

SHA_OF_FIRST_1000 = "5958ea9ad80ae35e184254a1497b7a7194c74fa03c7812dfbbab49988029b00b"
SHA_OF_CORPUS = "717acca92ef91e4e1f5ea788220b412172ceb6e5cfd4e2535fbc07431c9e26a0"

MY, YOUR, HIS, HER, OUR, THEIR = lex.POSSESSIVES
MANY, SOME, TWO, THREE = lex.QUANTITIES
ANNA, LENA = g.Name("Anna", "f"), g.Name("Lena", "f")
YESTERDAY, TODAY, TOMORROW = lex.PAST_TIMES[0], lex.PRESENT_TIMES[1], lex.FUTURE_TIMES[0]
EVERY_DAY = lex.HABITS[2]
PAST, NOW = Tense.PAST, Tense.PROGRESSIVE


def phrase(determiner, *words, plural=False):
    """A noun phrase from English words: adjectives, then a singular noun."""
    *adjectives, noun = words
    plural = plural or determiner.number == "plural"
    noun = lex.NOUNS[noun]
    return NounPhrase(
        determiner, noun, plural and not noun.mass, lex.adjectives(" ".join(adjectives))
    )


def the(*words, plural=False):
    return phrase(THE, *words, plural=plural)


def clause(subject, verb, object=None, **parts):
    return Clause(subject, lex.VERBS.get(verb, lex.BE), object, **parts)


def being(subject, adjective, **parts):
    return Clause(subject, lex.BE, goal=Predicate(lex.ADJECTIVES[adjective]), **parts)


def at(preposition, *words, determiner=THE):
    return Phrase(preposition, phrase(determiner, *words))


def told_by(antecedent, make_clause):
    """The antecedent with the relative clause that `make_clause` makes of its pronoun."""
    return replace(antecedent, relative=make_clause(RelativePronoun(antecedent)))


def nominative_accusative_dative(nominal):
    return [nominal.german(case) for case in Case]


@pytest.mark.parametrize(
    ("nominal", "expected"),
    [
        (the("old", "man"), "der alte Mann | den alten Mann | dem alten Mann"),
        (the("old", "woman"), "die alte Frau | die alte Frau | der alten Frau"),
        (the("small", "child"), "das kleine Kind | das kleine Kind | dem kleinen Kind"),
        (
            the("small", "child", plural=True),
            "die kleinen Kinder | die kleinen Kinder | den kleinen Kindern",
        ),
        (phrase(A, "old", "man"), "ein alter Mann | einen alten Mann | einem alten Mann"),
        (phrase(A, "old", "woman"), "eine alte Frau | eine alte Frau | einer alten Frau"),
        (phrase(A, "small", "child"), "ein kleines Kind | ein kleines Kind | einem kleinen Kind"),
        (
            phrase(OUR, "big", "dog"),
            "unser großer Hund | unseren großen Hund | unserem großen Hund",
        ),
        (
            phrase(HER, "expensive", "car", plural=True),
            "ihre teuren Autos | ihre teuren Autos | ihren teuren Autos",
        ),
        (
            phrase(lex.THIS, "dark", "house"),
            "dieses dunkle Haus | dieses dunkle Haus | diesem dunklen Haus",
        ),
        (
            phrase(lex.EVERY, "tired", "boy"),
            "jeder müde Junge | jeden müden Jungen | jedem müden Jungen",
        ),
        (
            phrase(lex.ALL, "new", "book"),
            "alle neuen Bücher | alle neuen Bücher | allen neuen Büchern",
        ),
        (phrase(MANY, "old", "tree"), "viele alte Bäume | viele alte Bäume | vielen alten Bäumen"),
        (
            phrase(TWO, "black", "cat"),
            "zwei schwarze Katzen | zwei schwarze Katzen | zwei schwarzen Katzen",
        ),
        (phrase(BARE, "fresh", "bread"), "frisches Brot | frisches Brot | frischem Brot"),
        (phrase(BARE, "cold", "milk"), "kalte Milch | kalte Milch | kalter Milch"),
        (phrase(BARE, "warm", "tea"), "warmer Tee | warmen Tee | warmem Tee"),
        (
            phrase(A, "small", "red", "bag"),
            "eine kleine rote Tasche | eine kleine rote Tasche | einer kleinen roten Tasche",
        ),
        (the("bear"), "der Bär | den Bären | dem Bären"),
        (g.THEM, "sie | sie | ihnen"),
        (g.pronoun_for(the("lamp")), "sie | sie | ihr"),
        (g.pronoun_for(the("dog")), "er | ihn | ihm"),
        (RelativePronoun(the("child", plural=True)), "die | die | denen"),
        (g.WHO, "wer | wen | wem"),
    ],
)
def test_declension(nominal, expected):
    assert nominative_accusative_dative(nominal) == expected.split(" | ")


def test_the_pronoun_of_a_girl_is_avoided():
    assert g.pronoun_for(the("girl")) is None


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("sleep", "schlafe schläfst schläft schlafen schlafen"),
        ("read", "lese liest liest lesen lesen"),
        ("eat", "esse isst isst essen essen"),
        ("work", "arbeite arbeitest arbeitet arbeiten arbeiten"),
        ("dance", "tanze tanzt tanzt tanzen tanzen"),
        ("invite", "lade lädst lädt laden laden"),
        ("give", "gebe gibst gibt geben geben"),
        ("wash", "wasche wäschst wäscht waschen waschen"),
        ("have", "habe hast hat haben haben"),
    ],
)
def test_conjugation(verb, expected):
    assert [lex.VERBS[verb].present(person) for person in g.Person] == expected.split()


# Each German sentence below was written by hand.
GOLDEN_STATEMENTS = {
    "accusative": (
        clause(the("old", "king"), "buy", phrase(A, "small", "boat"), tense=NOW),
        "The old king is buying a small boat.",
        "Der alte König kauft ein kleines Boot.",
    ),
    "dative verb": (
        clause(the("girl", plural=True), "help", phrase(HIS, "old", "grandfather")),
        "The girls help his old grandfather.",
        "Die Mädchen helfen seinem alten Großvater.",
    ),
    "dative before accusative": (
        clause(
            phrase(OUR, "teacher"),
            "give",
            phrase(A, "new", "book"),
            recipient=the("boy"),
            tense=PAST,
        ),
        "Our teacher gave the boy a new book.",
        "Unsere Lehrerin hat dem Jungen ein neues Buch gegeben.",
    ),
    "definite before indefinite": (
        clause(g.HER, "show", the("garden"), recipient=phrase(A, "guest")),
        "She shows a guest the garden.",
        "Sie zeigt den Garten einem Gast.",
    ),
    "pronouns before adverbs": (
        clause(ANNA, "call", g.HIM, time=YESTERDAY, tense=PAST),
        "Anna called him yesterday.",
        "Anna hat ihn gestern angerufen.",
    ),
    "English particle around a pronoun": (
        clause(g.US, "pick up", g.THEM, tense=NOW),
        "We are picking them up.",
        "Wir holen sie ab.",
    ),
    "where: dative": (
        clause(the("cat", plural=True), "sleep", place=at(lex.IN, "garden"), tense=NOW),
        "The cats are sleeping in the garden.",
        "Die Katzen schlafen im Garten.",
    ),
    "where to: accusative": (
        clause(the("cat"), "run", goal=at(lex.INTO, "dark", "forest"), tense=PAST),
        "The cat ran into the dark forest.",
        "Die Katze ist in den dunklen Wald gelaufen.",
    ),
    "lying and laying": (
        clause(g.HIM, "put", the("letter"), goal=at(lex.PUT_ON, "table"), tense=PAST),
        "He put the letter on the table.",
        "Er hat den Brief auf den Tisch gelegt.",
    ),
    "contraction with zu": (
        clause(phrase(MY, "sister"), "drive", goal=at(lex.TO, "school"), time=EVERY_DAY),
        "My sister drives to the school every day.",
        "Meine Schwester fährt jeden Tag zur Schule.",
    ),
    "contraction with von": (
        clause(the("farmer"), "come", goal=at(lex.FROM, "market"), tense=NOW),
        "The farmer is coming from the market.",
        "Der Bauer kommt vom Markt.",
    ),
    "accusative preposition": (
        clause(g.ME, "dance", companion=Phrase(lex.WITHOUT, g.HIM), tense=PAST),
        "I danced without him.",
        "Ich habe ohne ihn getanzt.",
    ),
    "company before destination": (
        clause(
            the("student"),
            "go",
            goal=at(lex.INTO, "town"),
            companion=Phrase(lex.WITH, phrase(HIS, "friend", plural=True)),
            tense=NOW,
        ),
        "The student is going into the town with his friends.",
        "Der Student geht mit seinen Freunden in die Stadt.",
    ),
    "prepositional object": (
        clause(g.YOU, "wait", goal=Phrase(lex.WAIT_FOR, the("train"))),
        "You wait for the train.",
        "Du wartest auf den Zug.",
    ),
    "place before an indefinite object": (
        clause(the("bear"), "find", phrase(A, "cat"), place=at(lex.IN, "kitchen"), tense=PAST),
        "The bear found a cat in the kitchen.",
        "Der Bär hat in der Küche eine Katze gefunden.",
    ),
    "place after a definite object": (
        clause(the("bear"), "find", the("cat"), place=at(lex.IN, "kitchen"), tense=PAST),
        "The bear found the cat in the kitchen.",
        "Der Bär hat die Katze in der Küche gefunden.",
    ),
    "experiencer": (
        clause(phrase(THEIR, "neighbour"), "like", the("picture", plural=True)),
        "Their neighbour likes the pictures.",
        "Ihrem Nachbarn gefallen die Bilder.",
    ),
    "gern": (
        clause(the("duck"), "swim", place=at(lex.IN, "lake"), modal=lex.LIKE_TO),
        "The duck likes to swim in the lake.",
        "Die Ente schwimmt gern im See.",
    ),
    "modal": (
        clause(the("child"), "read", phrase(A, "long", "letter"), modal=lex.CAN),
        "The child can read a long letter.",
        "Das Kind kann einen langen Brief lesen.",
    ),
    "modal in the past": (
        clause(g.THEM, "help", g.US, modal=lex.WANT, time=YESTERDAY, tense=PAST),
        "They wanted to help us yesterday.",
        "Sie wollten uns gestern helfen.",
    ),
    "must not": (
        clause(g.YOU, "open", the("box"), modal=lex.MUST, negative=True),
        "You must not open the box.",
        "Du darfst die Kiste nicht aufmachen.",
    ),
    "do not have to": (
        clause(g.YOU, "open", the("box"), modal=lex.HAVE_TO, negative=True),
        "You do not have to open the box.",
        "Du musst die Kiste nicht aufmachen.",
    ),
    "separable prefix at the end": (
        clause(the("painter"), "take along", phrase(HER, "umbrella"), time=TODAY, tense=NOW),
        "The painter is taking along her umbrella today.",
        "Die Malerin nimmt heute ihren Regenschirm mit.",
    ),
    "inversion after a time": (
        clause(
            the("baker"), "sell", phrase(TWO, "chair"), time=YESTERDAY, time_first=True, tense=PAST
        ),
        "Yesterday the baker sold two chairs.",
        "Gestern hat der Bäcker zwei Stühle verkauft.",
    ),
    "future": (
        clause(LENA, "get up", time=TOMORROW, time_first=True, modal=lex.WILL, negative=True),
        "Tomorrow Lena will not get up.",
        "Morgen wird Lena nicht aufstehen.",
    ),
    "nicht before the place": (
        clause(the("dog"), "sleep", place=at(lex.IN, "house"), tense=NOW, negative=True),
        "The dog is not sleeping in the house.",
        "Der Hund schläft nicht im Haus.",
    ),
    "kein": (
        clause(the("woman"), "have", phrase(A, "old", "umbrella"), negative=True),
        "The woman does not have an old umbrella.",
        "Die Frau hat keinen alten Regenschirm.",
    ),
    "kein in the plural": (
        clause(g.ME, "buy", phrase(BARE, "fresh", "egg"), tense=PAST, negative=True),
        "I did not buy fresh eggs.",
        "Ich habe keine frischen Eier gekauft.",
    ),
    "to be": (
        being(the("picture", plural=True), "heavy", tense=PAST),
        "The pictures were heavy.",
        "Die Bilder waren schwer.",
    ),
    "comparison": (
        Clause(
            the("fox"),
            lex.BE,
            goal=Predicate(lex.ADJECTIVES["clever"], than=phrase(YOUR, "big", "dog")),
        ),
        "The fox is cleverer than your big dog.",
        "Der Fuchs ist klüger als dein großer Hund.",
    ),
    "two subjects": (
        clause(g.Both(the("king"), the("queen")), "laugh", tense=NOW),
        "The king and the queen are laughing.",
        "Der König und die Königin lachen.",
    ),
    "dass, verb last": (
        Clause(
            the("boy"),
            lex.SAY,
            tense=PAST,
            tail=g.Subordinate(
                lex.THAT, clause(the("train"), "arrive", place=at(lex.AT, "station"), tense=PAST)
            ),
        ),
        "The boy said that the train arrived at the station.",
        "Der Junge hat gesagt, dass der Zug am Bahnhof angekommen ist.",
    ),
    "ob, modal last": (
        Clause(
            g.THEM,
            lex.KNOW,
            negative=True,
            tail=g.Subordinate(lex.WHETHER, clause(the("child"), "swim", modal=lex.CAN)),
        ),
        "They do not know whether the child can swim.",
        "Sie wissen nicht, ob das Kind schwimmen kann.",
    ),
    "weil, prefix rejoined": (
        clause(
            the("man"),
            "laugh",
            tense=NOW,
            tail=g.Subordinate(lex.BECAUSE, clause(the("dog"), "fall asleep", tense=NOW)),
        ),
        "The man is laughing because the dog is falling asleep.",
        "Der Mann lacht, weil der Hund einschläft.",
    ),
    "obwohl first, then the verb": (
        clause(
            g.HER,
            "clean up",
            the("kitchen"),
            tense=PAST,
            lead=g.Subordinate(lex.ALTHOUGH, being(the("woman"), "tired", tense=PAST)),
        ),
        "Although the woman was tired, she cleaned up the kitchen.",
        "Obwohl die Frau müde war, hat sie die Küche aufgeräumt.",
    ),
    "wenn": (
        clause(
            g.US,
            "play",
            place=at(lex.IN, "room"),
            modal=lex.WILL,
            lead=g.Subordinate(lex.IF, clause(g.IT, "rain")),
        ),
        "If it rains, we will play in the room.",
        "Wenn es regnet, werden wir im Zimmer spielen.",
    ),
    "it has the gender of its noun": (
        clause(
            g.ME,
            "sell",
            the("lamp"),
            tense=PAST,
            tail=g.Subordinate(
                lex.BECAUSE, being(g.pronoun_for(the("lamp")), "broken", tense=PAST)
            ),
        ),
        "I sold the lamp because it was broken.",
        "Ich habe die Lampe verkauft, weil sie kaputt war.",
    ),
    "aber": (
        replace(
            being(the("coat"), "old"),
            tail=g.Coordinate(lex.BUT, being(g.pronoun_for(the("coat")), "beautiful")),
        ),
        "The coat is old, but it is beautiful.",
        "Der Mantel ist alt, aber er ist schön.",
    ),
    "deshalb, then the verb": (
        replace(
            being(the("queen"), "hungry", tense=PAST),
            tail=g.Coordinate(
                lex.SO, clause(g.HER, "eat", phrase(BARE, "bread"), tense=PAST), inverts=True
            ),
        ),
        "The queen was hungry, so she ate bread.",
        "Die Königin war hungrig, deshalb hat sie Brot gegessen.",
    ),
    "relative clause, nominative": (
        being(
            told_by(the("farmer"), lambda who: clause(who, "sell", the("horse"), tense=PAST)),
            "happy",
        ),
        "The farmer who sold the horse is happy.",
        "Der Bauer, der das Pferd verkauft hat, ist glücklich.",
    ),
    "relative clause, accusative": (
        being(told_by(the("hat"), lambda that: clause(ANNA, "look for", that, tense=NOW)), "blue"),
        "The hat that Anna is looking for is blue.",
        "Der Hut, den Anna sucht, ist blau.",
    ),
    "relative clause, dative plural": (
        clause(
            told_by(
                the("child", plural=True),
                lambda whom: clause(the("doctor"), "help", whom, tense=PAST),
            ),
            "sing",
            tense=NOW,
        ),
        "The children whom the doctor helped are singing.",
        "Die Kinder, denen der Arzt geholfen hat, singen.",
    ),
    "relative clause with a preposition": (
        being(
            told_by(
                the("castle"),
                lambda which: clause(the("king"), "live", place=Phrase(lex.IN, which)),
            ),
            "dark",
        ),
        "The castle in which the king lives is dark.",
        "Das Schloss, in dem der König wohnt, ist dunkel.",
    ),
    "relative clause of an experiencer": (
        clause(
            told_by(the("guest"), lambda who: clause(who, "like", the("soup"))), "sit", tense=NOW
        ),
        "The guest who likes the soup is sitting.",
        "Der Gast, dem die Suppe gefällt, sitzt.",
    ),
    "relative clause waits for the participle": (
        clause(
            g.ME,
            "read",
            told_by(the("letter"), lambda that: clause(g.YOU, "write", that, tense=PAST)),
            tense=PAST,
        ),
        "I read the letter that you wrote.",
        "Ich habe den Brief gelesen, den du geschrieben hast.",
    ),
    "infinitive with zu": (
        Clause(
            LENA,
            lex.FORGET,
            tense=PAST,
            tail=g.Infinitive(clause(LENA, "bring along", the("cake"))),
        ),
        "Lena forgot to bring along the cake.",
        "Lena hat vergessen, den Kuchen mitzubringen.",
    ),
    "um ... zu": (
        clause(
            g.HIM,
            "go",
            goal=at(lex.TO, "market"),
            tense=NOW,
            tail=g.Infinitive(clause(g.HIM, "buy", phrase(A, "hat")), purpose=True),
        ),
        "He is going to the market to buy a hat.",
        "Er geht zum Markt, um einen Hut zu kaufen.",
    ),
}

GOLDEN_QUESTIONS = {
    "yes or no": (
        clause(the("teacher"), "have", phrase(A, "bicycle")),
        "Does the teacher have a bicycle?",
        "Hat die Lehrerin ein Fahrrad?",
    ),
    "yes or no, perfect": (
        clause(g.YOU, "see", the("bear"), time=YESTERDAY, tense=PAST),
        "Did you see the bear yesterday?",
        "Hast du gestern den Bären gesehen?",
    ),
    "yes or no, separable": (
        clause(the("train"), "leave", tense=NOW),
        "Is the train leaving?",
        "Fährt der Zug ab?",
    ),
    "who": (
        clause(g.WHO, "repair", the("clock"), tense=PAST),
        "Who repaired the clock?",
        "Wer hat die Uhr repariert?",
    ),
    "whom, dative": (
        clause(the("student"), "thank", g.WHO),
        "Whom does the student thank?",
        "Wem dankt der Student?",
    ),
    "whom, accusative": (
        clause(the("student"), "invite", g.WHO, modal=lex.WANT),
        "Whom does the student want to invite?",
        "Wen will der Student einladen?",
    ),
    "for whom": (
        clause(g.HER, "wait", goal=Phrase(lex.WAIT_FOR, g.WHO), tense=NOW),
        "For whom is she waiting?",
        "Auf wen wartet sie?",
    ),
    "to whom": (
        clause(the("man"), "send", the("letter"), recipient=g.WHO, tense=PAST),
        "To whom did the man send the letter?",
        "Wem hat der Mann den Brief geschickt?",
    ),
    "what, experiencer": (
        clause(the("queen"), "like", g.WHAT),
        "What does the queen like?",
        "Was gefällt der Königin?",
    ),
    "why": (
        clause(the("girl"), "laugh", time=lex.WHY, time_first=True, tense=NOW),
        "Why is the girl laughing?",
        "Warum lacht das Mädchen?",
    ),
    "where to": (
        clause(the("cat", plural=True), "run", time=lex.WHERE_TO, time_first=True, tense=PAST),
        "Where did the cats run?",
        "Wohin sind die Katzen gelaufen?",
    ),
}


@pytest.mark.parametrize("phenomenon", GOLDEN_STATEMENTS)
def test_statement(phenomenon):
    built, english, german = GOLDEN_STATEMENTS[phenomenon]
    assert g.statement(built) == (english, german)


@pytest.mark.parametrize("phenomenon", GOLDEN_QUESTIONS)
def test_question(phenomenon):
    built, english, german = GOLDEN_QUESTIONS[phenomenon]
    assert g.question(built) == (english, german)


def sha_of(pairs):
    """SHA-256 of the pairs as lines."""
    return hashlib.sha256("".join(f"{en}\t{de}\n" for en, de in pairs).encode()).hexdigest()


def test_first_sentences_are_the_same_everywhere():
    assert sha_of(islice(make_corpus.distinct_pairs(seed=1), 1000)) == SHA_OF_FIRST_1000


def test_another_seed_writes_other_sentences():
    one, other = (list(islice(make_corpus.distinct_pairs(seed), 50)) for seed in (1, 2))
    assert not set(one) & set(other)


def test_sentences_look_like_sentences():
    for english, german in islice(make_corpus.distinct_pairs(seed=3), 1000):
        for text in (english, german):
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert "  " not in text
            assert " ," not in text
            assert ",," not in text
        assert (english[-1] == "?") == (german[-1] == "?")
        assert 5 <= len(english.split()) <= 16
        assert 2 <= len(german.split()) <= 16


@pytest.mark.slow
def test_an_english_sentence_has_one_translation():
    translation = {}
    for seed in range(4):
        author = Author(seed)
        for _ in range(8000):
            english, german = author.write()
            assert translation.setdefault(english, german) == german, english


@pytest.mark.slow
def test_the_command_writes_the_corpus(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-X", "utf8", str(DEMO / "make_corpus.py"), "--out", str(out)]
    report = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "40,000 train" in report.stdout
    assert report.stdout.count("\n") == 1

    digest = hashlib.sha256()
    lines = {}
    for split in ("train", "validation", "test"):
        for language in ("en", "de"):
            content = (out / f"{split}.{language}").read_bytes()
            digest.update(content)
            assert b"\r" not in content
            lines[split, language] = content.decode().removesuffix("\n").split("\n")
    counts = {split: len(lines[split, "en"]) for split in ("train", "validation", "test")}
    assert counts == {"train": 40_000, "validation": 200, "test": 500}
    for language in ("en", "de"):
        together = [
            line for split in counts for line in lines[split, language]
        ]  # no sentence twice, so none in two splits
        assert len(together) == len(set(together)) == 40_700
    assert digest.hexdigest() == SHA_OF_CORPUS
