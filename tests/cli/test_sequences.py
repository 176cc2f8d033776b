"""`fastddpm train`, `sample`, `likelihood` and `verify` of sounds, texts and other sequences."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import Sampler, checkpoints
from fastddpm.audio import Audio
from fastddpm.cli.main import main
from fastddpm.networks.unet1d import UNet1D
from fastddpm.storage.audio import read_wav, save_wav
from fastddpm.text import Text
from tests.support.command_line import error_line

NAMES = ["ada", "emmy", "sofia", "grace", "lise", "marie", "hedy", "rosalind"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SMALL = ["--channels", "8,16", "--groups", "4", "--batch-size", "4", "--sample-every", "2", "--quiet"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(data, out, *flags):
    assert main(["train", data, "--out", out, "--steps", "2", "--timesteps", "10", *SMALL, *flags]) == 0
    return out


def names(*flags):
    Path("names.txt").write_text("\n".join(NAMES) + "\n")
    return train("names.txt", "names", *flags)


def digits(*flags, code="spectrogram", rate=8000):
    x = np.random.default_rng(0).integers(-20000, 20000, (8, 64), np.int16)
    np.savez("digits.npz", x_train=x, y_train=np.arange(8) % 2, x_test=x[:3], y_test=np.arange(3) % 2, sample_rate=rate)
    conditional = ["--class-conditional", "--label-dropout", "0.1", "--frame", "8", "--code", code]
    return train("digits.npz", "digits", *conditional, *flags)


# Training


@pytest.mark.parametrize("code", ["bits", "embeddings"])
def test_texts_are_trained_and_printed(capsys, code):
    out = names("--code", code, "--prediction", "sample", "--beta-schedule", "sqrt")
    medium = Text("".join(sorted(set("".join(NAMES)))), 12, code)
    loaded = checkpoints.load(out)
    assert loaded.medium == medium
    assert isinstance(loaded.build(torch.device("cpu")), UNet1D)
    assert loaded.schedule.clip_sample == (code == "bits")
    assert os.listdir(f"{out}/samples") == ["step-0000002.txt"]
    capsys.readouterr()
    assert main(["sample", out, "--num-samples", "5", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    want = medium.decode(Sampler.from_pretrained(out).sample(5, seed=3, progress=False))
    assert printed == "".join(f"{name}\n" for name in want)
    assert not os.path.exists("samples.png")
    assert main(["sample", out, "--num-samples", "5", "--seed", "3", "--out", "drawn.txt", "--quiet"]) == 0
    assert Path("drawn.txt").read_text() == printed
    assert main(["sample", out, "--num-samples", "9", "--steps", "4", "--quiet", "--round"]) == 0
    x = Sampler.from_pretrained(out).sample(9, steps=4, progress=False, x_0_fn=medium.nearest)
    assert capsys.readouterr().out == "".join(f"{name}\n" for name in medium.decode(x))


def test_a_run_of_sequences_resumes():
    out = names()
    before = Path(out, WEIGHTS).read_bytes()
    assert train("names.txt", out) == out
    assert Path(out, WEIGHTS).read_bytes() == before
    more = ["--init", out, "--out", "more", "--steps", "1", "--batch-size", "4", "--sample-every", "0", "--quiet"]
    assert main(["train", "names.txt", *more]) == 0
    assert checkpoints.load("more").config == checkpoints.load(out).config


def test_a_continued_run_keeps_the_medium(capsys):
    out = names()
    Path("few.txt").write_text("ada\nhedy\n")  # of an alphabet of fewer letters
    more = ["--steps", "1", "--batch-size", "2", "--sample-every", "0", "--quiet"]
    assert main(["train", "few.txt", "--init", out, "--out", "more", *more]) == 0
    assert checkpoints.load("more").medium == checkpoints.load(out).medium
    digits()
    capsys.readouterr()
    for data, message in (("digits.npz", "holds waveforms with a sample rate, but the model's samples are texts"),):
        assert message in error_line(["train", data, "--init", out, "--out", "other", *more], capsys)
    flags = ["--init", out, "--code", "embeddings", "--out", "other", *more]
    assert "--init brings its own, bits" in error_line(["train", "few.txt", *flags], capsys)


def test_plain_sequences_are_trained_without_a_medium():
    np.save("x.npy", np.zeros(3))
    np.savez("x.npz", x=np.random.default_rng(0).normal(size=(6, 3, 16)).astype(np.float32))
    out = train("x.npz", "plain", "--kernel-size", "3")
    loaded = checkpoints.load(out)
    assert (loaded.medium, loaded.config["input_dim"], loaded.config["kernel_size"]) == (None, 3, 3)
    assert not loaded.schedule.clip_sample  # the data go beyond [-1, 1]
    assert os.listdir(f"{out}/samples") == ["step-0000002.npz"]


# Sounds


@pytest.mark.parametrize("code", ["waveform", "spectrogram"])
def test_sounds_are_written_as_wavs_with_a_picture(code):
    out = digits(code=code)
    medium = checkpoints.load(out).medium
    assert (medium.sample_rate, medium.code) == (8000, code)
    flags = ["--class-labels", "0-1", "--guidance-scale", "2", "--out", "drawn/", "--format", "wav", "--quiet"]
    assert main(["sample", out, *flags]) == 0
    assert sorted(os.listdir("drawn")) == [
        *(".shards", "00000.wav", "00001.wav", "dataset.json", "manifest.json", "spectrograms.png")
    ]
    x = Sampler.from_pretrained(out).sample(2, class_labels=[0, 1], guidance_scale=2.0, progress=False)
    want = medium.decode(x).clamp(-1, 1)
    for i in range(2):
        wave, _ = read_wav(f"drawn/0000{i}.wav", sample_rate=8000)
        assert np.abs(wave - want[i, 0].numpy()).max() <= 2**-15
    assert main(["sample", out, *flags]) == 0  # nothing is left to draw
    assert main(["sample", out, "--out", "waves", "--num-samples", "2", "--quiet"]) == 0  # wav is the default
    assert os.path.exists("waves/00001.wav")
    assert main(["sample", out, "--out", "all.png", "--quiet"]) == 0


@pytest.mark.parametrize("flags", [["--out", "all.png"], ["--out", "waves/", "--format", "wav", "--shard-size", "7"]])
def test_pictures_of_many_sounds_and_of_no_class(flags):
    """The null label has no name."""
    for digit in ("zero", "one"):
        os.makedirs(f"data/{digit}")
        for i in range(3):
            save_wav(f"data/{digit}/{i}.wav", np.sin(np.arange(60) / (3 + i)).astype(np.float32), 8000)
    out = train("data", "run", "--class-conditional", "--label-dropout", "0.5", "--sample-every", "1")
    assert main(["sample", out, "--class-labels", "0-2", "--num-samples", "30", "--quiet", *flags]) == 0


def test_written_wavs_are_read_again(capsys):
    out = digits()
    assert main(["sample", out, "--class-labels", "0-1", "--out", "drawn/", "--quiet"]) == 0
    again = train("drawn", "again", "--class-conditional", "--batch-size", "2")
    assert checkpoints.load(again).medium == Audio(8000)
    capsys.readouterr()
    assert main(["likelihood", out, "drawn", "--quiet", "--terms", "2"]) == 0


def test_a_folder_of_wavs_is_trained_on():
    for digit in ("zero", "one"):
        os.makedirs(f"waves/{digit}")
        for i in range(3):
            save_wav(f"waves/{digit}/{i}.wav", np.sin(np.arange(60) / (3 + i)).astype(np.float32), 8000)
    out = train("waves", "run", "--class-conditional")
    loaded = checkpoints.load(out)
    assert (loaded.classes, loaded.medium, loaded.config["sample_size"]) == (("one", "zero"), Audio(8000), 64)


# Likelihood and verify


def test_the_bound_of_texts_is_the_probability_of_their_bits(capsys):
    out = names()
    capsys.readouterr()
    assert main(["likelihood", out, "names.txt", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "a text is 12 symbols of 4 bits" in printed
    assert "bits per text" in printed
    assert main(["likelihood", out, "names.txt", "--json", "--quiet"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]["mean"]
    assert f"{total * 48:.2f} bits per text" in printed


def test_the_bound_refuses_to_overwrite_its_data_and_other_sample_rates(capsys):
    digits()
    capsys.readouterr()
    before = Path("digits.npz").read_bytes()
    message = error_line(["likelihood", "digits", "digits.npz:x_test", "--out", "digits.npz", "--quiet"], capsys)
    assert "digits.npz" in message
    assert Path("digits.npz").read_bytes() == before
    with np.load("digits.npz") as arrays:
        np.savez("other.npz", **{**arrays, "sample_rate": 16000})
    message = error_line(["likelihood", "digits", "other.npz", "--quiet"], capsys)
    assert "has 16000 Hz, but the model's samples have 8000 Hz; convert the waveforms: ffmpeg" in message


def test_the_bound_of_sounds(capsys):
    for code in ("waveform", "spectrogram"):
        out = digits("--out", f"digits-{code}", code=code)
        assert out
        assert main(["likelihood", f"digits-{code}", "digits.npz", "--quiet"]) == 0
        printed = capsys.readouterr().out
        assert "3 sounds of x_test" in printed
        assert ("does not say how many bits a sound takes" in printed) == (code == "spectrogram")


@pytest.mark.parametrize("make", [names, digits])
def test_verify_climbs_the_ladder(make, capsys):
    assert main(["verify", make(), "--quiet", "--device", "cpu"]) == 0
    assert "passed" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (names, ["--out", "x.png"], "samples are texts; want --out with the suffix .npz or .txt"),
        (
            names,
            ["--out", "x/", "--format", "npz", "--round"],
            "--round is for one file, not for a folder; use",
        ),
        (names, ["--parallel", "law", "--round"], "--round requires sequential steps; leave out --round"),
        (digits, ["--round"], "--round is for models of texts, such as names; leave it out"),
        (names, ["--out", "x/", "--format", "wav"], "medium.json does not describe sounds"),
        (digits, ["--out", "x.wav", "--format", "wav"], "--format wav writes a folder of WAV files"),
        (digits, ["--out", "x.txt"], "samples are sounds; want --out with the suffix .png or .npz"),
    ],
)
def test_errors_of_sample(make, flags, message, capsys):
    assert message in error_line(["sample", make(), "--quiet", *flags], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flip"], "flip is True, which is for images only"),
        (["--layers", "2"], "layers is 2, which is for images only"),
        (["--frame", "5"], "sequences have the length 12"),
        (["--code", "spectrogram"], "code is 'spectrogram'"),
        (["--variance-type", "learned_range"], "which is for images only"),
    ],
)
def test_errors_of_training(flags, message, capsys):
    Path("names.txt").write_text("\n".join(NAMES))
    arguments = ["train", "names.txt", "--out", "run", "--steps", "1", *SMALL, *flags]
    assert message in error_line(arguments, capsys)


def test_a_code_is_not_for_images(capsys, images_with_labels):
    flags = ["--out", "run", "--code", "bits", *SMALL]
    assert "--code is bits, but images.npz are images" in error_line(["train", "images.npz", *flags], capsys)


def test_a_letter_outside_the_alphabet_is_named(capsys):
    out = names()
    with open("other.txt", "w") as file:
        file.write("ada\nzoë\n")
    assert "text 1, 'zoë', has 'z', which is not in the alphabet" in error_line(
        ["likelihood", out, "other.txt"], capsys
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "kind is None"),
        ('{"kind": "audio"}', "does not describe audio"),
        ('{"kind": "smell"}', "kind is 'smell'"),
    ],
)
def test_a_damaged_medium_is_named(content, message, capsys):
    out = names()
    Path(out, "medium.json").write_text(content)
    assert message in error_line(["sample", out], capsys)
