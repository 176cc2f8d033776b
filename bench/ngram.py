"""A letter n-gram model: the yardstick for texts that another model has drawn.

Interpolated Witten-Bell smoothing (Witten and Bell 1991): the estimate of each order is mixed with that of the next
lower one, which has the weight `smoothing` times the number of distinct letters seen after the context. The lowest
order is mixed with the uniform distribution.
"""

from collections.abc import Sequence

import numpy as np

START = END = 0  # the symbol that ends a text also pads its start


class NGram:
    """P(letter | the n - 1 letters before it).

    Args:
        alphabet: the letters; symbol 0 is the end.
        n: the order; the table takes (len(alphabet) + 1)^n float32 numbers, 57 MB for 26 letters and n = 5.
        smoothing: the weight of the lower orders; 4 is best for names held out of names.txt.
    """

    def __init__(self, alphabet: str, n: int = 5, smoothing: float = 4.0):
        self.alphabet, self.n, self.smoothing = alphabet, n, smoothing
        self.symbols = len(alphabet) + 1
        self._number = {letter: i for i, letter in enumerate(alphabet, 1)}

    def fit(self, texts: Sequence[str]) -> "NGram":
        """Count the letters of texts, and compute the table of probabilities."""
        windows = self._windows(texts)
        p = np.full((1, self.symbols), 1 / self.symbols, np.float32)
        for k in range(1, self.n + 1):
            index = windows[:, -k:] @ self.symbols ** np.arange(k)[::-1]
            counts = np.bincount(index, minlength=self.symbols**k).astype(np.float32).reshape(-1, self.symbols)
            mass = self.smoothing * (counts > 0).sum(1, keepdims=True, dtype=np.float32)
            total = counts.sum(1, keepdims=True) + mass
            # the first letter of a context is its most significant digit, and a lower order forgets it
            lower = np.tile(p, (max(1, len(counts) // len(p)), 1))
            p = np.where(total > 0, (counts + mass * lower) / np.maximum(total, 1e-9), lower)
        self.table = p  # [symbols^(n - 1), symbols]
        return self

    def bits(self, texts: Sequence[str]) -> np.ndarray:
        """[N]: the bits of each text, with its end."""
        windows = self._windows(texts)
        context = windows[:, :-1] @ self.symbols ** np.arange(self.n - 1)[::-1]
        bits = -np.log2(self.table[context, windows[:, -1]].astype(np.float64))
        owner = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
        return np.bincount(owner, bits, len(texts))

    def sample(self, count: int, seed: int = 0) -> list[str]:
        """Draw texts from the model."""
        rng = np.random.default_rng(seed)
        context, alive, texts = np.zeros(count, np.int64), np.arange(count), [""] * count
        while len(alive):
            cumulative = self.table[context[alive]].astype(np.float64).cumsum(1)
            u = rng.random((len(alive), 1)) * cumulative[:, -1:]
            symbol = (cumulative <= u).sum(1)
            for i, s in zip(alive[symbol != END], symbol[symbol != END], strict=True):
                texts[i] += self.alphabet[s - 1]
            context[alive] = (context[alive] * self.symbols + symbol) % self.symbols ** (self.n - 1)
            alive = alive[symbol != END]
        return texts

    def _windows(self, texts: Sequence[str]) -> np.ndarray:
        """Each symbol of each text, after the n - 1 symbols before it: [symbols of all texts, n]."""
        start = [START] * (self.n - 1)
        rows = [[*start, *map(self._number.__getitem__, text), END] for text in texts]
        found = [row[i : i + self.n] for row in rows for i in range(len(row) - self.n + 1)]
        return np.array(found, np.int64).reshape(-1, self.n)


def bits_per_letter(bits: np.ndarray, texts: Sequence[str]) -> tuple[float, float]:
    """Bits per letter over all texts, where the end of a text counts as a letter; and its standard error."""
    lengths = np.array([len(text) + 1 for text in texts])
    mean = bits.sum() / lengths.sum()
    return float(mean), float(np.std(bits - mean * lengths) / lengths.mean() / len(texts) ** 0.5)
