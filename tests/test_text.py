"""Text as numbers: both codes are exact, and what is not text is found."""

import itertools
import re

import numpy as np
import pytest
import torch

from fastddpm import Sampler, Schedule, text
from fastddpm.core import noise
from fastddpm.text import Text, read_texts
from tests.support.check import error_line

AZ = "abcdefghijklmnopqrstuvwxyz"
NAMES = ["emma", "jo", "", "maximilian", "abcdefghijkl"]
CODES = ["bits", "embeddings"]


GOLDEN = [-1.7553988695144653, 0.039016105234622955, -0.05056700482964516, 1.8387216329574585]  # of symbol 1


def assert_refuses(message, function, *args, **keywords):
    """Assert that a call raises a ValueError of one line that holds the message."""
    assert message in error_line(function, *args, **keywords)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", AZ, "é€😀 \n", "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))])
def test_round_trip_is_exact(code, alphabet):
    texts = ["", alphabet[:5], alphabet[-1], alphabet[::-1][:12], (alphabet * 12)[:12]]
    kind = Text(alphabet, 12, code)
    x = kind.encode(texts)
    assert (x.shape, x.dtype, x.device.type) == ((5, *kind.shape), torch.float32, "cpu")
    assert x.is_contiguous()
    assert kind.decode(x) == texts
    assert kind.is_valid(x).tolist() == [True] * 5
    assert torch.equal(kind.nearest(x, torch.zeros(5)), x)


@pytest.mark.parametrize(
    ("characters", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (26, 5), (31, 5), (32, 6), (1000, 10)]
)
def test_shape(characters, bits):
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + characters)))
    assert Text(alphabet, 7).shape == (bits, 7)
    assert Text(alphabet, 7, "embeddings").shape == (16, 7)


def test_bits_are_the_symbols_number_with_the_most_significant_first():
    x = Text(AZ, 3).encode(["az"])
    assert x[0].T.tolist() == [[-1, -1, -1, -1, 1], [1, 1, -1, 1, -1], [-1, -1, -1, -1, -1]]


def test_embeddings_are_normals_of_the_noise_standard_with_one_norm():
    kind = Text(AZ, 26, "embeddings")
    x = kind.encode([AZ])[0].T
    z = noise.normal(noise.address(0, 27), (16,), stream=255, t=0)[1:].double()
    want = 4 * z / z.square().sum(1, keepdim=True).sqrt()
    np.testing.assert_allclose(x.numpy(), want.numpy(), rtol=1e-6)
    assert x[0, :4].tolist() == GOLDEN
    np.testing.assert_allclose(x.norm(dim=1).numpy(), 4, rtol=1e-6)
    assert torch.equal(x[:3], Text("xyz", 3, "embeddings").encode(["xyz"])[0].T)  # by number, not by character


def test_bits_are_decoded_by_sign():
    kind = Text(AZ, 12)
    x = kind.encode(NAMES)
    assert kind.decode(x * randn(*x.shape).abs().clamp(1e-6)) == NAMES
    assert kind.decode(x.double()) == kind.decode(x.bfloat16()) == kind.decode(x.numpy()) == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_embeddings_are_decoded_to_the_nearest(dtype):
    kind = Text(AZ, 12, "embeddings")
    x = (2 * randn(40, 16, 12)).to(dtype)
    table = torch.cat([kind.encode([""])[:, :, 0], Text(AZ, 26, "embeddings").encode([AZ])[0].T]).double()
    near = torch.cdist(x.double().movedim(1, 2), table).argmin(2)
    assert torch.equal(kind.nearest(x), table[near].movedim(2, 1).to(dtype))
    want = ["".join(AZ[k - 1] for k in itertools.takewhile(bool, row)) for row in near.tolist()]
    assert kind.decode(x) == want


@pytest.mark.parametrize("alphabet", ["abc", AZ])
def test_nearest_of_bits_is_that_of_a_symbol(alphabet):
    kind = Text(alphabet, 12)
    x = randn(40, *kind.shape)
    codes = Text(alphabet, len(alphabet) + 1).encode([alphabet])[0].T.double()
    near = torch.cdist(x.double().movedim(1, 2), codes).argmin(2)
    assert torch.equal(kind.nearest(x).double(), codes[near].movedim(2, 1))
    assert text.INVALID not in "".join(kind.decode(kind.nearest(x)))


def test_nearest_keeps_the_sign_of_the_smallest_bit():
    kind = Text(AZ, 1)
    x = torch.tensor([-1.0, 1e-12, -1, -1, 1])[None, :, None]  # i; the sum of the products is that of symbol 1
    assert torch.equal(kind.nearest(x), x.sign())


@pytest.mark.parametrize("code", CODES)
def test_results_do_not_depend_on_the_batch(code, monkeypatch):
    kind = Text(AZ, 12, code)
    x = randn(9, *kind.shape)
    whole = kind.nearest(x)
    assert torch.equal(torch.cat([kind.nearest(part) for part in x.split(2)]), whole)
    monkeypatch.setattr(text, "_AT_ONCE", 1)
    assert torch.equal(kind.nearest(x), whole)


@pytest.mark.parametrize("symbol", [27, 31])
def test_numbers_of_no_symbol_are_decoded_to_the_replacement_character(symbol):
    kind = Text(AZ, 4)
    x = kind.encode(["abc"])
    x[0, :, 1] = torch.tensor([2.0 * (symbol >> bit & 1) - 1 for bit in (4, 3, 2, 1, 0)])
    assert kind.decode(x) == ["a\ufffdc"]
    assert kind.is_valid(x).tolist() == [False]


@pytest.mark.parametrize("code", CODES)
def test_only_end_symbols_may_follow_the_first(code):
    kind = Text(AZ, 4, code)
    x = kind.encode(["abcd", "ab", "a", ""])
    x[1, :, 3] = x[0, :, 0]  # a, b, end, a
    x[3, :, 1] = x[0, :, 0]  # end, a, end, end
    assert kind.decode(x) == ["abcd", "ab", "a", ""]
    assert kind.is_valid(x).tolist() == [True, False, True, False]


@pytest.mark.parametrize("code", CODES)
def test_nan_is_refused_or_propagates(code):
    kind = Text(AZ, 4, code)
    x = kind.encode(["abcd", "ab", "a"])
    x[1, 0, 3] = float("nan")
    assert_refuses("x has NaN in samples [1]; NaN has no symbol", kind.decode, x)
    assert kind.is_valid(x).tolist() == [True, False, True]
    assert kind.nearest(x).isnan().nonzero().tolist() == [[1, 0, 3]]


@pytest.mark.parametrize("code", CODES)
def test_nearest_is_an_x_0_fn_of_the_sampler(code):
    kind = Text("abc", 4, code)
    weight = randn(kind.shape[0], kind.shape[0])
    network = lambda x, t: torch.einsum("dc,ncl->ndl", weight, x)
    sampler = Sampler(network, Schedule(num_train_timesteps=20), shape=kind.shape, device="cpu")
    x = sampler.sample(3, x_0_fn=kind.nearest, progress=False)
    assert kind.is_valid(x).shape == (3,)
    assert torch.equal(kind.nearest(x), x)
    assert text.INVALID not in "".join(kind.decode(x))


@pytest.mark.parametrize("code", CODES)
def test_no_samples(code):
    kind = Text(AZ, 4, code)
    x = torch.zeros(0, *kind.shape)
    assert kind.decode(x) == []
    assert kind.is_valid(x).shape == (0,)
    assert kind.nearest(x).shape == x.shape


def test_codes_made_in_inference_mode_serve_autograd():
    text._codes.cache_clear()
    kind = Text(AZ, 4)
    with torch.inference_mode():
        kind.encode(["abc"])
    x = randn(1, *kind.shape).requires_grad_()
    (kind.nearest(x) * x).sum().backward()
    assert torch.equal(x.grad, kind.nearest(x))


def test_fit():
    assert Text.fit(["hello", "", "abc"]) == Text("abcehlo", 8)
    assert Text.fit(["hello"], "embeddings") == Text("ehlo", 8, "embeddings")
    for longest, length in [(1, 4), (3, 4), (4, 8), (7, 8), (8, 12)]:
        assert Text.fit(["a" * longest]).length == length


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there are no texts; want at least one"),
        ("abc", "texts are 'abc'; want a list of strings"),
        (None, "texts are None; want a list of strings"),
        (["a", 3], "text 1 is 3; want a string"),
    ],
)
def test_texts_are_checked(texts, message):
    assert_refuses(message, Text.fit, texts)
    assert_refuses(message, Text(AZ, 8).encode, texts)


def test_encode_names_the_text_and_the_way_out():
    kind = Text("abc", 4)
    message = (
        "text 1, 'ab?', has '?', which is not in the alphabet 'abc'; leave it out, or make the Text from all texts"
    )
    assert_refuses(message, kind.encode, ["a", "ab?"])
    message = "text 2, 'abcab', has 5 characters; want at most 4: cut it, or make the Text with a length of 5"
    assert_refuses(message, kind.encode, ["a", "abca", "abcab"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 4), "alphabet is 7; want a string of distinct characters"),
        (("", 4), "alphabet has 0 characters; want 1 to 1000"),
        (("".join(map(chr, range(0x4E00, 0x4E00 + 1001))), 4), "alphabet has 1001 characters; want 1 to 1000"),
        (("abca", 4), "alphabet 'abca' has 'a' twice; want each character once"),
        (("a\ufffd", 4), r"alphabet has '\ufffd', which stands for invalid symbols; remove it, from the texts too"),
        (("a\ud800", 4), r"alphabet has '\ud800', which is half a character; remove it"),
        (("a", 0), "length is 0; want a whole number, at least 1"),
        (("a", 2.0), "length is 2.0; want a whole number, at least 1"),
        (("a", 4, "bytes"), "code is 'bytes'; want one of bits, embeddings"),
    ],
)
def test_attributes_are_checked(arguments, message):
    assert_refuses(message, Text, *arguments)


def test_fit_of_empty_texts():
    assert_refuses("all texts are empty; want at least one character", Text.fit, ["", ""])


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.zeros(2, 5, 3), "(2, 5, 3) torch.float32"),
        (torch.zeros(5, 4), "(5, 4) torch.float32"),
        (torch.zeros(2, 5, 4, dtype=torch.int64), "(2, 5, 4) torch.int64"),
        (np.zeros((2, 5, 4), np.int16), "(2, 5, 4) int16"),
        ("abc", "'abc'"),
    ],
)
def test_samples_are_checked(x, came):
    for method in (Text(AZ, 4).decode, Text(AZ, 4).is_valid, Text(AZ, 4).nearest):
        assert_refuses(f"x is {came}; want floating-point [N, 5, 4]", method, x)


@pytest.mark.parametrize(
    "content",
    ["one\ntwo\n thr\u2028ee \n", "one\r\n\r\ntwo\r\n \r\n thr\u2028ee ", "\ufeffone\n\n\ntwo\n\t\n thr\u2028ee "],
)
def test_read_texts(tmp_path, content):
    (tmp_path / "texts.txt").write_bytes(content.encode())
    assert (
        read_texts(tmp_path / "texts.txt") == read_texts(str(tmp_path / "texts.txt")) == ["one", "two", " thr\u2028ee "]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text; want one text per line"),
        (b"\n \r\n", "holds no text; want one text per line"),
        (b"one\ntwo\nd\xe9j\xe0\n", "is not UTF-8 in line 3; convert it, as with iconv -f LATIN1 -t UTF-8 "),
        ("one".encode("utf-16"), "is not UTF-8 in line 1; convert it, as with iconv -f UTF-16 -t UTF-8 "),
    ],
)
def test_read_texts_refuses(tmp_path, content, message):
    (tmp_path / "some texts.txt").write_bytes(content)
    line = error_line(read_texts, tmp_path / "some texts.txt")
    assert f"some texts.txt {message}" in line
    if "iconv" in message:
        assert line.endswith(f"'{tmp_path / 'some texts.txt'}' > new.txt")


def test_read_texts_needs_a_file(tmp_path):
    wanted = "want a UTF-8 text file, one text per line"
    assert_refuses(f"{tmp_path} is not a file; {wanted}", read_texts, tmp_path)
    assert_refuses(f"absent.txt: No such file or directory; {wanted}", read_texts, tmp_path / "absent.txt")
    assert_refuses("path is 3; want the path of a text file", read_texts, 3)
    assert re.search("cannot read .*null", error_line(read_texts, "a\0b"))
