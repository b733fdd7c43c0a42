"""Turn a stream of tokens into text that is safe to show.

One character may be spread over several tokens and a stop string may begin in one token and end in
another, so text is held back while its end is uncertain: an unfinished UTF-8 sequence, or a tail
that could still become a stop string. Text that was returned is never taken back.

The bytes of the vocabulary decide what is unfinished. The detokenizer's text cannot: it shows
U+FFFD for half a character and also for one that the model really wrote.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

__all__ = ["Detokenizer", "TextAssembler", "decoder", "overlap"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# SentencePiece vocabularies spell a byte as `<0xE2>`.
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-F]{2})>")

Decode = Callable[[list[int]], str]


def decoder(decode: Callable[[Any], Any], pieces: Mapping[int, bytes]) -> Decode:
    """The fastest function from tokens to text that agrees with the engine's.

    With a byte-level vocabulary, text is the joined bytes of its tokens. Joining takes microseconds; the detokenizer's
    graph costs a small model a tenth of its speed. Whether the two agree is checked on the whole vocabulary; where they
    do not, as for SentencePiece, the engine decodes. Bytes that are no text become as many U+FFFD as Unicode recommends
    and Hugging Face's tokenizers give; the engine's graph gives fewer in some cases (2026.4).

    Args:
        decode: The engine's `Tokenizer.decode`: a list of tokens to its text, a list of such to a list.
        pieces: Token to its bytes.
    """
    tokens = sorted(pieces)
    alone = decode([[token] for token in tokens]) if tokens else []
    # Special tokens are left out.
    shown = {token: pieces[token] for token, text in zip(tokens, alone, strict=True) if text}

    def join(tokens: list[int]) -> str:
        return b"".join([shown.get(token, b"") for token in tokens]).decode("utf-8", "replace")

    same = tokens and all(join([token]) == text for token, text in zip(tokens, alone, strict=True))
    return join if same and join(tokens) == decode(tokens) else decode


class Detokenizer:
    """From tokens to text, for all engines.

    Args:
        tokenizer: The engine's `Tokenizer`.
        silent: Tokens without text, as special ones: a token that ends an answer need not be special.
        shown: Texts of tokens that have theirs even if they are special, such as the tags around thoughts.

    Attributes:
        pieces: Token to its bytes, for the tokens that have any.
        decode: Tokens to text, special and silent tokens left out.
    """

    def __init__(self, tokenizer: Any, silent: Set[int] = frozenset(), shown: Mapping[int, str] | None = None):
        self.pieces: dict[int, bytes] = {token: piece for piece, token in tokenizer.get_vocab().items()}
        decode = decoder(tokenizer.decode, self.pieces)
        loud = [token for token in silent if decode([token])]
        quiet = {token: text for token, text in (shown or {}).items() if not decode([token])}
        self.decode = decode if not loud else lambda tokens: decode([each for each in tokens if each not in loud])
        if quiet:
            self.decode = _showing(self.decode, quiet)

    def assembler(self, stop: Sequence[str] = (), whole: tuple[str, str] | None = None) -> TextAssembler:
        """A collector of one answer's text; for the arguments see `TextAssembler`."""
        return TextAssembler(self.decode, self.pieces, stop, whole)


def _showing(decode: Decode, texts: Mapping[int, str]) -> Decode:
    """The same with these texts for tokens that have none."""

    def show(tokens: list[int]) -> str:
        text, begin = "", 0
        for place, token in enumerate(tokens):
            if token in texts:
                text += decode(tokens[begin:place]) + texts[token]
                begin = place + 1
        return text + decode(tokens[begin:])

    return show


class TextAssembler:
    """Collects the tokens of one answer and returns the text that is certain.

    Args:
        decode: Tokens to text, special tokens left out.
        pieces: Token to its bytes, for the tokens that have any.
        stop: Strings that end the answer; neither they nor what follows is returned.
        whole: Beginning and end of parts that no stop string cuts, such as calls of functions.

    Attributes:
        stopped: A stop string has come.
        stop: Which one.

    Example:
        assembler = Detokenizer(tokenizer).assembler(stop=("###",))
        text = assembler.push(token)
    """

    def __init__(
        self,
        decode: Decode,
        pieces: Mapping[int, bytes],
        stop: Sequence[str] = (),
        whole: tuple[str, str] | None = None,
    ):
        self._decode = decode
        self._pieces = pieces
        self._stop = tuple(stop)
        # Tokens whose text was returned, kept as left context: some decoders treat a first token differently.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._taken = 0  # characters of the pending tokens' text that were used already
        self._held = ""
        self._whole = whole if stop else None
        self._within = False
        self.stopped = False
        self.stop: str | None = None

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, often empty. `stopped` is set at a stop string."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        if text == certain:
            self._context, self._pending, self._taken = self._pending, [], 0
        return self._release(new)

    def finish(self) -> str:
        """The rest of the text, without an unfinished character at its end."""
        if self.stopped:
            return ""
        text = self._pending_text()
        data = b"".join(self._bytes_of(token) for token in self._pending)
        if text.endswith(REPLACEMENT) and _unfinished(data):
            text = text[:-1]
        rest = self._release(text[self._taken :])
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        context = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(context) :]

    def _bytes_of(self, token: int) -> bytes:
        piece = self._pieces.get(token, b"")
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece

    def _release(self, new: str) -> str:
        """Move text through the stop-string filter."""
        text, taken = self._held + new, ""
        while True:
            # What is looked for now: stop strings and the beginning of a whole part, or its end.
            stops = () if self._within else self._stop
            marks = (*stops, self._whole[self._within]) if self._whole else stops
            places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
            if not places:
                cut = len(text) - max((overlap(text, mark) for mark in marks), default=0)
                self._held = text[cut:]
                return taken + text[:cut]
            place, mark = min(places, key=lambda found: found[0])
            if mark in stops:
                self.stopped, self.stop, self._held = True, mark, ""
                return taken + text[:place]
            self._within = not self._within
            taken, text = taken + text[: place + len(mark)], text[place + len(mark) :]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


def _unfinished(data: bytes) -> bool:
    """Whether bytes end within a UTF-8 sequence."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    # Python also waits after the first bytes of a surrogate, which nothing can complete.
    return decoder.getstate()[0].decode("utf-8", "replace") == REPLACEMENT
