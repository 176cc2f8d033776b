"""Text as samples of real numbers [C, L]: an alphabet, and a code that gives each symbol C numbers.

from fastddpm.text import Text, read_texts

names = read_texts("names.txt")  # one text per line
text = Text.fit(names)
x = text.encode(names)  # [N, C, L]
text.decode(x)  # the names
"""

import functools
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.core import noise
from fastddpm.core.checks import one_of, shape_of, shown, whole
from fastddpm.core.names import TEXT_CODES

MOST_CHARACTERS = 1000  # of an alphabet
INVALID = "\ufffd"  # what a number that no symbol has is decoded to: Unicode's replacement character
WIDTH = 16  # numbers per symbol of the code "embeddings"
_AT_ONCE = 1 << 22  # values of an intermediate result


@dataclass(frozen=True)
class Text:
    """The representation of texts as samples of a model: one symbol at each of L positions, written as C numbers.

    Symbol 0 is the end of the text and fills the positions after it; symbols 1, 2, ... are the characters of the
    alphabet. The code "bits" is the symbol's number in binary, most significant bit first, each bit as -1 or 1: the
    analog bits of Chen et al. 2022 (arXiv:2208.04202); C is the number of bits of the largest number. The code
    "embeddings" is a fixed vector for each symbol, as in Li et al. 2022 (arXiv:2205.14217) but not trained: C = 16
    normal numbers of the noise standard (seed 0, sample: the symbol, stream 255, t = 0), scaled to the norm 4.

    Attributes:
        alphabet: 1 to 1000 distinct characters.
        length: L, the positions of a sample.
        code: "bits" or "embeddings".
    Raises: ValueError: an attribute is not as above.
    """

    alphabet: str
    length: int
    code: str = "bits"

    def __post_init__(self) -> None:
        _check_alphabet(self.alphabet)
        object.__setattr__(self, "length", whole("length", self.length, 1))
        one_of("code", self.code, TEXT_CODES)

    @classmethod
    def fit(cls, texts: Sequence[str], code: str = "bits") -> "Text":
        """The Text of the sorted characters of texts.

        Its length is that of the longest text and the end symbol, rounded up to a multiple of 4.
        """
        _check_texts(texts)
        longest = max(map(len, texts))
        if longest == 0:
            raise ValueError("all texts are empty; want at least one character")
        return cls("".join(sorted(set().union(*texts))), 4 * -(-(longest + 1) // 4), code)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, L), the shape of a sample."""
        return WIDTH if self.code == "embeddings" else len(self.alphabet).bit_length(), self.length

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts as samples: float32 [N, C, L], on the CPU. A text of L characters has no end symbol.

        Raises: ValueError: there are no texts, or one is too long or has a character that is not in the alphabet.
        """
        _check_texts(texts)
        numbers = {character: symbol for symbol, character in enumerate(self.alphabet, 1)}
        for n, text in enumerate(texts):
            if len(text) > self.length:
                way_out = f"cut it, or make the Text with a length of {len(text)}"
                raise ValueError(
                    f"text {n}, {shown(text)}, has {len(text)} characters; want at most {self.length}: {way_out}"
                )
            if unknown := [character for character in text if character not in numbers]:
                way_out = "leave it out, or make the Text from all texts, with Text.fit"
                alphabet = f"is not in the alphabet {shown(self.alphabet)}"
                raise ValueError(f"text {n}, {shown(text)}, has {unknown[0]!r}, which {alphabet}; {way_out}")
        rows = [[*map(numbers.__getitem__, text), *[0] * (self.length - len(text))] for text in texts]
        symbols = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return self._table(symbols.device)[symbols].movedim(2, 1).contiguous()

    def decode(self, x: Tensor | np.ndarray) -> list[str]:
        """Samples as texts, up to the first end symbol of each.

        Args:
            x: floating-point [N, C, L]. Bits are decoded by their signs, and unused codes become U+FFFD;
                embeddings are decoded to the nearest in Euclidean distance.
        Raises: ValueError: x is not as above, or holds NaN.
        """
        x = self._checked(x)
        if bad := x.isnan().flatten(1).any(1).nonzero().flatten().tolist():
            raise ValueError(f"x has NaN in samples {bad[:8]}{' ...' * (len(bad) > 8)}; NaN has no symbol")
        characters = dict(enumerate(self.alphabet, 1))
        texts = []
        for row in self._symbols(x).tolist():
            end = row.index(0) if 0 in row else len(row)
            texts.append("".join(characters.get(symbol, INVALID) for symbol in row[:end]))
        return texts

    def is_valid(self, x: Tensor | np.ndarray) -> Tensor:
        """Whether samples are texts: all symbols exist, and only end symbols follow the first one.

        Args: x: as for `decode`; a sample with NaN is not valid.
        Returns: bool [N] on x's device.
        """
        x = self._checked(x)
        symbols = self._symbols(x)
        ended = (symbols == 0).cumsum(1) > 0
        wrong = (symbols > len(self.alphabet)) | (ended & (symbols != 0)) | x.isnan().any(1)
        return ~wrong.any(1)

    def nearest(self, x_0: Tensor, t: Any = None) -> Tensor:
        """Replace the numbers at each position by those of the nearest symbol, in Euclidean distance.

        This is an `x_0_fn` of the sampler: the clamping of Diffusion-LM (arXiv:2205.14217, section 4.2).

        Args:
            x_0: floating-point [N, C, L].
            t: has no effect.
        Returns: like x_0; NaN stays NaN.
        """
        x = self._checked(x_0)
        symbols = self._symbols(x)
        if self.code == "bits" and len(self.alphabet) + 1 < 1 << self.shape[0]:
            symbols = torch.where(symbols > len(self.alphabet), self._closest(x), symbols)
        codes = self._table(x.device)[symbols].movedim(2, 1)
        return torch.where(x.isnan(), x, codes).to(x_0.dtype)

    def _checked(self, x: Any) -> Tensor:
        """x as a tensor of float32 or float64. Raises: ValueError: it is not samples of this kind."""
        tensor = torch.as_tensor(x, device="cpu") if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape[1:] != self.shape:
            raise ValueError(f"x is {shape_of(x)}; want floating-point [N, {self.shape[0]}, {self.shape[1]}]")
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def _symbols(self, x: Tensor) -> Tensor:
        """The symbol at each position, or for bits a number that no symbol has: [N, L] int64."""
        if self.code == "embeddings":
            return self._closest(x)
        bits = self.shape[0]
        weights = torch.tensor([1 << bit for bit in reversed(range(bits))], dtype=torch.int64, device=x.device)
        return ((x > 0) * weights[:, None]).sum(1)

    def _closest(self, x: Tensor) -> Tensor:
        """The nearest symbol at each position: [N, L] int64. All codes have one norm: it has the largest inner product.

        The products are added in a fixed order, so that the result does not depend on the batch or the device.
        """
        table = self._table(x.device).to(x.dtype)
        rows = max(1, _AT_ONCE // (len(table) * self.length))
        found = []
        for part in x.split(rows):
            products = part[:, 0, None] * table[:, 0, None]  # [n, symbols, L]
            for c in range(1, x.shape[1]):
                products = products + part[:, c, None] * table[:, c, None]
            found.append(products.argmax(1))
        return torch.cat(found)

    def _table(self, device: torch.device) -> Tensor:
        return _codes(len(self.alphabet) + 1, self.code, device)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, without blank ones. Lines end in "\\n" or "\\r\\n".

    Raises: ValueError: path cannot be read, is not UTF-8, or holds no text.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is {shown(path)}; want the path of a text file")
    if os.path.exists(path) and not os.path.isfile(path):  # reading from a pipe may never end
        raise ValueError(f"{path} is not a file; want a UTF-8 text file, one text per line")
    try:
        with open(path, "rb") as file:
            content = file.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {cause}; want a UTF-8 text file, one text per line") from error
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        known = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        way_out = f"convert it, as with iconv -f {known} -t UTF-8 {shlex.quote(os.fspath(path))} > new.txt"
        raise ValueError(f"{path} is not UTF-8 in line {line}; {way_out}") from error
    texts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; want one text per line")
    return texts


def _check_alphabet(alphabet: Any) -> None:
    if not isinstance(alphabet, str):
        raise ValueError(f"alphabet is {shown(alphabet)}; want a string of distinct characters")
    if not 1 <= len(alphabet) <= MOST_CHARACTERS:
        raise ValueError(f"alphabet has {len(alphabet)} characters; want 1 to {MOST_CHARACTERS}")
    if repeated := [character for n, character in enumerate(alphabet) if character in alphabet[:n]]:
        raise ValueError(f"alphabet {shown(alphabet)} has {repeated[0]!r} twice; want each character once")
    if wrong := [character for character in alphabet if character == INVALID or "\ud800" <= character <= "\udfff"]:
        what = "stands for invalid symbols" if wrong[0] == INVALID else "is half a character"
        raise ValueError(f"alphabet has {wrong[0]!a}, which {what}; remove it, from the texts too")


def _check_texts(texts: Any) -> None:
    """Raises: ValueError: texts are not a sequence of strings, or it is empty."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"texts are {shown(texts)}; want a list of strings")
    if wrong := [n for n, text in enumerate(texts) if not isinstance(text, str)][:1]:
        raise ValueError(f"text {wrong[0]} is {shown(texts[wrong[0]])}; want a string")
    if not texts:
        raise ValueError("there are no texts; want at least one")


@functools.lru_cache(maxsize=64)
def _codes(count: int, code: str, device: torch.device) -> Tensor:
    """The numbers of `count` symbols: float32 [count, C]."""
    if code == "bits":
        bits = (count - 1).bit_length()
        rows = [[2.0 * (symbol >> bit & 1) - 1 for bit in reversed(range(bits))] for symbol in range(count)]
    else:
        drawn = noise.normal(noise.address(0, count, "cpu"), (WIDTH,), stream=noise.CODES, t=0).tolist()
        norms = [math.sqrt(math.fsum(z * z for z in row)) for row in drawn]  # in float64, rounded alike everywhere
        rows = [[z / norm * math.sqrt(WIDTH) for z in row] for row, norm in zip(drawn, norms, strict=True)]
    with torch.inference_mode(False):  # it is cached, and one made in inference mode could not be used with autograd
        return torch.tensor(rows, dtype=torch.float32, device=device)
