"""Extractors that are ONNX graphs get the input that they declare."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fastddpm.evaluate import features
from fastddpm.evaluate.features import load_extractor, resize
from tests.support.check import error_line

KINDS = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "bytes": TensorProto.UINT8, "int": TensorProto.INT64}
ANY = ("N", 3, "H", "W")


def pictures(n=5, h=4, w=6, c=3):
    return np.random.default_rng(7).integers(0, 256, (n, h, w, c), np.uint8)


def graph(path, shape=ANY, kind="float", nodes=None, inputs=None, initializers=()):
    """Save a graph that returns its input, as float32 [N, ...] and as it is."""
    nodes = nodes or [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Cast", ["flat"], ["features"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["x"], ["more"]),
    ]
    inputs = inputs or [helper.make_tensor_value_info("x", KINDS[kind], shape)]
    outputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("more", KINDS[kind], None),
    ]
    made = helper.make_graph(nodes, "net", inputs, outputs[: len(nodes) - 1], initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def unscaled(images, size=None):
    """Pixels 0..255 before they are scaled: [n, 3, H, W] float32."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
    return x if size is None else resize(x, *size)


def loaded(path, *, input_size=None, scale=None):
    return load_extractor(path, device="cpu", input_size=input_size, scale=scale)


@pytest.mark.parametrize("c", [1, 3])
def test_graph_of_any_size_gets_299_by_default(c, tmp_path):
    path, images = graph(tmp_path / "net.onnx"), pictures(2, c=c)
    assert torch.equal(loaded(path)(images), ((unscaled(images, (299, 299)) - 128) / 128).flatten(1))
    assert torch.equal(loaded(path, input_size=5, scale="unit")(images), (unscaled(images, (5, 5)) / 255).flatten(1))
    assert torch.equal(loaded(path, input_size=0, scale="unit")(images), (unscaled(images) / 255).flatten(1))
    assert torch.equal(loaded(path, scale="bytes")(images), unscaled(images).flatten(1))


def test_declared_size_is_used(tmp_path):
    path, images = graph(tmp_path / "net.onnx", ("N", 3, 7, 9)), pictures(2)
    assert torch.equal(loaded(path, scale="unit")(images), (unscaled(images, (7, 9)) / 255).flatten(1))
    assert (
        error_line(loaded, path, input_size=7)
        == f"input_size is 7, but {path} takes [7, 9] pixels; leave input_size out"
    )
    square = graph(tmp_path / "square.onnx", ("N", 3, 7, 7))
    assert torch.equal(loaded(square, input_size=7)(images), loaded(square)(images))
    half = graph(tmp_path / "half.onnx", ("N", 3, 7, "W"))
    assert loaded(half).size == (7, 299)
    assert loaded(half, input_size=7).size == (7, 7)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_declared_batch_size_is_filled_up(batch, tmp_path):
    path, images = graph(tmp_path / "net.onnx", (batch, 3, 4, 6)), pictures(5)
    assert torch.equal(loaded(path, scale="unit")(images), (unscaled(images) / 255).flatten(1))


def test_graph_of_uint8_gets_bytes(tmp_path):
    path, images = graph(tmp_path / "net.onnx", kind="bytes"), pictures()
    assert torch.equal(loaded(path)(images), unscaled(images).flatten(1))
    assert torch.equal(loaded(path, input_size=9)(images), unscaled(images, (9, 9)).round().flatten(1))
    assert error_line(loaded, path, scale="fid") == f"scale is 'fid', but {path} takes bytes; leave scale out"


def test_graph_of_float16_gets_float16(tmp_path):
    path, images = graph(tmp_path / "net.onnx", kind="half"), pictures()
    assert torch.equal(loaded(path, input_size=0)(images), ((unscaled(images) - 128) / 128).half().float().flatten(1))


def test_graph_of_one_channel_takes_only_grey_images(tmp_path):
    path = graph(tmp_path / "net.onnx", ("N", 1, 4, 6))
    images = pictures(c=1)
    assert torch.equal(loaded(path, scale="bytes")(images), unscaled(images)[:, :1].flatten(1))
    assert (
        error_line(loaded(path), pictures())
        == f"{path} takes grey images, but these are in colour; name another extractor"
    )


@pytest.mark.parametrize(
    ("shape", "kind"), [(("N", 3, "H"), "float"), (("N", 4, 6, 3), "float"), (("N", 2, 4, 4), "float"), (ANY, "int")]
)
def test_unsupported_input_raises(shape, kind, tmp_path):
    path = graph(tmp_path / "net.onnx", shape, kind)
    line = error_line(loaded, path)
    assert line.startswith(f"{path} takes x [")
    assert line.endswith("; want one input [N, C, H, W] of float or uint8, C = 1 or 3")


def test_two_inputs_raise(tmp_path):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "y"], ["features"]), helper.make_node("Identity", ["x"], ["more"])]
    path = graph(tmp_path / "net.onnx", nodes=nodes, inputs=inputs)
    line = error_line(loaded, path)
    assert line.startswith(f"{path} takes x ['N', 3] tensor(float), y ['N', 3] tensor(float); want one input")


def test_error_of_a_graph_names_its_input(tmp_path):
    path = graph(tmp_path / "net.onnx", nodes=failing_nodes())
    line = error_line(loaded(path, input_size=0), pictures())
    assert line.startswith(f"{path} fails on [5, 3, 4, 6] float32: ")
    assert line.endswith("; see --input-size and --scale")


def failing_nodes():
    """The nodes of a graph that adds a constant of another size."""
    constant = numpy_helper.from_array(np.zeros((1, 3, 5, 5), np.float32))
    return [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("Add", ["x", "c"], ["features"]),
    ]


def test_other_files_raise(tmp_path):
    (tmp_path / "net.onnx").write_text("no graph")
    line = error_line(loaded, tmp_path / "net.onnx")
    assert line.startswith(f"cannot load {tmp_path / 'net.onnx'} as ONNX: ")


def test_without_onnxruntime_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = graph(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert error_line(loaded, path) == f"{path} needs onnxruntime; pip install 'fastddpm[onnx]'"


def test_session_uses_torchs_threads_and_the_gpu(tmp_path, monkeypatch):
    seen = []
    session = onnxruntime.InferenceSession

    def spied(path, options, providers):
        seen.append((options.intra_op_num_threads, providers))
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", spied)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    path = graph(tmp_path / "net.onnx")
    loaded(path)
    features._load_onnx(path, torch.device("cuda:1"))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    loaded(path)
    features._load_onnx(path, torch.device("cuda:1"))
    cpu, gpu = "CPUExecutionProvider", ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})
    assert seen == [(3, [cpu]), (3, [cpu]), (3, [cpu]), (3, [gpu, cpu])]


@pytest.mark.parametrize("name", ["net.weights", f"{'w' * 140}.weights"])  # lengths of one and two bytes
def test_identity_covers_weights_in_another_file(tmp_path, name):
    path = tmp_path / "net.onnx"
    weight = numpy_helper.from_array(np.zeros((1, 3, 4, 6), np.float32), "w")
    nodes = [
        helper.make_node("Add", ["x", "w"], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["features"], axis=1),
    ]
    graph(path, nodes=nodes, initializers=[weight])
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location=name,
        size_threshold=0,
        convert_attribute=False,
    )
    before = loaded(path, input_size=0)
    assert torch.equal(before(pictures()), ((unscaled(pictures()) - 128) / 128).flatten(1))
    (tmp_path / name).write_bytes(np.ones((1, 3, 4, 6), np.float32).tobytes())
    after = loaded(path, input_size=0)
    assert torch.equal(after(pictures()), ((unscaled(pictures()) - 128) / 128 + 1).flatten(1))
    assert before.identity != after.identity
