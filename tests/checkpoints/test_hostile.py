"""Files that are damaged or hostile: one line that names the file, in little memory, without advice of others."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm import Schedule, checkpoints
from tests.support.check import error_line

NAME = "diffusion_pytorch_model"
CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json")


def edit(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def as_pickle(folder: Path, content: object, **options: object) -> Path:
    """Replace the weights by what torch.save makes of content."""
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    torch.save(content, path := folder / "unet" / f"{NAME}.bin", **options)
    return path


# Arguments


@pytest.mark.parametrize("source", [0, 1.5, None, b"folder", ["folder"], object, True, ""])
def test_source_is_a_path(source):
    line = error_line(checkpoints.load, source)
    assert line.startswith("the checkpoint is ")
    assert "want a folder, one of fashion-mnist, " in line


@pytest.mark.parametrize("source", ["x" * 100_000, "a/" + "b" * 5000, "a\0b", "a/\x1b[2Jb", "\ud800/x", "a\n/b"])
def test_odd_names_are_shown_short_and_printable(source):
    line = error_line(checkpoints.load, source)
    assert line.startswith("there is no folder ")
    assert line.isprintable()
    assert len(line) < 400


@pytest.mark.parametrize("schedule", [0, {}, "linear"])
def test_schedule_is_a_schedule(folder, schedule):
    assert "want a Schedule" in error_line(checkpoints.load, folder, schedule=schedule)
    assert "want a Schedule" in error_line(checkpoints.save, folder, {}, {}, schedule)


@pytest.mark.parametrize("out", [0, b"x", "", "a\0b", None])
def test_folder_to_save_is_a_path(out):
    line = error_line(checkpoints.save, out, {}, {}, checkpoints.load(checkpoints.shipped_model()).schedule)
    assert line.startswith("folder is ")


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 16])
def test_dtype_to_save_is_of_floating_point(folder, dtype):
    schedule = checkpoints.load(folder).schedule
    assert error_line(checkpoints.save, folder, {}, {}, schedule, dtype=dtype).startswith("dtype is ")


# Configurations


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("content", "want"),
    [
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a": ' * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON: ValueError: an integer has 5001 digits"),
        (b'{"a": "' + b"x" * (1 << 24) + b'"}', "has more than 16 MB"),
        (b'{"a": 1\0}', "is not valid JSON"),
        (b"null", "holds a JSON NoneType; want an object of options"),
        (b"NaN", "holds a JSON float; want an object of options"),
    ],
    ids=["lists", "objects", "integer", "size", "null byte", "null", "nan"],
)
def test_damaged_json(folder, name, content, want):
    (folder / name).write_bytes(content)
    line = error_line(checkpoints.load, folder)
    assert line.startswith(f"{folder / name} {want}")
    assert "set_int_max_str_digits" not in line


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("unet/config.json", "norm_eps", math.inf),
        ("unet/config.json", "norm_eps", math.nan),
        ("unet/config.json", "center_input_sample", "false"),
        ("unet/config.json", "add_attention", "false"),
        ("unet/config.json", "num_class_embeds", "3"),
        ("unet/config.json", "num_class_embeds", -1),
        ("unet/config.json", "time_embedding_dim", 2.5),
        ("unet/config.json", "sample_size", {"height": 8}),
        ("unet/config.json", "sample_size", 10**23),
        ("unet/config.json", "layers_per_block", 20_000),
        ("unet/config.json", "block_out_channels", [10**23, 16]),
        ("unet/config.json", "attn_norm_num_groups", [4]),
        ("unet/config.json", "_class_name", ["UNet2DModel"]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**23),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "beta_start", -1e-4),
        ("scheduler/scheduler_config.json", "beta_end", math.inf),
        ("scheduler/scheduler_config.json", "clip_sample", "false"),
        ("scheduler/scheduler_config.json", "clip_sample_range", [1]),
        ("scheduler/scheduler_config.json", "trained_betas", {"0": 0.1}),
        ("scheduler/scheduler_config.json", "predict_epsilon", "false"),
        ("scheduler/scheduler_config.json", "steps_offset", 1.5),
        ("scheduler/scheduler_config.json", "_class_name", None),
    ],
)
def test_values_name_the_file_and_the_option(folder, name, option, value):
    edit(folder, name, **{option: value})
    line = error_line(checkpoints.load, folder)
    assert line.startswith(str(folder / name))
    assert option in line or option == "_class_name"


def test_odd_keys_are_escaped(folder):
    edit(folder, "unet/config.json", **{"\ud800\x1b[2J": 1})
    line = error_line(checkpoints.load, folder)
    assert line.isprintable()
    assert r"\ud800\x1b[2J" in line


def test_configuration_larger_than_the_weights_is_refused(folder):
    """Before memory is allocated: 40 times the parameters that the file holds."""
    edit(folder, "unet/config.json", block_out_channels=[64, 128])
    line = error_line(checkpoints.load, folder)
    assert line.startswith(f"{folder / 'unet' / 'config.json'} configures a network of ")
    assert line.endswith("numbers; want the configuration that they were saved with")


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json", f"unet/{NAME}.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipes_and_folders_are_not_read(folder, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    want = "a pipe or a device" if kind == "pipe" else "a folder"
    assert error_line(checkpoints.load, folder) == f"{folder / name} is {want}; want a file"


def test_dangling_link_is_named(folder):
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to("gone")
    line = error_line(checkpoints.load, folder)
    assert line == f"cannot read {folder / 'unet' / 'config.json'}: No such file or directory"


# Several files under an index


@pytest.mark.parametrize(
    "name",
    ["../{}.safetensors", "/etc/passwd", "sub/{}.safetensors", "..", ".", "", "C:{}", "a\\b", "a\0b", "x" * 100_000],
    ids=lambda name: name[:20],
)
def test_index_names_files_of_its_folder(folder, name):
    path = folder / "unet" / f"{NAME}.safetensors"
    path.rename(folder / path.name)
    index = folder / "unet" / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name.format(NAME)}}))
    line = error_line(checkpoints.load, folder)
    assert line.startswith(f"{index} names the file ")
    assert line.endswith("; want names of files in the same folder")
    assert line.isprintable()
    assert len(line) < 600


def test_pipe_under_an_index_is_not_read(folder):
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    (folder / "unet" / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pipe"}}))
    os.mkfifo(folder / "unet" / "pipe")
    assert error_line(checkpoints.load, folder) == f"{folder / 'unet' / 'pipe'} is a pipe or a device; want a file"


def test_parameter_in_two_files_is_refused(folder):
    path = folder / "unet" / f"{NAME}.safetensors"
    content = load_file(path)
    save_file(content, folder / "unet" / "a.safetensors")
    save_file({"conv_in.weight": content["conv_in.weight"] + 1}, folder / "unet" / "b.safetensors")
    path.unlink()
    index = folder / "unet" / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": "a.safetensors", "conv_in.weight": "b.safetensors"}}))
    assert error_line(checkpoints.load, folder).startswith(f"{index} names several files that hold conv_in.weight")


# Tensors


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(1).expand(10**12),
        "text",
        None,
        {"nested": torch.zeros(3)},
    ],
    ids=["sparse", "meta", "complex", "int", "bool", "expanded", "str", "None", "dict"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_only_dense_numbers_are_weights(folder, value, zipped):
    path = as_pickle(folder, {"conv_in.weight": value}, _use_new_zipfile_serialization=zipped)
    line = error_line(checkpoints.load, folder)
    assert line.startswith(f"{path} holds entries that are not dense floating-point tensors (conv_in.weight)")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about how the tensors are made
@pytest.mark.parametrize("kind", ["quantised", "csr"])
def test_kinds_of_tensors_that_torch_warns_about(folder, kind):
    value = torch.eye(4)
    value = torch.quantize_per_tensor(value, 1.0, 0, torch.qint8) if kind == "quantised" else value.to_sparse_csr()
    as_pickle(folder, {"conv_in.weight": value})
    assert "not dense floating-point tensors (conv_in.weight)" in error_line(checkpoints.load, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_safetensors_of_other_dtypes(folder, dtype):
    path = folder / "unet" / f"{NAME}.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    assert error_line(checkpoints.load, folder).startswith(f"{path} holds entries that are not dense floating-point")


@pytest.mark.parametrize("dtype", ["F32", "X99", "F4", 3, None, [], "F8_E8M0"])
@pytest.mark.parametrize("shape", [[-1], [1 << 62, 1 << 62], "x", [10**23], [4]])
def test_hostile_headers_of_safetensors(folder, dtype, shape):
    path = folder / "unet" / f"{NAME}.safetensors"
    header = json.dumps({"conv_in.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert error_line(checkpoints.load, folder).startswith(str(path))


def test_names_of_parameters_are_shown_short_and_printable(folder):
    path = folder / "unet" / f"{NAME}.safetensors"
    save_file(load_file(path) | {"x" * 100_000: torch.zeros(1), "\x1b[2J": torch.zeros(1)}, path)
    module = torch.nn.Linear(2, 2)
    line = error_line(checkpoints.load_into, module, checkpoints.load(folder).parameters)
    assert line.isprintable()
    assert len(line) < 1000


# Pickles


def rewritten(path: Path, compression: int, change: dict[str, bytes]) -> None:
    """Write the archive again, with other contents of the entries that end in the keys of `change`."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, next((new for end, new in change.items() if name.endswith(end)), content))


def peak_mb(folder: Path) -> tuple[float, str]:
    """The memory that a fresh process takes for the error of loading a folder, and that error."""
    script = (
        "import resource, sys; from fastddpm import checkpoints\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: checkpoints.load(sys.argv[1])\n"
        "except ValueError as error: text = str(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, text)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    megabytes, _, text = done.stdout.partition(" ")
    return float(megabytes), text.strip()


def test_bombs_are_not_unpacked(folder):
    path = as_pickle(folder, {"conv_in.weight": torch.zeros(8)})
    rewritten(path, zipfile.ZIP_DEFLATED, {"data/0": bytes(1 << 29)})
    assert path.stat().st_size < 1 << 20
    megabytes, text = peak_mb(folder)
    assert text.startswith(f"{path} is damaged or holds more than weights, so it was not loaded")
    assert megabytes < 100


def test_an_entry_marked_as_a_folder_is_damage(folder):
    """Of such an entry torch.load returns memory without values; one flipped bit makes it."""
    path = as_pickle(folder, {"conv_in.weight": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)  # of the second entry
    content[directory + 38] ^= 0x10
    path.write_bytes(content)
    assert error_line(checkpoints.load, folder).startswith(f"{path} is damaged")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_compressed_and_damaged_archives(folder, compression, keep):
    path = as_pickle(folder, {"conv_in.weight": torch.zeros(1000)})
    rewritten(path, compression, {})
    content = bytearray(path.read_bytes())
    content[int(len(content) * keep * 0.5)] ^= 0xFF
    path.write_bytes(content)
    assert error_line(checkpoints.load, folder).startswith(str(path))


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


def tar(path: Path) -> None:
    tarfile.open(path, "w").close()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": Hostile()}, path),
        lambda path: torch.save({"a": Hostile()}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(pickle.dumps({"a": Hostile()})),
        lambda path: path.write_bytes(pickle.dumps({"a": bytearray(10)}, protocol=5)),
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 143003468\n"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(b"\x80\x02" + b"(" * 1_000_000 + b"."),
        lambda path: path.write_bytes(bytes(1000)),
        tar,
    ],
)
def test_advice_is_ours(folder, write):
    path = as_pickle(folder, {})
    write(path)
    line = error_line(checkpoints.load, folder)
    assert line.startswith(f"{path} is damaged or holds more than weights, so it was not loaded")
    assert "download it again" in line
    for theirs in ("weights_only", "add_safe_globals", "Invalid argument", "allow_pickle", "Re-running"):
        assert theirs not in line


def test_foreign_name_is_said(folder):
    as_pickle(folder, {"a": Hostile()})
    name = f"{os.system.__module__}.system"
    assert f"not loaded (it refers to {name}); download it again" in error_line(checkpoints.load, folder)


def test_flipped_bytes_of_a_pickle_raise_no_other_error(folder, unet):
    path = as_pickle(folder, unet.state_dict())
    content = path.read_bytes()
    for at in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        with suppress(ValueError):
            checkpoints.load(folder)


@pytest.mark.parametrize("keep", range(0, 1500, 100))
def test_truncated_pickle_of_the_old_format(folder, unet, keep):
    buffer = io.BytesIO()
    torch.save(unet.state_dict(), buffer, _use_new_zipfile_serialization=False)
    path = as_pickle(folder, {})
    path.write_bytes(buffer.getvalue()[:keep])
    assert error_line(checkpoints.load, folder).startswith(f"{path} is damaged or holds more than weights")


@pytest.mark.parametrize(
    ("wrong", "want"),
    [
        ({"config": None}, "config is None; want the options of a UNet2D by name"),
        ({"config": {"norm_eps": 1j}}, "UNet2D: norm_eps is 1j; want a finite number, above 0, at most 1"),
        ({"state_dict": [1]}, "state_dict is [1]; want parameters by name, such as unet.state_dict()"),
        ({"state_dict": {"a": 1}}, "state_dict is {'a': 1}; want parameters by name, such as unet.state_dict()"),
        ({"pipeline": "no"}, "pipeline is 'no'; want True or False"),
        ({"folder": "\ud800"}, "folder is '\\ud800', which cannot be the name of a file; name another"),
    ],
)
def test_save_refuses_wrong_types(tmp_path, unet, wrong, want):
    arguments = {"folder": tmp_path, "config": {}, "state_dict": unet.state_dict(), "schedule": Schedule()}
    assert error_line(partial(checkpoints.save, **(arguments | wrong))) == want


def test_numbers_of_numpy_are_saved(tmp_path, unet):
    options = {"sample_size": np.int64(8), "norm_eps": np.float64(1e-5)}
    checkpoints.save(tmp_path, options, unet.state_dict(), Schedule())
    saved = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert {name: saved[name] for name in options} == {"sample_size": 8, "norm_eps": 1e-5}
