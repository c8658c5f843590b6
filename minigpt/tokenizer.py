"""Text <-> token ids: GPT-2's byte-level BPE from a `Vocabulary`, and a `Vocabulary` from published files.

Splitting and merging are the `tokenizers` library's work, loaded by the first `encode`; decoding needs none.
Normalizers, templates and other tokenizers are not here: `from_tokenizer_json` refuses what GPT-2 has not.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from minigpt.checkpoint import Vocabulary
from minigpt.errors import ConversionError, TokenizerError

# GPT-2 writes every byte as a printable character: itself where it is one, else the next from U+0100 on
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_CHARS = np.full(256, 0, np.uint16)
_CHARS[[*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE))]] = (*_PRINTABLE, *range(0x100, 0x144))
_BYTES = {chr(char): byte for byte, char in enumerate(_CHARS.tolist())}

# BPE never crosses a space or newline after a printable character, so long texts go through in parts
_PARTS = re.compile(r"(?s).{65536,}?[!-~](?=[ \n])|.+")


class Tokenizer:
    """Encode and decode with one vocabulary; safe to share between threads.

    Parameters
    ----------
    vocabulary : Vocabulary
        Checked here as far as arrays can tell, and completely by `prepare`.

    Raises
    ------
    TokenizerError
        If the vocabulary contradicts itself.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.special_tokens = vocabulary.special_tokens
        self._blob = vocabulary.token_bytes.tobytes()
        self._bounds = np.concatenate(([0], vocabulary.token_ends)).astype(np.int64)  # [n_vocab + 1]
        self._merges = vocabulary.merges  # [n_merges, 2]
        self._fresh = True
        if problem := self._problem():
            raise TokenizerError(f"{problem}; convert the model again")

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return len(self._bounds) - 1

    def token(self, id: int) -> bytes:
        """Return the bytes of a token.

        Raises
        ------
        TokenizerError
            If there is no such id.
        """
        if not 0 <= id < self.n_vocab:
            raise TokenizerError(f"token id {id} is outside 0..{self.n_vocab - 1} of this model's vocabulary")
        return self._blob[self._bounds[id] : self._bounds[id + 1]]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Turn text into ids.

        Parameters
        ----------
        text : str
            Any string; a lone surrogate, which no UTF-8 can hold, counts as U+FFFD.
        special : bool
            Whether special text such as ``<|endoftext|>`` becomes its own id; by default it is plain text.
        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        pieces = self._special_pattern.split(text) if special and self.special_tokens else [text]
        encoder = self._encoder(text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:  # re.split puts what the pattern caught at the odd places
                ids.append(self.special_tokens[piece])
            else:
                for part in _PARTS.findall(piece):
                    ids += encoder.encode(part).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token, ids)).decode("utf-8", "replace")

    def stream(self) -> TokenStream:
        """Return a decoder for ids that arrive one at a time."""
        return TokenStream(self)

    def prepare(self) -> None:
        """Build the encoder now, which completes the check of the vocabulary; `encode` does it on first use.

        Raises
        ------
        TokenizerError
            If two tokens are equal, or a merge makes something that is no token.
        """
        _ = self._bpe

    def save(self, path: str | PathLike[str]) -> None:
        """Write Hugging Face's tokenizer.json."""
        from tokenizers import AddedToken, decoders

        pipeline = self._build(range(self.n_vocab))
        pipeline.decoder = decoders.ByteLevel()
        pipeline.add_special_tokens([AddedToken(text, special=True) for text in self.special_tokens])
        pipeline.save(str(path))

    def _problem(self) -> str | None:
        lengths = np.diff(self._bounds)  # [n_vocab]
        if not self.n_vocab or lengths.min() < 1:
            return f"token {int(lengths.argmin()) if self.n_vocab else 0} of {self.n_vocab} is empty"
        if self._bounds[-1] != len(self._blob):
            return f"the tokens end at byte {self._bounds[-1]} of {len(self._blob)}"
        singles = {self._blob[i] for i in self._bounds[:-1][lengths == 1]}
        if missing := sorted(set(range(256)) - singles):
            return f"byte 0x{missing[0]:02x} has no token of its own"
        if self._merges.ndim != 2 or self._merges.shape[1] != 2:
            return f"the merges have the shape {self._merges.shape}, not (n, 2)"
        if self._merges.size and not 0 <= self._merges.min() <= self._merges.max() < self.n_vocab:
            return f"a merge names an id outside 0..{self.n_vocab - 1}"
        for text, id in self.special_tokens.items():
            if not isinstance(id, int) or self.token(id) != text.encode("utf-8", "replace"):
                return f"the special token {text!r} is not the token {id!r}"
        return None

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _encoder(self, text: str) -> Any:
        """Return the full encoder, or in its stead a partial one for the first text, if that is short.

        A merge can only make what occurs in the text, so tokens with a pair of bytes that does not occur
        change nothing. The others are ready in a tenth of the time: good for whoever encodes one prompt.
        """
        first, self._fresh = self._fresh, False
        if not first or len(text) > 4096 or "_bpe" in self.__dict__:
            return self._bpe
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)  # [n_bytes]
        blob = np.frombuffer(self._blob, np.uint8).astype(np.int64)
        absent = np.ones(1 << 16, np.bool_)  # pairs of bytes
        absent[data[:-1] << 8 | data[1:]] = False
        n_absent = np.concatenate(([0], np.cumsum(absent[blob[:-1] << 8 | blob[1:]])))  # up to each byte
        useful = n_absent[self._bounds[1:] - 1] == n_absent[self._bounds[:-1]]  # [n_vocab]
        return self._build(np.flatnonzero(useful).tolist())

    @cached_property
    def _bpe(self) -> Any:
        return self._build(range(self.n_vocab))

    def _build(self, ids: Sequence[int]) -> Any:
        from tokenizers import Tokenizer as Pipeline
        from tokenizers import models, pre_tokenizers

        chars = _CHARS[np.frombuffer(self._blob, np.uint8)].tobytes().decode("utf-16")  # of all tokens
        bounds = self._bounds.tolist()
        tokens = {id: chars[bounds[id] : bounds[id + 1]] for id in ids}
        vocab = {token: id for id, token in tokens.items()}
        if len(vocab) != len(tokens):
            twice = next(id for id, token in tokens.items() if vocab[token] != id)
            same = vocab[tokens[twice]]
            raise TokenizerError(f"the tokens {twice} and {same} are equal; convert the model again")
        known = np.zeros(self.n_vocab, np.bool_)
        known[ids] = True
        pairs = self._merges[known[self._merges].all(axis=1)].tolist()
        merges = [(tokens[left], tokens[right]) for left, right in pairs]
        if len(vocab) < self.n_vocab:
            merges = [(left, right) for left, right in merges if left + right in vocab]
        try:
            pipeline = Pipeline(models.BPE(vocab=vocab, merges=merges))
        except Exception as error:  # plain Exception is what the library raises for a merge that makes no token
            raise TokenizerError(f"a merge makes no token ({error}); convert the model again") from None
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pipeline


class TokenStream:
    """Turn ids into text one by one, holding back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that `id` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token(id))

    def flush(self) -> str:
        """Return what is left at the end, U+FFFD for an incomplete character; the stream can start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


# ---- from published files ----------------------------------------------------------------------------------


def from_gpt2(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], special: Mapping[str, int] | None = None
) -> Vocabulary:
    """Build a Vocabulary from tokens and merges in GPT-2's printable writing of bytes.

    Parameters
    ----------
    vocab : mapping of str to int
        The content of vocab.json.
    merges : iterable of (str, str)
        Left and right halves, the first merge first.
    special : mapping of str to int, optional
        Special tokens as plain text, in `vocab` or not; by default ``<|endoftext|>`` where `vocab` has it.

    Raises
    ------
    TokenizerError
        If ids have gaps or repeat, a token is not made of byte characters, or a merge does not fit.
    """
    if special is None:
        special = {text: vocab[text] for text in ("<|endoftext|>",) if text in vocab}
    by_id: dict[int, bytes] = {}
    for token, id in vocab.items():
        if special.get(token, id) != id:
            raise TokenizerError(f"special token {token!r} has the ids {id} and {special[token]}; keep one")
        if token not in special and by_id.setdefault(id, _to_bytes(token)) != _to_bytes(token):
            raise TokenizerError(f"id {id} belongs to two tokens, {token!r} is the second; ids must differ")
    for text, id in special.items():
        if by_id.setdefault(id, text.encode()) != text.encode():
            raise TokenizerError(f"special token {text!r} has the id {id} of another token; ids must differ")
    if gaps := set(range(len(by_id))) - set(by_id):
        raise TokenizerError(f"no token has the id {min(gaps)}; ids must be 0..{len(by_id) - 1} without gaps")
    tokens = [by_id[id] for id in range(len(by_id))]
    ids = {token: id for id, token in enumerate(tokens)}
    try:
        pairs = [(ids[_to_bytes(left)], ids[_to_bytes(right)]) for left, right in merges]
    except KeyError as error:
        raise TokenizerError(f"a merge names {error}, which is no token; take files of one model") from None
    vocabulary = Vocabulary(
        token_bytes=np.frombuffer(b"".join(tokens), np.uint8),
        token_ends=np.cumsum([len(token) for token in tokens], dtype=np.uint32),
        merges=np.array(pairs, np.uint32).reshape(-1, 2),
        special_tokens=dict(special),
    )
    Tokenizer(vocabulary).prepare()
    return vocabulary


def read_merges(text: str) -> list[list[str]]:
    """Split the content of a merges.txt, with any kind of line end, into pairs.

    Raises
    ------
    TokenizerError
        If a line is not two tokens with a space between them.
    """
    lines = [line.rstrip("\r") for line in text.split("\n")]
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for pair in merges:
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"merge {' '.join(pair)!r} must be two tokens with one space between them")
    return merges


def from_tokenizer_json(document: Mapping[str, Any]) -> Vocabulary:
    """Build a Vocabulary from the content of a tokenizer.json that describes GPT-2's byte-level BPE.

    All added tokens become special tokens: plain text unless `encode` is asked for them.

    Raises
    ------
    ConversionError
        If the file describes anything else, naming it.
    TokenizerError
        If its tokens and merges contradict each other.
    """
    model, pre_tokenizer, post_processor = (
        document.get(key) or {} for key in ("model", "pre_tokenizer", "post_processor")
    )
    added = document.get("added_tokens") or []
    demands = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (document.get("normalizer"), None),
        "pre_tokenizer.type": (pre_tokenizer.get("type"), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (pre_tokenizer.get("add_prefix_space", True), False),
        "pre_tokenizer.use_regex": (pre_tokenizer.get("use_regex", True), True),
        "post_processor.type": (
            post_processor.get("type", "ByteLevel"),
            "ByteLevel",
        ),  # leaves ids as they are
    }
    for key in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        demands[f"model.{key}"] = (model.get(key) or None, None)
    for token in added:
        for key in ("lstrip", "rstrip", "single_word"):
            demands[f"added_tokens[{token['content']!r}].{key}"] = (token.get(key, False), False)
    for name, (value, wanted) in demands.items():
        if value != wanted:
            raise ConversionError(f"tokenizer.json has {name} = {value!r}; GPT-2's tokenizer has {wanted!r}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return from_gpt2(model["vocab"], merges, {token["content"]: token["id"] for token in added})


def _to_bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError as error:
        raise TokenizerError(f"token {token!r} holds {error}, which stands for no byte") from None
