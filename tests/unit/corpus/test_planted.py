"""Truth sets made here: what is planted is found, and nothing else is touched."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from word_patterns import WORD

from luban.core.errors import ConfigError, DataError
from luban.corpus.build import build_corpus
from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.reader import read_corpus
from luban.corpus.steps import language, make_step
from luban.corpus.steps.across import AcrossStep
from luban.corpus.steps.contamination import GRAM, SHORTEST, WINDOW
from luban.corpus.steps.language import Language, identify
from luban.corpus.steps.unicode import repair
from luban.corpus.tally import Tally

RNG = random.Random(11)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(3, 9))) for _ in range(4000)]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def run(spec: str, texts: list[str]) -> tuple[dict[int, list[str]], Tally]:
    """What a step leaves of each text, by the text's number."""
    tally, left = Tally(), {}
    documents = [Document(id=str(i), text=t, source="s") for i, t in enumerate(texts)]
    for document in make_step(spec)(documents, tally):
        left.setdefault(int(document.id.split("~")[0]), []).append(document.text)
    return left, tally


@pytest.mark.parametrize("spec", ["exact", "minhash", "bloom", "overlap", "lines", "spans"])
def test_a_decision_over_several_shards_is_that_over_one(spec):
    rng = random.Random(2)
    texts = [text(rng, 150).replace(" a", "\na") for _ in range(40)]
    texts += [rng.choice(texts[:40]) if rng.random() < 0.5 else text(rng, 150) for _ in range(40)]
    rng.shuffle(texts)
    step = make_step(spec)
    assert isinstance(step, AcrossStep)
    prints = [step.fingerprint(Document(id=str(i), text=t, source="s")) for i, t in enumerate(texts)]
    whole = [flags.tolist() for flags in next(step.decide([Ragged.of(prints, np.uint64)]))]
    shards = [Ragged.of(prints[a:b], np.uint64) for a, b in ((0, 13), (13, 13), (13, 60), (60, 80))]
    assert [flags.tolist() for shard in step.decide(shards) for flags in shard] == whole
    assert any(map(any, whole)) and not all(map(all, whole))


def test_lines_that_repeat_are_cut_and_first_ones_stay():
    rng = random.Random(3)
    menu = "Home | Products | About us | Contact and imprint"
    pages = [f"{menu}\n{text(rng, 30)}\nok\n{text(rng, 30)}" for _ in range(30)]
    left, tally = run("lines", [*pages, f"  {menu.upper()} "])
    assert left[0] == [pages[0]]
    assert all(left[i] == [pages[i].removeprefix(menu + "\n")] for i in range(1, 30))  # "ok" is too short to judge
    assert 30 not in left and tally.dropped["lines"]["documents"] == 1
    assert tally.counts["repeated_lines_removed"] == 30


def test_bloom_drops_what_four_fifths_repeats_wherever_it_comes_from():
    rng = random.Random(4)
    originals = [text(rng, 400) for _ in range(120)]
    patched = [
        " ".join(o for original in rng.sample(originals, 4) for o in [" ".join(original.split()[:120])])
        for _ in range(40)
    ]
    fresh = [text(rng, 400) for _ in range(120)]
    halves = [" ".join(originals[i].split()[:200]) + " " + text(rng, 200) for i in range(40)]
    left, _ = run("bloom", [*originals, *patched, *fresh, *halves])
    assert sorted(left) == [*range(120), *range(160, 320)]


@pytest.mark.parametrize("share, found", [(0.97, True), (0.95, True), (0.8, False), (0.5, False)])
def test_overlap_finds_a_text_inside_a_longer_one(share, found):
    rng = random.Random(5)
    books = [text(rng, 3000) for _ in range(12)]
    parts = [
        " ".join(book.split()[500 : 500 + int(1500 * share)]) + " " + text(rng, 1500 - int(1500 * share))
        for book in books
    ]
    left, _ = run("overlap", [*books, *parts])
    assert sorted(left) == list(range(12)) + ([] if found else list(range(12, 24)))


@pytest.fixture
def sets(tmp_path):
    """Evaluation sets as JSON lines and text, and their texts."""
    rng = random.Random(6)
    items = [text(rng, 40) for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"q": {"text": t}, "n": [3]}) + "\n" for t in items[:50]))
    (tmp_path / "b.txt").write_text("\n".join(items[50:]))
    return f"contamination={tmp_path / 'a.jsonl'}+{tmp_path / 'b.txt'}", items


def test_every_planted_leak_is_cut_and_clean_documents_stay(sets):
    spec, items = sets
    rng = random.Random(7)
    clean = [text(rng, 300) for _ in range(2000)]
    leaky = []
    for item in items:
        found = item.split()
        start = rng.randrange(len(found) - GRAM + 1)
        leak = ", ".join(found[start : start + GRAM]).upper() + "!"  # punctuation and case hide nothing
        leaky.append((text(rng, 150), leak, text(rng, 150)))
    left, tally = run(spec, [*clean, *(" ".join(parts) for parts in leaky)])
    assert sum(left.get(i) != [t] for i, t in enumerate(clean)) == 0  # the bound asked for is 0.1%
    for i, (before, leak, after) in enumerate(leaky, len(clean)):
        assert left[i] == [(before + " ")[:-WINDOW], ("! " + after)[WINDOW:]]
        assert " ".join(leak.lower().rstrip("!").split(", ")) not in " ".join(WORD.findall(" ".join(left[i]).lower()))
    assert tally.counts["contaminated_documents_cut"] == 60


def test_contamination_rules_of_length_pieces_and_common_phrases(sets):
    spec, items = sets
    rng = random.Random(8)
    filler = text(rng, 120)
    assert len(filler) > 2 * WINDOW + SHORTEST
    ten = f" {items[0]} ".join([text(rng, 120) for _ in range(10)])
    eleven = f" {items[1]} ".join([text(rng, 120) for _ in range(11)])
    short = "x" * (WINDOW + SHORTEST - 2) + " " + items[2]
    enough = "x" * (WINDOW + SHORTEST - 1) + " " + items[3]
    common = [f"{text(rng, 150)} {items[4]} {text(rng, 150)}" for _ in range(11)]
    rarer = [f"{text(rng, 150)} {items[5]} {text(rng, 150)}" for _ in range(10)]
    left, tally = run(spec, [ten, eleven, short, enough, *common, *rarer])
    assert len(left[0]) == 10 and 1 not in left and 2 not in left and left[3] == ["x" * SHORTEST]
    assert all(left[4 + i] == [t] for i, t in enumerate(common))
    assert all(len(left[15 + i]) == 2 for i in range(10))
    assert tally.dropped["contamination: many pieces"]["documents"] == 1
    assert tally.dropped["contamination: nothing left"]["documents"] == 1


def test_contamination_in_a_build_is_part_of_the_identity(sets, tmp_path):
    spec, items = sets
    rng = random.Random(9)
    rows = [
        {"text": text(rng, 200)},
        {"text": text(rng, 200) + " " + items[7] + " " + text(rng, 200)},
        {"messages": [{"role": "user", "content": items[8]}, {"role": "assistant", "content": "yes"}]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.0, steps=[spec])
    assert [d.id.partition("~")[2] for d in read_corpus(tmp_path / "c")] == ["", "0", "1"]
    config = json.loads((tmp_path / "c" / "manifest.json").read_text())["config"]
    assert str(tmp_path) not in json.dumps(config) and len(config["steps"][0]["sets"]) == 2
    for wrong, error in (
        ("contamination", ConfigError),
        ("contamination=", ConfigError),
        ("contamination=none.jsonl", DataError),
        ("exact=1", ConfigError),
    ):
        with pytest.raises(error):
            make_step(wrong)


def test_planted_mojibake_is_repaired_and_sound_text_stays():
    sound = [
        "naïve café, déjà vu — “quoted” … 5 €",
        "Größe und Übermaß",
        "你好，世界。全角：ＡＢＣ",
        "привет мир",
        "ﬁne ligature",
        "a &amp; b <br>",
        "plain ASCII text",
        "emoji 🎉 stays",
    ]
    broken = [t.encode().decode("windows-1252") for t in ("Größe und Übermaß", "l’été déjà là", "señor mañana – sí")]
    assert [repair(t) for t in sound] == sound
    assert [repair(t) for t in broken] == ["Größe und Übermaß", "l’été déjà là", "señor mañana – sí"]
    left, tally = run("unicode", [*sound, *broken])
    assert len(left) == 11 and tally.counts["documents_repaired"] == 3


@pytest.mark.parametrize(
    "spec, given, wanted",
    [
        ("normalise", "e\u0301\u200b\x07 “x”", "é “x”"),
        ("normalise=quotes+dashes", "“a” ‘b’ «c» — –", '"a" \'b\' "c" - -'),
        ("normalise=halfwidth", "ＡＢＣ１２３！　x", "ABC123! x"),
        ("normalise=punctuation", "你好，世界。", "你好,世界."),
        ("normalise=lower+spaces", "A \t B  \n\n\n\nC", "a b\n\nc"),
        ("normalise=nfkc", "ﬁ ① ｶ", "fi 1 カ"),
        ("chinese=t2s", "漢語與頭髮，發現", "汉语与头发，发现"),
        ("chinese=s2t", "汉语", "漢語"),
    ],
)
def test_rewriting_by_policy(spec, given, wanted):
    left, _ = run(spec, [given, "unchanged text"])
    assert left == {0: [wanted], 1: ["unchanged text"]}
    document = Document(id="m", text="", source="s", messages=[{"role": "user", "content": given}])
    (found,) = make_step(spec)([document], Tally())
    assert found.messages == [{"role": "user", "content": wanted}] and found.text == wanted


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'quotes'"):
        make_step("normalise=quote")
    with pytest.raises(ConfigError, match="unknown Chinese conversion"):
        make_step("chinese=xx")
    with pytest.raises(ConfigError, match="needs an argument"):
        make_step("chinese")


def test_spaces_around_names_of_steps_do_not_matter(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one two"}\n' * 2)
    configs = []
    for number, steps in enumerate(
        (["exact", "language=en+de", "minhash"], [" exact", "language = en+de ", "\tminhash"])
    ):
        figures = build_corpus([str(tmp_path / "in.jsonl")], tmp_path / str(number), heldout=0.0, steps=steps[::2])
        configs.append(
            [json.loads((tmp_path / str(number) / "manifest.json").read_text())["config"], figures["waterfall"]]
        )
    assert configs[0] == configs[1] and make_step(" language = en + de ").wanted == {"en", "de"}


SENTENCES = {
    "en": "The committee will publish its findings about the water supply before the end of the year.",
    "de": "Der Ausschuss wird seine Ergebnisse über die Wasserversorgung vor Ende des Jahres veröffentlichen.",
    "fr": "La commission publiera ses conclusions sur l'approvisionnement en eau avant la fin de l'année.",
    "zh": "委员会将在年底之前公布关于供水情况的调查结果，并向公众说明下一步的计划。",
    "ru": "Комитет опубликует свои выводы о водоснабжении до конца этого года.",
    "ja": "委員会は年末までに水の供給に関する調査結果を発表する予定です。",
}


def test_languages_are_told_apart_and_filtered():
    texts = list(SENTENCES.values())
    tally = Tally()
    documents = [Document(id=str(i), text=t, source="s") for i, t in enumerate(texts)]
    documents.append(Document(id="code", text="x = 1", source="s", lang="python"))
    assert [d.lang for d in make_step("language")(documents, tally)] == [*SENTENCES, "python"]
    assert [d.lang for d in make_step("language=en+zh")(documents, tally)] == ["en", "zh"]
    assert tally.dropped["language: de"]["documents"] == 1
    (unknown,) = make_step("language")([Document(id="n", text="12 34 --- 56", source="s")], tally)
    assert unknown.lang is None


@pytest.mark.parametrize(
    "wanted, kept",
    [
        ("en", {"en", "EN", "en-US", "en_GB", "eng", " en "}),
        ("EN+zh-Hans", {"en", "EN", "en-US", "en_GB", "eng", " en ", "zh", "zh_Hans"}),
        ("en-US", {"en", "EN", "en-US", "eng", " en "}),
        ("zho", {"zh", "zh_Hans", "zh-Hant-TW"}),
        ("no", {"nb"}),
        ("he", {"heb", "iw"}),
        ("ka", {"kat_Geor"}),
    ],
)
def test_a_language_is_the_same_however_it_is_written(wanted, kept):
    codes = [
        "en",
        "EN",
        "en-US",
        "en_GB",
        "eng",
        " en ",
        "enm",
        "zh",
        "zh_Hans",
        "zh-Hant-TW",
        "de",
        "nb",
        "heb",
        "iw",
        "kat_Geor",
        "c",
        "python",
    ]
    documents = [Document(id=code, text="x", source="s", lang=code) for code in codes]
    assert {d.lang for d in make_step(f"language={wanted}")(documents, Tally())} == kept


def test_names_of_languages_count_as_their_codes_and_unknown_ones_are_told_from_the_text():
    text = "The weather was fine, and they went out to see the town by the river."
    french = "Le temps était beau, et ils sont sortis pour voir la ville au bord de la rivière."
    codes = ["English", "ENGLISH", "und", "unknown", "", "Deutsch", "中文", "French", "python"]
    documents = [Document(id=code, text=text, source="s", lang=code) for code in codes]
    documents.append(Document(id="other", text=french, source="s", lang="und"))
    tally = Tally()
    kept = [d.id for d in make_step("language=english")(documents, tally)]
    assert kept == ["English", "ENGLISH", "und", "unknown", ""]
    assert [d.id for d in make_step("language=fr+zh")(documents, Tally())] == ["中文", "French", "other"]
    assert tally.dropped["language: fr"]["documents"] == 1


SPEECHES = [  # short, with names in capitals, which mislead a single model
    "MENENIUS:\nHow now, what news?",
    "LADY ANNE:\nWould it were mortal poison, for thy sake!",
    "ALL:\nCome, come.",
    "STANLEY:\nNo, mighty liege; therefore mistrust me not.",
    "MARIANA:\nWill't please you walk aside?",
]


def test_two_models_tell_short_speeches_and_one_alone_is_part_of_the_identity(monkeypatch):
    pytest.importorskip("pycld2")
    assert [identify(speech) for speech in SPEECHES] == ["en"] * len(SPEECHES)
    assert identify("control \x01\x02 characters are \x00 no reason to fail") == "en"
    assert Language("en").identity == {"step": "language", "wanted": ["en"], "models": ["fasttext", "cld2"]}
    monkeypatch.setattr(language, "_cld2", lambda: None)
    assert Language().identity["models"] == ["fasttext"]
    assert [identify(text) for text in SENTENCES.values()] == list(SENTENCES)
