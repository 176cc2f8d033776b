"""Sequences in .npz files, folders of WAV files and text files: what is loaded, what is refused, and their labels."""

import shutil
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from fastddpm.audio import Audio
from fastddpm.storage.datasets import load_classes, load_images, load_labels
from fastddpm.storage.sequences import is_sequences, load_sequences
from fastddpm.text import Text
from tests.support.check import error_line

WAVES = np.random.default_rng(0).integers(-32768, 32768, (5, 100), np.int16)
FLOATS = (WAVES / 32768).astype(np.float32)
LABELS = np.array([2, 0, 1, 1, 0])


@pytest.fixture
def npz(tmp_path):
    """Writes arrays to an .npz and returns its path."""

    def write(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return tmp_path / "x.npz"

    return write


def write_wav(path, samples, rate=8000, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)


# .npz


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
@pytest.mark.parametrize("shape", [(5, 100), (5, 1, 100), (5, 4, 25)])
def test_floats_become_float32(npz, dtype, shape):
    x = FLOATS.reshape(shape).astype(dtype)
    path = npz(x=x)
    data, medium = load_sequences(path)
    assert is_sequences(path)
    assert (data.dtype, data.shape, medium) == (np.float32, (5, 1, 100) if len(shape) == 2 else shape, None)
    assert data.dtype.isnative
    assert data.flags.c_contiguous
    assert np.array_equal(data, x.reshape(data.shape).astype(np.float32))


@pytest.mark.parametrize("dtype", ["<i2", ">i2"])
@pytest.mark.parametrize("shape", [(5, 100), (5, 1, 100)])
def test_int16_is_kept(npz, dtype, shape):
    path = npz(x_train=WAVES.reshape(shape).astype(dtype))
    data, medium = load_sequences(path)
    assert is_sequences(path)
    assert (data.dtype, medium) == (np.dtype(np.int16), None)
    assert np.array_equal(data, WAVES[:, None])


@pytest.mark.parametrize("x", [WAVES, FLOATS, FLOATS[:, None].astype(np.float64)])
@pytest.mark.parametrize("rate", [8000, np.array([8000]), np.uint16(8000), 8000.0])
def test_a_sample_rate_makes_them_waveforms(npz, x, rate):
    path = npz(x=x, sample_rate=rate)
    data, medium = load_sequences(path)
    assert is_sequences(path)
    assert medium == Audio(8000)
    assert np.array_equal(data[:, 0], x.reshape(5, 100))


def test_arrays_in_fortran_order(npz):
    data, _ = load_sequences(npz(x=np.asfortranarray(FLOATS.reshape(5, 4, 25))))
    assert np.array_equal(data, FLOATS.reshape(5, 4, 25))
    assert data.flags.c_contiguous


def test_arrays_are_found_by_the_names_of_images(npz, tmp_path):
    path = npz(x_train=WAVES, x_test=WAVES[:3], y_train=LABELS, y_test=LABELS[:3], sample_rate=8000)
    assert np.array_equal(load_sequences(path).data[:, 0], WAVES)
    assert np.array_equal(load_sequences(path, held_out=True).data[:, 0], WAVES[:3])
    assert np.array_equal(load_sequences(f"{path}:x_test").data[:, 0], WAVES[:3])
    assert load_sequences(f"{path}:x_test").medium == Audio(8000)
    assert is_sequences(f"{path}:x_test")
    assert not is_sequences(f"{path}:y_train")
    assert np.array_equal(load_sequences(npz(waves=WAVES, sample_rate=8000)).data[:, 0], WAVES)  # the only other array
    two = npz(one=WAVES, two=WAVES, sample_rate=8000)
    assert (
        f"it holds one, two; want an array named x_train, x, arr_0, images, train_images, or name one, as in {two}:one"
        in (error_line(load_sequences, two))
    )
    assert not is_sequences(two)


def test_labels_of_an_npz(npz):
    path = npz(x_train=WAVES, x_test=WAVES[:3], y_train=LABELS, y_test=LABELS[:3], sample_rate=8000)
    assert np.array_equal(load_labels(path, count=5), LABELS)
    assert np.array_equal(load_labels(path, count=3, held_out=True, classes=3), LABELS[:3])
    assert load_classes(path) is None
    named = f"{npz(waves=FLOATS, labels=LABELS[:, None], sample_rate=8000)}:waves"
    assert np.array_equal(load_labels(named, count=5), LABELS)
    assert load_classes(npz(x=FLOATS, y=LABELS)) is None
    assert np.array_equal(load_labels(npz(x=FLOATS, y=LABELS), count=5), LABELS)


TALL = np.zeros((5, 64, 1), np.float32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.zeros((5, 9), np.int32),
            "is [5, 9] int32; want floats, or int16 for waveforms, [N, L] or [N, C, L]; convert",
        ),
        (
            np.zeros((5, 9), np.uint8),
            "is [5, 9] uint8; want floats, or int16 for waveforms, [N, L] or [N, C, L]; convert",
        ),
        (np.zeros((5, 9), bool), "is [5, 9] bool; want floats, or int16 for waveforms, [N, L] or [N, C, L]; convert"),
        (np.zeros((5, 9), complex), "is [5, 9] complex128; want floats, or int16 for waveforms"),
        (np.zeros((5, 9), "U3"), "is [5, 9] <U3; want floats, or int16 for waveforms"),
        (
            np.zeros(90, np.int16),
            "is [90] int16; want floats, or int16 for waveforms, [N, L] or [N, C, L]; cut it into",
        ),
        (np.zeros((2, 3, 4, 5)), "is [2, 3, 4, 5] float64; want floats, or int16 for waveforms, [N, L] or [N, C, L]"),
        (np.zeros(()), "is [] float64; want floats"),
        (np.zeros((0, 9)), "is [0, 9] float64, which is empty; want"),
        (np.zeros((9, 3, 0)), "is [9, 3, 0] float64, which is empty; want"),
        (TALL, "is [5, 64, 1] float32, which looks like [N, L, C]; want [N, C, L]: x.transpose(0, 2, 1)"),
        (
            np.zeros((5, 64, 7)),
            "is [5, 64, 7] float64, which looks like [N, L, C]; want [N, C, L]: x.transpose(0, 2, 1)",
        ),
    ],
)
def test_other_arrays_are_refused(npz, x, message):
    path = npz(x=x)
    assert f"{path}: x {message}" in error_line(load_sequences, path)


@pytest.mark.parametrize("shape", [(5, 14, 8), (5, 2, 16), (5, 7, 7), (5, 3, 1)])
def test_few_positions_are_not_taken_for_channels(npz, shape):
    assert load_sequences(npz(x=np.zeros(shape))).data.shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_refused(npz, bad):
    x = FLOATS.astype(np.float64)
    x[1, 3] = x[4, 0] = bad
    path = npz(x=x)
    assert error_line(load_sequences, path) == (
        f"{path}: x has values that are not finite in samples [1, 4]; leave these out"
    )


def test_waveforms_outside_their_range_are_refused(npz):
    path = npz(x=np.array([[0.0, -3.5, 2.0]]), sample_rate=8000)
    want = f"{path}: x has values from -3.5 to 2; want waveforms in [-1, 1]: divide them, x / np.abs(x).max()"
    assert error_line(load_sequences, path) == want
    assert load_sequences(npz(x=np.array([[0.0, -3.5, 2.0]]))).data.min() == -3.5  # not waveforms


def test_waveforms_have_one_channel(npz):
    path = npz(x=np.zeros((5, 2, 50)), sample_rate=8000)
    want = (
        "is [5, 2, 50] float64 with a sample_rate; want waveforms of one channel, [N, L] or [N, 1, L]: mix the channels"
    )
    assert want in error_line(load_sequences, path)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (np.array([8000, 8000]), ": sample_rate is [2] int64; want one number, the samples per second"),
        (np.array("8000"), ": sample_rate is [] <U4; want one number, the samples per second"),
        (0, ": sample_rate is 0; want a whole number from 1 to 1000000"),
        (8000.5, ": sample_rate is 8000.5; want a whole number from 1 to 1000000"),
        (np.nan, ": sample_rate is nan; want a whole number from 1 to 1000000"),
    ],
)
def test_sample_rates_are_checked(npz, rate, message):
    path = npz(x=FLOATS, sample_rate=rate)
    assert error_line(load_sequences, path) == f"{path}{message}"


def test_damaged_files_are_refused(npz):
    path = npz(x=FLOATS)
    path.write_bytes(path.read_bytes()[:-30])
    assert f"cannot load {path} as .npz: " in error_line(load_sequences, path)
    assert not is_sequences(path)


def test_too_little_memory_is_an_error(npz, monkeypatch):
    path = npz(x=FLOATS)
    monkeypatch.setattr("fastddpm.storage.sequences._from_npz", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert (
        error_line(load_sequences, path) == f"the sequences of {path} do not fit in memory; use fewer, or shorter ones"
    )


# Folders of WAV files


@pytest.fixture
def folder(tmp_path):
    """Files of several lengths in the folders of three classes."""
    for name, samples in [("2/a.wav", WAVES[0]), ("10/b.WAV", WAVES[1][:70]), ("1/c.wav", WAVES[2][:1])]:
        write_wav(tmp_path / "waves" / name, samples)
    return tmp_path / "waves"


def test_waves_are_padded_with_zeros_and_kept_as_int16(folder):
    data, medium = load_sequences(folder)
    assert is_sequences(folder)
    assert (data.shape, data.dtype, medium) == ((3, 1, 128), np.int16, Audio(8000))
    want = np.zeros((3, 128), np.int16)
    want[0, :1], want[1, :70], want[2, :100] = WAVES[2][:1], WAVES[1][:70], WAVES[0]  # 1, 10, 2: as strings sort
    assert np.array_equal(data[:, 0], want)


def test_labels_of_waves_are_their_folders_in_natural_order(folder):
    assert load_classes(folder) == ("1", "2", "10")
    assert load_labels(folder, count=3).tolist() == [0, 2, 1]
    assert load_labels(folder, count=3, classes=["10", "2", "1", "3"]).tolist() == [2, 0, 1]


@pytest.mark.parametrize(("longest", "length"), [(1, 64), (64, 64), (65, 128), (128, 128)])
def test_lengths_are_padded_to_a_multiple_of_64(tmp_path, longest, length):
    write_wav(tmp_path / "a.wav", np.ones(longest, np.int16))
    assert load_sequences(tmp_path).data.shape == (1, 1, length)
    assert load_classes(tmp_path) is None


def test_flat_folders_have_no_labels(tmp_path):
    write_wav(tmp_path / "a.wav", WAVES[0])
    assert "a.wav has no class; want each image in a folder below" in error_line(load_labels, tmp_path, count=1)


def test_rates_must_be_equal(folder):
    write_wav(folder / "2/d.wav", WAVES[0], 16000)
    line = error_line(load_sequences, folder)
    assert (
        f"sample rates differ: {folder}/1/c.wav has 8000 Hz, {folder}/2/d.wav has 16000 Hz; convert the second: "
        in line
    )
    assert line.endswith(f"ffmpeg -i {folder}/2/d.wav -ar 8000 -ac 1 -c:a pcm_s16le out.wav")


def test_each_file_must_be_16_bit_mono(folder):
    write_wav(folder / "2/d.wav", FLOATS[0], subtype="PCM_24")
    assert f"{folder}/2/d.wav holds 1 channel of Signed 24 bit PCM at 8000 Hz; want" in error_line(
        load_sequences, folder
    )


def test_files_that_are_left_out_are_named(folder):
    (folder / "notes.txt").write_text("recorded at home")
    assert len(load_sequences(folder).data) == 3
    (folder / "2" / "e.flac").write_bytes(b"fLaC")
    with pytest.warns(
        UserWarning, match=r"1 of 5 files are left out, the first is 2/e.flac; the names of WAV files end"
    ):
        assert len(load_sequences(folder).data) == 3


def test_a_folder_with_images_is_not_sequences(folder):
    Image.new("L", (4, 4)).save(folder / "1" / "cover.png")
    assert not is_sequences(folder)
    assert f"{folder} is a folder without WAV files, or with images beside them; want an .npz" in error_line(
        load_sequences, folder
    )
    (folder / "1" / "cover.png").rename(folder / "1" / ".cover.png")
    assert is_sequences(folder)


def test_loading_images_from_waves_is_refused(folder):
    assert "holds no images: 3 of 3 files are left out" in error_line(load_images, folder)


def test_soundfile_is_needed_to_read_wavs_not_to_recognise_them(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert is_sequences(folder)
    assert load_labels(folder, count=3).tolist() == [0, 2, 1]
    assert f"{folder}/1/c.wav needs soundfile; pip install 'fastddpm[audio]'" == error_line(load_sequences, folder)


# Text


@pytest.mark.parametrize("name", ["names.txt", "NAMES.TXT"])
@pytest.mark.parametrize("code", ["bits", "embeddings"])
def test_texts(tmp_path, name, code):
    (tmp_path / name).write_text("emma\n\nolivia\nö\n", "utf-8")
    data, medium = load_sequences(tmp_path / name, code=code)
    assert is_sequences(tmp_path / name)
    assert medium == Text("aeilmovö", 8, code)
    assert (data.dtype, data.shape) == (np.float32, (3, *medium.shape))
    assert medium.decode(data) == ["emma", "olivia", "ö"]


def test_texts_have_no_labels(tmp_path):
    (tmp_path / "names.txt").write_text("emma\n")
    assert load_classes(tmp_path / "names.txt") is None
    want = f"{tmp_path}/names.txt is a text file, which has no class labels; leave them (--class-conditional) out"
    assert error_line(load_labels, tmp_path / "names.txt", count=1) == want


def test_errors_of_texts_name_the_file(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"ok\n\xff\n")
    assert f"{tmp_path}/names.txt is not UTF-8 in line 2" in error_line(load_sequences, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_bytes(b"ok\n")
    assert "code is 'byte'; want one of bits, embeddings" in error_line(
        load_sequences, tmp_path / "names.txt", code="byte"
    )


# What is neither


def test_images_are_not_sequences(npz, tmp_path):
    assert not is_sequences(npz(x=np.zeros((5, 8, 8), np.uint8)))
    assert not is_sequences(npz(x=np.zeros((5, 8, 8, 3))))
    assert not is_sequences(npz(x=np.zeros(5)))
    np.save(tmp_path / "x.npy", FLOATS)
    shutil.copy(tmp_path / "x.npy", tmp_path / "x.bin")
    (tmp_path / "empty").mkdir()
    for name in ("x.npy", "x.bin", "empty", "absent", "absent.txt", "x.npy:x"):
        assert not is_sequences(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    assert not is_sequences(tmp_path / "folder.txt")


def test_other_paths_are_refused(tmp_path, npz):
    wanted = (
        "want an .npz with floats or int16 [N, L] or [N, C, L], a folder of WAV files, or a .txt with a text per line"
    )
    np.save(tmp_path / "x.npy", FLOATS)
    assert error_line(load_sequences, tmp_path / "x.npy") == f"{tmp_path}/x.npy is of unknown type; {wanted}"
    (tmp_path / "empty").mkdir()
    assert error_line(load_sequences, tmp_path / "empty").endswith(
        f"is a folder without WAV files, or with images beside them; {wanted}"
    )
    line = f"cannot read {tmp_path}/absent.txt: No such file or directory; {wanted}"
    assert error_line(load_sequences, tmp_path / "absent.txt") == line
    (tmp_path / "names.txt").write_text("emma\n")
    assert error_line(load_sequences, f"{tmp_path}/names.txt:x") == f"{tmp_path}/names.txt is not an .npz; leave out :x"
    assert error_line(load_sequences, 3) == "path is 3; want a path"
    assert error_line(load_sequences, tmp_path, held_out=1) == "held_out is 1; want True or False"


def test_square_floats_are_probably_images(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 28, 28), np.float32))
    assert not is_sequences(tmp_path / "x.npz")
    assert load_sequences(tmp_path / "x.npz").data.shape == (2, 28, 28)
