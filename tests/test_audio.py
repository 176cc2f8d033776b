"""Sounds as spectrograms, and back: against NumPy's transform in float64, and against waveforms that are known."""

import numpy as np
import pytest
import torch

from fastddpm.audio import HIGHEST_RATE, Audio, window_of
from fastddpm.storage.audio import spectrogram

SOUND = Audio(8000, "spectrogram")
RNG = np.random.default_rng(0)


def noises(count, length, loudness=0.1):
    return (loudness * RNG.normal(size=(count, 1, length))).clip(-1, 1).astype(np.float32)


def sine(hertz, length=4096, amplitude=0.5, rate=8000):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(length) / rate)).astype(np.float32)[None, None]


def test_levels_are_those_of_the_spectrogram_in_float64():
    waveforms = noises(3, 2048)
    x = SOUND.encode(waveforms)
    assert (x.shape, x.dtype) == ((3, 128, 32), np.float32)
    for levels, waveform in zip(x, waveforms, strict=True):
        magnitude = 10 ** (spectrogram(waveform[0], 8000).astype(np.float64)[:128, :32] / 20)
        want = 20 * np.log10(magnitude + 10**-3.5) / 35 + 1
        assert np.abs(levels - want.clip(-1, 1)).max() < 3e-7  # that the levels of both are rounded


@pytest.mark.parametrize(("rate", "channels"), [(1, 8), (500, 8), (8000, 128), (16000, 256), (44100, 1024)])
def test_rows_cover_32_ms(rate, channels):
    sound = Audio(rate, "spectrogram")
    assert sound.channels == window_of(rate) // 2 == channels
    x = sound.encode(noises(1, 100))
    assert x.shape == (1, channels, 16 * -(-100 // (8 * channels)))
    assert sound.shape_of_waveform(x.shape[1:]) == (1, x.shape[2] * channels // 2)
    assert sound.decode(torch.from_numpy(x)).shape == (1, *sound.shape_of_waveform(x.shape[1:]))


def test_a_sine_of_full_scale_has_the_level_1_and_silence_has_minus_1():
    x = SOUND.encode(sine(1000, amplitude=1.0))
    assert (x[0, 32, 4:-4] == 1).all()  # 1000 Hz * 256 / 8000 Hz
    assert SOUND.encode(np.zeros((2, 1, 1024), np.float32)).max() == -1
    assert not SOUND.decode(torch.full((2, 128, 16), -1.0)).any()


@pytest.mark.parametrize("waveforms", [sine(440), sine(1234) + sine(300), noises(2, 4096)])
def test_decoded_waveforms_have_the_levels(waveforms):
    """Where a waveform has these levels, one is found whose spectrum has them too, up to a few percent."""
    x = SOUND.encode(waveforms)
    decoded = SOUND.decode(torch.from_numpy(x))
    assert decoded.dtype == torch.float32
    want, got = (10 ** (35 / 20 * levels.astype(np.float64)) for levels in (x, SOUND.encode(decoded.numpy())))
    assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


def test_the_search_for_phases_improves_with_each_round(monkeypatch):
    x, errors = SOUND.encode(sine(440) + noises(1, 4096, 0.02)), []
    for rounds in (0, 5, 60):
        monkeypatch.setattr("fastddpm.audio.ROUNDS", rounds)
        again = SOUND.encode(SOUND.decode(torch.from_numpy(x)).numpy())
        errors.append(np.linalg.norm(10 ** (35 / 20 * again) - 10 ** (35 / 20 * x)))
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0]


def test_decoding_depends_on_the_sample_alone(monkeypatch):
    x = torch.from_numpy(SOUND.encode(noises(5, 2048)))
    want = SOUND.decode(x)
    assert torch.equal(SOUND.decode(x), want)
    monkeypatch.setattr("fastddpm.audio._AT_ONCE", 1)
    assert (SOUND.decode(x) - want).abs().max() < 1e-6
    assert (SOUND.decode(x[3:4]) - want[3:4]).abs().max() < 1e-6


def test_impossible_levels_do_not_clip():
    waveforms = SOUND.decode(torch.ones(2, 128, 32))
    assert torch.equal(waveforms.abs().amax((1, 2)), torch.ones(2))
    assert torch.equal(SOUND.decode(torch.full((1, 128, 32), 7.0)), waveforms[:1])


def test_waveforms_are_left_as_they_are():
    waveforms = noises(2, 100)
    assert np.array_equal(Audio(8000).encode(waveforms), waveforms)
    x = torch.randn(2, 1, 100)
    assert Audio(8000).decode(x) is x
    assert (Audio(8000).channels, Audio(8000).shape_of_waveform((1, 100))) == (1, (1, 100))


X, W = np.zeros((2, 128, 16), np.float32), np.zeros((2, 1, 1024), np.float32)


@pytest.mark.parametrize(
    "waveforms", [W[0], W[:0], W[..., :0], W.repeat(3, 1), W.astype(np.int16), torch.zeros(2, 1, 1024), None]
)
@pytest.mark.parametrize("sound", [SOUND, Audio(8000)])
def test_waveforms_are_checked(sound, waveforms):
    with pytest.raises(ValueError, match=r"^waveforms are .*; want a NumPy array of floats in \[-1, 1\], \[N, 1, L\]$"):
        sound.encode(waveforms)


@pytest.mark.parametrize("samples", [X[0], X[:0], X[..., :0], X[:, :3], X.astype(np.int64)])
def test_samples_are_checked(samples):
    with pytest.raises(ValueError, match=r"^samples are .*; want a tensor of floats, \[N, 128, L\]$"):
        SOUND.decode(torch.from_numpy(samples))
    with pytest.raises(ValueError, match=r"^samples are \(2, 128, 16\) float32; want a tensor"):
        SOUND.decode(X)


def test_read_only_waveforms_are_encoded():
    waveforms = noises(1, 100)
    waveforms.flags.writeable = False
    assert SOUND.encode(waveforms).shape == (1, 128, 16)


def test_levels_are_defined():
    """1 + 20 log10(m + 10^(-70/20)) / 35, of a sine whose amplitude is the range below full scale."""
    x = SOUND.encode(sine(1000, amplitude=10 ** (-70 / 20)))
    assert np.abs(x[0, 32, 4:-4] - (1 + 20 * np.log10(2 * 10 ** (-70 / 20)) / 35)).max() < 1e-7


@pytest.mark.parametrize("rate", [0, 8000.0, True, HIGHEST_RATE + 1, None])
def test_sample_rates_are_checked(rate):
    with pytest.raises(ValueError, match=f"sample_rate is {rate}; want a whole number from 1 to 1000000"):
        Audio(rate)


def test_codes_are_checked():
    with pytest.raises(ValueError, match="code is 'mp3'"):
        Audio(8000, "mp3")


def test_it_can_be_compared_and_hashed():
    assert Audio(np.int64(8000)) == Audio(8000) != SOUND
    assert type(Audio(np.int64(8000)).sample_rate) is int
    assert hash(Audio(8000)) != hash(Audio(16000))
