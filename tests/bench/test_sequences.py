"""How drawn names and digits are judged: the n-gram model, the classifier, the measures and the commands."""

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from bench import digit_classifier, digit_data, digits, names
from bench.digit_classifier import DigitClassifier
from bench.ngram import NGram, bits_per_letter
from fastddpm import Schedule, UNet1D, checkpoints
from fastddpm.audio import Audio
from fastddpm.text import Text

RNG = np.random.default_rng(0)
TRAIN = ["ada", "adele", "emma", "emmy", "ella", "lea"]
TINY = {"down_dims": (8,), "diffusion_step_embed_dim": 8, "n_groups": 4, "kernel_size": 1}


def test_probabilities_after_each_context_add_up_to_one():
    table = NGram("adelmy", n=3).fit(TRAIN).table
    assert table.shape == (49, 7)
    assert np.abs(table.sum(1) - 1).max() < 1e-6
    assert (table > 0).all()


def test_an_order_of_one_counts_letters():
    """Witten and Bell: (count + lambda * distinct * lower) / (total + lambda * distinct)."""
    model = NGram("ab", n=1, smoothing=1.0).fit(["ab", "aa"])  # a a a b end end
    want = (np.array([2, 3, 1]) + 3 / 3) / (6 + 3)
    assert np.allclose(model.table, want)
    bits, error = bits_per_letter(model.bits(["ab"]), ["ab"])
    assert bits == pytest.approx(-np.log2(want[[1, 2, 0]]).mean())
    assert error == 0


def test_training_texts_take_fewer_bits_than_others_and_samples_follow_the_model():
    model = NGram("adelmy", n=4, smoothing=0.1).fit(TRAIN)
    known, other = (bits_per_letter(model.bits(texts), texts)[0] for texts in (TRAIN, ["yyde", "mlad"]))
    assert known < 1.5 < other
    drawn = model.sample(200, seed=1)
    assert drawn == model.sample(200, seed=1)
    assert bits_per_letter(model.bits(drawn), drawn)[0] < 2
    assert set(TRAIN) & set(drawn)


def test_names_are_measured(tmp_path, capsys):
    torch.manual_seed(0)  # otherwise 50 samples may be without a valid one
    text = Text.fit(TRAIN, "embeddings")
    net = UNet1D(**TINY, input_dim=16, frame=8, sample_size=8)
    schedule = Schedule(num_train_timesteps=4, prediction_type="sample", clip_sample=False)
    checkpoints.save(tmp_path / "model", net.config, net.state_dict(), schedule, medium=text)
    for name, texts in (("train.txt", TRAIN), ("held-out.txt", ["emmaly", "ada"])):
        (tmp_path / name).write_text("\n".join(texts))
    files = [str(tmp_path / name) for name in ("train.txt", "held-out.txt")]
    options = ["--checkpoint", str(tmp_path / "model"), "--num-samples", "50", "--json", str(tmp_path / "x.json")]
    options += ["--out", str(tmp_path / "x.png")]
    names.main([*files, *options])
    printed = capsys.readouterr().out
    assert printed.count("| ") > 30
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1100, 340)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [one["title"] for one in found] == [*names.SETTINGS, "held-out names", "drawn from the 5-gram model"]
    assert found[-2]["held_out"] == 1
    assert found[-2]["new"] == 0.5  # ada is known


@pytest.fixture
def data(tmp_path):
    x = np.random.default_rng(0).integers(-9000, 9000, (40, 2048), np.int16)
    y = np.arange(40) % 10
    np.savez(tmp_path / "digits.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20], sample_rate=8000)
    return str(tmp_path / "digits.npz")


def test_features_do_not_depend_on_gain_or_offset():
    torch.manual_seed(0)
    model, x = DigitClassifier().eval(), torch.randn(3, 2048) * 0.1
    want = digit_classifier.in_parts(model.features, x)
    assert torch.allclose(digit_classifier.in_parts(model.features, 3 * x + 0.2), want, atol=1e-4)
    loud = model.spectrogram(torch.sin(torch.arange(2048) * 2 * torch.pi * 1000 / 8000)[None])
    peak = int(loud.mean(2).argmax())
    low, high = (2595 * np.log10(1 + f / 700) for f in (60, 3800))
    assert abs(peak - ((2595 * np.log10(1 + 1000 / 700) - low) / (high - low) * 41 - 1)) < 1


def test_a_classifier_is_trained_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(digit_classifier.train, "__kwdefaults__", {"epochs": 1, "batch": 20})
    path = tmp_path / "classifier.pt"
    before = digit_classifier.load_or_train(path, data).state_dict()
    again = digit_classifier.load_or_train(path, "gone.npz").state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a classifier of this command"):
        digit_classifier.load_or_train(path, data)


def test_the_recordings_become_one_file(tmp_path, capsys):
    clips = {"3_ann_4": RNG.integers(-99, 99, 50), "9_bob_12": RNG.integers(-99, 99, 6144), "9_bob_5": np.zeros(6145)}
    for name, clip in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", clip.astype(np.int16), 8000)
    out = tmp_path / "digits.npz"
    digit_data.main([str(tmp_path), str(out)])
    assert capsys.readouterr().out == f"{out}: 1 clips to train, 1 to test\n"
    arrays = np.load(out)
    assert (arrays["y_train"].tolist(), arrays["y_test"].tolist(), int(arrays["sample_rate"])) == ([9], [3], 8000)
    x = arrays["x_test"][0].astype(float)
    scale = 0.95 * 32768 / np.abs(clips["3_ann_4"]).max()
    assert np.abs(x[:50] - scale * clips["3_ann_4"]).max() <= 0.5
    assert not x[50:].any()
    soundfile.write(tmp_path / "9_bob_6.wav", np.zeros(9, np.int16), 16000)
    with pytest.raises(ValueError, match=r"9_bob_6.wav has 16000 Hz; want 8000 Hz"):
        digit_data.collect(tmp_path)
    (tmp_path / "9_bob_6.wav").rename(tmp_path / "9.wav")
    with pytest.raises(ValueError, match=r"9.wav is no recording of the dataset; want names such as 7_jackson_12.wav"):
        digit_data.collect(tmp_path)
    with pytest.raises(ValueError, match="lacks recordings"):
        digit_data.collect(tmp_path / "no")


def test_digits_are_measured(data, tmp_path, capsys):
    torch.save(DigitClassifier().state_dict(), tmp_path / "classifier.pt")
    net = UNet1D(**TINY, input_dim=128, sample_size=32, num_class_embeds=11)
    medium = Audio(8000, "spectrogram")
    checkpoints.save(
        tmp_path / "model", net.config, net.state_dict(), Schedule(num_train_timesteps=4), null_label=10, medium=medium
    )
    options = ["--checkpoint", str(tmp_path / "model"), "--classifier", str(tmp_path / "classifier.pt")]
    options += ["--num-samples", "20", "--samples", str(tmp_path / "drawn"), "--out", str(tmp_path / "sound.png")]
    digits.main([data, *options, "--json", str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert [one["title"] for one in found] == [*(title for _, title in digits.SETTINGS.values()), "held-out clips"]
    assert found[3]["nearest"] == 0  # they are among the training clips
    with Image.open(tmp_path / "sound.png") as picture:
        assert picture.size == (1100, 480)
    digits.main([data, *options])  # from the folder
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        digits.main([data, *options, "--steps", "2"])
    assert "full.npz was drawn by another model or with other options" in capsys.readouterr().err


def test_clipping_silence_and_offsets_are_measured():
    torch.manual_seed(0)
    model, t = DigitClassifier().eval(), torch.arange(2000) / 8000
    x = (1.1 * torch.sin(2 * torch.pi * 200 * t)).clamp(-1, 1).expand(20, -1).clone()
    x[:, -100:] = 0.01
    found = digits.measure("x", x, torch.arange(20) % 10, [1.0, 2.0], model.spectrogram(x).flatten(1).detach(), model)
    assert (found.clipped, round(found.end_db), found.nearest) == (1.0, -40, 0.0)
    assert found.peak == 1
    at_full_scale = torch.sin(2 * torch.pi * 90 * t).expand(20, -1)
    at_full_scale = at_full_scale / at_full_scale.abs().max()
    found = digits.measure("x", at_full_scale, torch.arange(20) % 10, [1.0, 2.0], torch.zeros(1, 40 * 32), model)
    assert (found.peak, found.clipped) == (1.0, 0.0)
    quiet = digits.measure("x", x / 2 + 0.1, torch.arange(20) % 10, [1.0, 2.0], torch.zeros(1, 40 * 32), model)
    assert (quiet.clipped, round(quiet.dc, 2)) == (0.0, 0.1)
