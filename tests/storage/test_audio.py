"""WAV files: exact round trips, an error for every other kind of file. Spectrograms: tones where they are."""

import io
import os
import struct
import sys
import wave
from contextlib import suppress

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from fastddpm.storage import audio
from fastddpm.storage.audio import (
    draw_spectrograms,
    read_wav,
    save_spectrograms,
    save_wav,
    spectrogram,
    wav_bytes,
)
from tests.support.check import error_line

EVERY = np.arange(-32768, 32768).astype(np.int16)
RAMP = np.linspace(-1, 1, 100, dtype=np.float32)


def written(samples, rate=8000, subtype="PCM_16", kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=kind)
    return buffer.getvalue()


def sine(frequency, rate=8000, seconds=0.5, amplitude=1.0):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "in a folder's.wav"


# WAV files


def test_round_trip_of_every_sample_is_exact(path):
    path.write_bytes(written(EVERY))
    x, rate = read_wav(path, sample_rate=8000)
    assert (x.dtype, x.shape, rate) == (np.float32, (65536,), 8000)
    assert np.array_equal(x, EVERY / np.float32(32768))
    assert wav_bytes(x, 8000) == written(EVERY)
    assert np.array_equal(audio.read_pcm(path)[0], EVERY)


@pytest.mark.parametrize("rate", [1, 8000, 44100, 192000])
def test_python_reads_what_is_written(path, rate):
    save_wav(path, RAMP, rate)
    with wave.open(os.fspath(path)) as file:
        assert file.getparams()[:4] == (1, 2, rate, 100)
        samples = np.frombuffer(file.readframes(100), "<i2")
    assert np.array_equal(samples, np.rint(RAMP.astype(np.float64) * 32768).clip(max=32767))
    assert read_wav(path)[1] == rate


@pytest.mark.parametrize(("kind", "endian"), [("WAV", "LITTLE"), ("WAV", "BIG"), ("WAVEX", "LITTLE")])
def test_variants_of_the_header_are_read(path, kind, endian):
    soundfile.write(path, EVERY[::7], 16000, subtype="PCM_16", format=kind, endian=endian)
    assert np.array_equal(audio.read_pcm(path)[0], EVERY[::7])
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0text")
    assert np.array_equal(audio.read_pcm(path, sample_rate=16000)[0], EVERY[::7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_and_arrays_of_all_shapes_are_alike(dtype):
    x = torch.linspace(-1, 1, 100).to(dtype)
    want = wav_bytes(x.double().numpy(), 8000)
    assert wav_bytes(x, 8000) == wav_bytes(x[None], 8000) == wav_bytes(x.repeat_interleave(2)[::2], 8000) == want
    assert wav_bytes(x.requires_grad_(), 8000) == want


def test_values_are_rounded_and_clamped():
    values = [2.0, 1.0, 0.5 / 32768, 0.51 / 32768, 1.5 / 32768, 0.0, -0.51 / 32768, -1.0, -1.5, np.inf, -np.inf]
    samples = np.frombuffer(wav_bytes(np.array(values), 8000)[44:], "<i2")
    assert samples.tolist() == [32767, 32767, 0, 1, 2, 0, -1, -32768, -32768, 32767, -32768]


def test_writing_is_atomic(path, monkeypatch):
    save_wav(path, RAMP, 8000)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == wav_bytes(RAMP, 8000)
    with pytest.raises(ValueError, match="NaN"):
        save_wav(path, RAMP * np.nan, 8000)
    assert path.read_bytes() == wav_bytes(RAMP, 8000)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.array([0.0, np.nan, np.nan]), "waveform has 2 NaN among 3 values; want numbers in [-1, 1]"),
        (np.zeros(0), "waveform is (0,) float64; want [L] or [1, L], at least one value"),
        (np.zeros((2, 9)), "waveform is (2, 9) float64; want [L] or [1, L]"),
        (torch.zeros(1, 1, 9), "waveform is (1, 1, 9) float64; want [L] or [1, L]"),
        (torch.zeros(()), "waveform is () float64; want [L] or [1, L]"),
        (EVERY, "waveform is (65536,) int16; want floating-point [L] or [1, L] in [-1, 1]"),
        (torch.zeros(9, dtype=torch.int64), "waveform is (9,) torch.int64; want floating-point"),
        ([0.0, 0.5], "waveform is [0.0, 0.5]; want floating-point"),
    ],
)
def test_waveforms_are_checked(waveform, message):
    assert message in error_line(wav_bytes, waveform, 8000)
    if "NaN" not in message:
        assert message in error_line(spectrogram, waveform, 8000)


@pytest.mark.parametrize("rate", [0, 8000.0, True, 1_000_001, None])
def test_sample_rates_are_checked(path, rate):
    message = f"sample_rate is {rate}; want a whole number from 1 to 1000000"
    for function, arguments in [(wav_bytes, [RAMP]), (spectrogram, [RAMP]), (draw_spectrograms, [RAMP[None], None])]:
        assert error_line(function, *arguments, rate) == message
    if rate is not None:
        assert error_line(read_wav, path, sample_rate=rate) == message


WANTED = "want 1 channel of Signed 16 bit PCM"


@pytest.mark.parametrize(
    ("content", "came"),
    [
        (written(np.zeros((9, 2))), "2 channels of Signed 16 bit PCM at 8000 Hz"),
        (written(RAMP, subtype="PCM_24"), "1 channel of Signed 24 bit PCM at 8000 Hz"),
        (written(RAMP, subtype="PCM_32"), "1 channel of Signed 32 bit PCM at 8000 Hz"),
        (written(RAMP, subtype="PCM_U8"), "1 channel of Unsigned 8 bit PCM at 8000 Hz"),
        (written(RAMP, subtype="FLOAT"), "1 channel of 32 bit float at 8000 Hz"),
        (written(RAMP, subtype="ULAW"), "1 channel of U-Law at 8000 Hz"),
        (written(np.zeros((9, 6)), 48000, "DOUBLE"), "6 channels of 64 bit float at 48000 Hz"),
    ],
)
def test_other_samples_are_refused_with_a_conversion(path, content, came):
    path.write_bytes(content)
    quoted = "'" + str(path).replace("'", "'\"'\"'") + "'"
    command = f"convert it: ffmpeg -i {quoted} -ac 1 -c:a pcm_s16le out.wav"
    assert error_line(read_wav, path) == f"{path} holds {came}; {WANTED}; {command}"


def test_other_rates_are_refused_with_a_conversion(tmp_path):
    save_wav(tmp_path / "in.wav", RAMP, 44100)
    line = error_line(read_wav, tmp_path / "in.wav", sample_rate=8000)
    assert "holds 1 channel of Signed 16 bit PCM at 44100 Hz; want 1 channel of Signed 16 bit PCM at 8000 Hz;" in line
    assert line.endswith(f"; convert it: ffmpeg -i {tmp_path}/in.wav -ar 8000 -ac 1 -c:a pcm_s16le out.wav")


@pytest.mark.parametrize("kind", ["FLAC", "AIFF", "RF64", "W64"])
def test_other_kinds_of_files_are_refused(path, kind):
    path.write_bytes(written(RAMP, kind=kind))
    line = error_line(read_wav, path)
    assert f"{path} is not a WAV file: it begins with b'" in line
    assert "; convert it: ffmpeg -i " in line


FINE = written(EVERY[:100])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a WAV file: it is empty; convert it: ffmpeg"),
        (b"some text\n", "is not a WAV file: it begins with b'some text\\n'; convert it: ffmpeg"),
        (b"RIFF\0\0\0\0AVI ", "is not a WAV file: it begins with b'RIFF"),
        (written(EVERY[:0]), "holds no samples; want at least one: leave this file out"),
        (FINE[:40], "as WAV: Error in WAV file. No 'data' chunk marker. The file is damaged; replace it"),
        (
            FINE[:-1],
            "is truncated: its header announces 200 bytes of samples, but 199 follow; copy it again, or repair",
        ),
        (FINE[:44], "is truncated: its header announces 200 bytes of samples, but 0 follow"),
        (FINE[:22] + bytes(2) + FINE[24:], "as WAV: Channel count is zero. The file is damaged; replace it"),
        (FINE[:22] + b"\xff\xff" + FINE[24:], "as WAV: Too many channels specified. The file is damaged; replace it"),
        (FINE[:24] + b"\xff\xff\xff\xff" + FINE[28:], "The file is damaged; replace it"),
        (
            FINE[:40] + struct.pack("<I", 0xFFFFFFF0) + FINE[44:],
            "announces 4294967280 bytes of samples, but 200 follow",
        ),
    ],
)
def test_damaged_files_are_refused(path, content, message):
    path.write_bytes(content)
    line = error_line(read_wav, path)
    assert str(path) in line
    assert message in line


def test_damaged_header_raises_only_value_error(path):
    """Each byte of the header is changed in turn."""
    for at in range(44):
        for value in (0, 1, 0x7F, 0xFF):
            path.write_bytes(FINE[:at] + bytes([value]) + FINE[at + 1 :])
            with suppress(ValueError):
                assert 0 < len(read_wav(path)[0]) <= 100


def test_folders_and_missing_files_are_refused(tmp_path):
    assert error_line(read_wav, tmp_path) == f"{tmp_path} is a folder; want a file"
    line = error_line(read_wav, tmp_path / "absent.wav")
    assert line == f"cannot read {tmp_path}/absent.wav: No such file or directory; want a WAV file"
    assert "path to read is 3; want a path" in error_line(read_wav, 3)


def test_huge_files_are_refused_unread(path):
    path.write_bytes(FINE)
    os.truncate(path, (1 << 32) + 1)  # a hole, which takes no space
    line = f"{path} has 4294967297 bytes; a WAV file has at most 4294967296: cut it into pieces"
    assert error_line(read_wav, path) == line


def test_soundfile_is_an_extra(path, monkeypatch):
    save_wav(path, RAMP, 8000)
    monkeypatch.setitem(sys.modules, "soundfile", None)  # import soundfile fails
    assert error_line(read_wav, path) == f"{path} needs soundfile; pip install 'fastddpm[audio]'"
    assert error_line(wav_bytes, RAMP, 8000) == "a WAV file needs soundfile; pip install 'fastddpm[audio]'"
    assert draw_spectrograms(RAMP[None], None, 8000).ndim == 3


# Spectrograms

ROUNDING = 4e-6  # of levels down to -120 dB to float32: half a unit in the last place


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("amplitude", [1.0, 0.01])
def test_a_tone_is_at_its_frequency_and_level(rate, amplitude):
    window = {8000: 256, 44100: 2048}[rate]
    x = sine(40 * rate / window, rate, amplitude=amplitude)
    decibels = spectrogram(x, rate)
    assert decibels.dtype == np.float32
    assert decibels.shape == (window // 2 + 1, 1 + -(-len(x) // (window // 4)))
    inside = decibels[:, 4:-4]
    assert set(inside.argmax(0)) == {40}
    np.testing.assert_allclose(inside[40], 20 * np.log10(amplitude), atol=ROUNDING)


def test_frames_are_centred_at_their_times():
    click = np.zeros(1000)
    click[320] = 1
    decibels = spectrogram(torch.from_numpy(click)[None], 8000, window=64, hop=20)
    assert decibels.shape == (33, 51)
    assert decibels.max(0).argmax() == 16
    assert (decibels.max(0) > audio.FLOOR).nonzero()[0].tolist() == [15, 16, 17]


def test_spectrogram_is_that_of_the_definition():
    x = np.random.default_rng(0).uniform(-1, 1, 50)
    got = spectrogram(x, 8000, window=9, hop=7)
    assert got.shape == (5, 9)
    hann = np.sin(np.pi * np.arange(9) / 9) ** 2
    for i in range(9):
        part = [x[j] if 0 <= j < 50 else 0 for j in range(7 * i - 4, 7 * i + 5)]
        magnitude = np.abs(np.fft.rfft(part * hann)) * 2 / hann.sum()
        np.testing.assert_allclose(got[:, i], 20 * np.log10(magnitude.clip(1e-6)), atol=ROUNDING)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_short_and_silent_waveforms_have_a_spectrogram(length):
    decibels = spectrogram(np.zeros(length), 8000)
    assert decibels.shape == (129, 1 + -(-length // 64))
    assert (decibels == audio.FLOOR).all()
    assert draw_spectrograms(np.zeros((1, length)), ["silence"], 8000).ndim == 3


def test_values_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf):
        assert error_line(spectrogram, np.array([0, bad]), 8000) == "waveform has 1 values that are not finite"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window": 1}, "window is 1; want a whole number from 2 to 1048576"),
        ({"hop": 0}, "hop is 0; want a whole number, at least 1"),
    ],
)
def test_options_are_checked(keywords, message):
    assert error_line(spectrogram, RAMP, 8000, **keywords) == message


# Pictures


def panels(picture, count, rate_of_labels=True):
    """The panels of a picture, in order."""
    (width, height), above = audio.PANEL, audio._MARGIN + audio._LINE * rate_of_labels
    for n in range(count):
        row, column = divmod(n, min(count, audio.COLUMNS))
        x, y = audio._LEFT + column * (width + audio._MARGIN), row * (height + above) + above
        yield picture[y : y + height, x : x + width].astype(int)


def test_each_panel_shows_its_waveform_at_the_same_scale():
    waves = np.stack([sine(500 + 500 * k) for k in range(7)])
    picture = draw_spectrograms(waves, list("abcdefg"), 8000)
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    height = audio.PANEL[1]
    for k, panel in enumerate(panels(picture, 7)):
        brightness = panel.sum(2)[:, 20:-20]
        want = height * (1 - (500 + 500 * k) / 4000)  # the highest frequency is on top
        assert abs(brightness.argmax(0) - want).max() <= 2
    rolled = draw_spectrograms(torch.from_numpy(np.roll(waves, 1, 0))[:, None], list("gabcdef"), 8000)
    for panel, same in zip(list(panels(picture, 7))[:-1], list(panels(rolled, 7))[1:], strict=True):
        assert np.array_equal(panel, same)


def test_colours_are_relative_to_the_loudest_of_all():
    quiet, loud = panels(draw_spectrograms(np.stack([sine(1000, amplitude=0.01), sine(1000)]), "ab", 8000), 2)
    line = loud.sum(2)[:, 100].argmax()
    brightest, darkest, half = ([int(v) for v in audio._COLOURS[at]] for at in (-1, 0, 4))
    assert np.abs(loud[line, 100] - brightest).max() <= 12
    assert np.abs(quiet[line, 100] - half).max() <= 12  # 40 dB less
    assert loud[5, 100].tolist() == quiet[5, 100].tolist() == darkest


def test_a_quiet_tone_is_visible_where_rows_are_fewer_than_frequencies():
    waves = np.stack([sine(12000, 48000, amplitude=0.001), sine(5000, 48000)])
    quiet, _ = panels(draw_spectrograms(waves, None, 48000), 2, rate_of_labels=False)
    assert (quiet[:, 100].max(1) > 60).sum() >= 1


def test_silence_is_dark():
    picture = draw_spectrograms(np.zeros((2, 4000)), None, 8000)
    for panel in panels(picture, 2, rate_of_labels=False):
        assert (panel == audio._COLOURS[0]).all()


def test_colours_get_lighter_in_order():
    luminance = np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(audio._COLOURS @ luminance) > 10).all()
    colours = audio._coloured(np.linspace(-80, 0, 500), 0.0)
    assert (np.diff(colours @ luminance) > -1).all()  # apart from rounding
    assert np.array_equal(colours[[0, -1]], audio._COLOURS[[0, -1]])
    assert np.array_equal(audio._coloured(np.array([-200, 20]), 0.0), audio._COLOURS[[0, -1]])


def test_time_runs_to_the_right():
    late = np.concatenate([np.zeros(3000), sine(1000, seconds=1 / 8)])  # the last quarter
    (panel,) = panels(draw_spectrograms(late[None], ["late"], 8000), 1)
    loud = panel.sum(2).max(0) > 500
    assert abs(loud.argmax() - 0.75 * audio.PANEL[0]) <= 6
    assert loud[round(0.78 * audio.PANEL[0]) : -6].all()


def test_titles_are_drawn_above_and_fit(path):
    waves = np.zeros((3, 800))
    labels = ["one", "a name that is much too long for the panel" * 3, "line\nbreak"]
    with_titles = draw_spectrograms(waves, labels, 8000)
    without = draw_spectrograms(waves, None, 8000)
    assert with_titles.shape[0] == without.shape[0] + audio._LINE
    above = with_titles[: audio._MARGIN + audio._LINE - 1]
    step = audio.PANEL[0] + audio._MARGIN
    for n in range(3):
        start = audio._LEFT + n * step
        assert (above[:, start : start + audio.PANEL[0]] < 100).any()
        assert (above[:, start + audio.PANEL[0] + 1 : start + step - 1] == 255).all()
    assert not np.array_equal(draw_spectrograms(waves, ["two", *labels[1:]], 8000), with_titles)
    assert np.array_equal(
        draw_spectrograms(waves, [1, 2, 3], 8000), draw_spectrograms(torch.zeros(3, 1, 800), ["1", "2", "3"], 8000)
    )


@pytest.mark.parametrize("end", [1e-4, 0.03, 0.64, 1.0, 2.5, 4.0, 22.05, 24.0, 100.0, 1e4])
def test_axes_have_a_few_round_numbers(end):
    ticks, decimals = audio._ticks(end)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert ticks[-1] <= end * 1.00001 < 2 * ticks[-1]
    assert [float(f"{tick:.{decimals}f}") for tick in ticks] == pytest.approx(ticks, rel=1e-9)


def test_the_picture_is_written_as_a_png(path):
    save_spectrograms(path, np.zeros((2, 800)), ["a", "b"], 8000)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), draw_spectrograms(np.zeros((2, 800)), ["a", "b"], 8000))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("waves", "labels", "message"),
    [
        (np.zeros((2, 9)), ["a"], "there are 1 labels for 2 waveforms; want one for each, or None"),
        (np.zeros((0, 9)), None, "waveforms is (0, 9) float64; want [N, L] or [N, 1, L], at least one value"),
        (np.zeros((2, 2, 9)), None, "waveforms is (2, 2, 9) float64; want [N, L] or [N, 1, L]"),
        (np.zeros(9), None, "waveforms is (9,) float64; want [N, L] or [N, 1, L]"),
        (np.zeros((2, 9), np.int16), None, "waveforms is (2, 9) int16; want floating-point [N, L] or [N, 1, L]"),
    ],
)
def test_drawing_checks_its_arguments(waves, labels, message):
    assert message in error_line(draw_spectrograms, waves, labels, 8000)
