"""Captions say what their claims say, and point at their nouns."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from floyd.scenes.captions import (
    COLOR_WORDS,
    NOUNS,
    POSITION_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    Caption,
    Claims,
    ThingClaim,
    caption,
    captioned,
    claims_of,
    facts,
    worded,
)
from floyd.scenes.scene import (
    NEW_SHAPES,
    REVERSED,
    RGB,
    Background,
    Scene,
    Thing,
    position_of,
    relation_between,
    sample_scene,
)
from floyd.text.cleaning import preprocess

PLAIN = Claims(
    (ThingClaim("circle", "red", "large"), ThingClaim("square", "blue", "small")),
    relation=(0, "above", 1),
    background=("plain", "white"),
)


def samples(count: int, seed: int = 0) -> Iterator[tuple[Scene, Caption]]:
    rng = np.random.default_rng(seed)
    return (captioned(rng, split="any") for _ in range(count))


def says(text: str, words: tuple[str, ...]) -> bool:
    return re.search(rf"\b({'|'.join(words)})\b", text) is not None


def test_spans_point_at_nouns_of_the_right_things():
    for scene, said in samples(1000):
        assert {index for _, _, index in said.nouns} == set(range(len(scene.things)))
        for start, end, index in said.nouns:
            assert said.text[start:end] in NOUNS[scene.things[index].shape]
            assert not said.text[start - 1].isalpha()
            assert not said.text[end : end + 1].isalpha()
        every_noun = {noun for nouns in NOUNS.values() for noun in nouns}
        assert sum(word in every_noun for word in re.findall("[a-z]+", said.text)) == len(said.nouns)


def test_the_color_before_a_noun_is_its_things():
    for scene, said in samples(1000):
        for start, _, index in said.nouns:
            before = said.text[:start].split()[-1]
            assert before in (scene.things[index].color, "the")


def test_claims_are_true_of_the_scene():
    for scene, said in samples(1000):
        things = {(thing.color, thing.shape): thing for thing in scene.things}
        mentioned = [things[claim.color, claim.shape] for claim in said.claims.things]
        assert said.claims.count == len(scene.things)
        for claim, thing in zip(said.claims.things, mentioned, strict=True):
            assert claim.size in (None, thing.size)
            assert claim.position in (None, position_of(thing.x, thing.y))
        if said.claims.relation:
            first, word, second = said.claims.relation
            one, other = mentioned[first], mentioned[second]
            assert relation_between(one.x, one.y, other.x, other.y) == word
        if said.claims.row:
            assert scene.row
            assert mentioned == list(scene.things)
        if said.claims.background:
            assert said.claims.background[1] == scene.background.color


def test_captions_say_what_is_claimed_and_nothing_else():
    for _, said in samples(1500):
        text, claims = said.text, said.claims
        for size, words in SIZE_WORDS.items():
            assert says(text, words) == any(thing.size == size for thing in claims.things)
        assert says(text, ("background", "backdrop", "gradient")) == (claims.background is not None)
        relations = tuple(word for words in RELATION_WORDS.values() for word in words)
        assert says(text, relations) == (claims.relation is not None)
        assert says(text, ("row", "from left to right")) == claims.row
        positions = tuple(word for words in POSITION_WORDS.values() for word in words)
        assert says(text, positions) == any(thing.position for thing in claims.things)
        colors = {thing.color for thing in claims.things} | set((claims.background or ())[1:])
        for color in RGB:
            assert says(text, COLOR_WORDS.get(color, (color,))) == (color in colors)


def test_the_subject_of_a_relation_is_said_first_or_the_relation_before_both():
    for _, said in samples(1500, seed=1):
        if said.claims.relation is None:
            continue
        first, word, second = said.claims.relation
        spots: dict[str, list[int]] = {"one": [], "other": []}
        for start, end, _ in said.nouns:
            noun = said.text[start:end]
            names_one = noun in NOUNS[said.claims.things[first].shape]
            color = said.text[:start].split()[-1]
            if said.claims.things[first].shape == said.claims.things[second].shape:
                names_one = color == said.claims.things[first].color
            spots["one" if names_one else "other"].append(start)
        found = [said.text.rfind(f" {words} ") for words in RELATION_WORDS[word]]
        found += [0] if any(said.text.startswith(words) for words in RELATION_WORDS[word]) else []
        place = max(found)
        assert place >= 0, said.text
        after = [name for name, starts in spots.items() for start in starts if start > place]
        if len(after) == 1:
            assert after == ["other"]
        else:
            assert place < min(spots["other"]) < min(spots["one"])


def test_each_claim_is_left_unsaid_as_often_as_promised():
    said = [(scene, one.claims) for scene, one in samples(4000)]
    sizes = [thing.size is not None for _, claims in said for thing in claims.things]
    relations = [claims.relation is not None for scene, claims in said if len(scene.things) == 2]
    backgrounds = [claims.background is not None for _, claims in said]
    shares = [np.mean(kind) for kind in (sizes, relations, backgrounds)]
    assert shares == pytest.approx([0.80, 0.855, 0.90], abs=0.03)


def test_the_cleaner_leaves_captions_alone():
    texts = [said.text for _, said in samples(300)]
    assert preprocess(texts, clean_caption=True) == texts


@pytest.mark.parametrize("table", [SIZE_WORDS, NOUNS, RELATION_WORDS, POSITION_WORDS])
def test_no_word_means_two_things(table):
    words = [word for synonyms in table.values() for word in synonyms]
    assert len(words) == len(set(words))
    assert all(name in synonyms[0] for name, synonyms in table.items() if name not in NEW_SHAPES)


def test_articles_fit_their_words():
    for _, said in samples(500):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", said.text), said.text


def test_the_plainest_wording_is_fixed():
    text, nouns = worded(PLAIN)
    assert text == "a large red circle above a small blue square on a white background"
    assert nouns == ((12, 18, 0), (38, 44, 1))


def test_wordings_vary():
    rng = np.random.default_rng(0)
    texts = {worded(PLAIN, rng)[0] for _ in range(400)}
    assert len(texts) > 200
    assert any(text.startswith("on a white") for text in texts)
    assert any(text.endswith("white background") for text in texts)


def test_swapping_the_order_of_mention_reverses_the_relation():
    things = (Thing("circle", "red", "small", 0.5, 0.3, 0.1), Thing("square", "blue", "small", 0.5, 0.7, 0.1))
    scene = Scene(things, Background(), relation="above")
    rng = np.random.default_rng(0)
    seen = {(claims.things[0].shape, claims.relation) for claims in (claims_of(scene, rng) for _ in range(100))}
    word = "above"
    said = {("circle", (0, word, 1)), ("square", (0, REVERSED[word], 1))}
    assert seen == said | {("circle", None), ("square", None)}


def test_facts_leave_nothing_out():
    scene = sample_scene(np.random.default_rng(3), things=2)
    claims = facts(scene)
    assert [thing.size for thing in claims.things] == [thing.size for thing in scene.things]
    assert claims.background is not None
    assert (claims.relation is None) == (scene.relation is None)


def test_one_seed_gives_one_caption():
    scene = sample_scene(np.random.default_rng(0))
    one, same = (caption(scene, np.random.default_rng(1)) for _ in range(2))
    assert one == same


def test_claims_of_too_many_things_are_refused():
    with pytest.raises(ValueError, match="one to three things, got 4"):
        worded(Claims((ThingClaim("circle", "red"),) * 4))
