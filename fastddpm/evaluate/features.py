"""Extractors: networks that map images to features, by which sets of images are compared.

An extractor is the bundled classifier, or a TorchScript or ONNX file such as the Inception network of the FID. Images
are resized as TensorFlow 1 did for the published FIDs, which other ways of resizing do not reproduce.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.core.checks import is_whole, one_of, shown, whole
from fastddpm.core.memory import halved, is_out_of_memory
from fastddpm.core.names import SHIPPED_CLASSIFIER
from fastddpm.core.precision import Compute, arithmetic
from fastddpm.storage.files import check_regular

SIDE, CLASSES, FEATURES = 28, 10, 128  # of the bundled classifier
INPUT_SIZE = 299  # of Inception
LARGEST_INPUT = 16384  # 3 GiB an image
INCEPTION_PER_S = 10  # images that it takes per second on one core of a Xeon, in batches of 8; in batches of 64, 8
# pixels in a batch by default
PIXELS_PER_EXTRACTION = {"cpu": 8 * INPUT_SIZE**2, "cuda": 256 * INPUT_SIZE**2}
# how pixels 0..255 are scaled for the network, by the names in core.names.SCALE_NAMES
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "fid": lambda x: (x - 128) / 128,
    "unit": lambda x: x / 255,
    "signed": lambda x: x / 127.5 - 1,
    "bytes": lambda x: x.round().to(torch.uint8),
}
_ONNX_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}


class Classifier(nn.Module):
    """Classifies Fashion-MNIST with two convolutions and two linear layers. The features are the last layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 10] logits of [N, 1, 28, 28] in [-1, 1]."""
        return self.head(self.features(x))


def shipped_classifier() -> Classifier:
    """The bundled classifier, on the CPU; see the README.md beside its weights."""
    from safetensors.torch import load_file

    with torch.device("cpu"):
        model = Classifier().float()
    model.load_state_dict(load_file(_classifier_file()))
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@dataclass(frozen=True)
class Extractor:
    """Maps images, uint8 [n, H, W, C] with C = 1, 3 or 4, to features, float32 [n, D] on the CPU.

    Attributes:
        name: the source that it was loaded from.
        identity: SHA-256 of the network and of how images are prepared for it.
        network: takes [n, channels, *size] on the device. Returns the features as [n, D] or [n, D, 1, 1], or a list or
            tuple whose first item they are.
        channels: 1 or 3: grey images are repeated, and alpha is dropped. None: the channels of the images.
        size: (H, W) to which images are resized. None: the size of the images.
        scale: one of SCALES.
        device: of the network.
    """

    name: str
    identity: str
    network: Callable[..., Any]
    channels: int | None
    size: tuple[int, int] | None
    scale: str
    device: torch.device

    def batch_size(self, images: np.ndarray) -> int:
        """The default batch size for such images."""
        height, width = self.size or images.shape[1:3]
        return max(1, PIXELS_PER_EXTRACTION[self.device.type] // (height * width))

    def prepare(self, images: np.ndarray) -> Tensor:
        """Convert uint8 images [n, H, W, C] to the network's input: float32, or uint8 for the scale bytes."""
        x = torch.from_numpy(images).to(self.device).movedim(-1, 1)
        if x.shape[1] == 4:
            x = x[:, :3]
        if self.channels == 1 and x.shape[1] == 3:
            raise ValueError(f"{self.name} takes grey images, but these are in colour; name another extractor")
        x = x.expand(-1, self.channels or -1, -1, -1).float()
        x = SCALES[self.scale](x if self.size is None else resize(x, *self.size))
        return x.contiguous(memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray) -> Tensor:
        """Raises: ValueError: the network fails, or returns no finite features."""
        x = self.prepare(images)
        try:
            with torch.inference_mode(), arithmetic("fp32", self.device):
                out = self.network(x)
        except Exception as error:
            if isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            cause = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise ValueError(
                f"{self.name} fails on {_shape_and_dtype(x)}: {cause}; see --input-size and --scale"
            ) from error
        out = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2:] == (1, 1):
            out = out.flatten(1)
        wrong = not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != len(x) or out.shape[1] == 0
        if wrong or not out.is_floating_point() or out.layout != torch.strided:
            came = _shape_and_dtype(out) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name} returns {came} for {len(x)} images; want features [{len(x)}, D], D >= 1")
        features = out.float()
        if not features.isfinite().all():
            came = "numbers beyond float32" if out.isfinite().all() else "NaN or infinity"
            raise ValueError(f"{self.name} returns {came}; see --scale, or name another extractor")
        return features.cpu()


def load_extractor(
    source: str | os.PathLike[str] = SHIPPED_CLASSIFIER,
    *,
    device: torch.device | str | None = None,
    input_size: int | None = None,
    scale: str | None = None,
) -> Extractor:
    """Load an extractor in this process; `isolated.load_extractor` loads one in a process of its own.

    Args:
        source: "fashion-mnist": the bundled classifier, for grey images of 28 x 28;
            an .onnx file: a graph with one input [N, C, H, W], which ONNX Runtime runs, on the GPU if it can;
            any other file: TorchScript, which can run any code. If its forward has an argument `return_features`, as
            NVIDIA's Inception does, that is True.
        device: None: the GPU if there is one, else the CPU.
        input_size: resize images to squares of so many pixels for a file's network; 0: do not resize. By default, the
            size that an ONNX graph declares, else 0 for the scale bytes, else Inception's 299.
        scale: how the network takes pixels: "fid", (x - 128) / 128, the default; "unit", x / 255; "signed",
            x / 127.5 - 1; "bytes", uint8, the default for an ONNX graph that takes uint8.
    Raises: ValueError: an argument is not as above, the file is not a network, or onnxruntime is missing.
    """
    device, input_size = check_options(source, device, input_size, scale)
    if source == SHIPPED_CLASSIFIER:
        return _shipped_extractor(device)
    load = _load_onnx if Path(source).suffix.lower() == ".onnx" else _load_torchscript
    network, (channels, *fixed), dtype = load(Path(source), device)
    scale = scale or ("bytes" if dtype == torch.uint8 else "fid")
    if dtype == torch.uint8 and scale != "bytes":
        raise ValueError(f"scale is {scale!r}, but {source} takes bytes; leave scale out")
    if input_size is not None and any(side not in (None, input_size) for side in fixed):
        raise ValueError(f"input_size is {input_size}, but {source} takes {fixed} pixels; leave input_size out")
    if input_size is None:
        input_size = 0 if scale == "bytes" else INPUT_SIZE
    height, width = (side or input_size for side in fixed)
    size = (height, width) if height and width else None
    identity = _identity(Path(source), [channels, size, scale])
    return Extractor(str(source), identity, network, channels, size, scale, device)


def check_options(
    source: str | os.PathLike[str], device: torch.device | str | None, input_size: int | None, scale: str | None
) -> tuple[torch.device, int | None]:
    """Check the arguments of `load_extractor`, which describes them, as far as that is possible without the network.

    Returns: the device, and input_size.
    """
    device = Compute.resolve(device, "fp32").device
    if scale is not None:
        one_of("scale", scale, SCALES)
    if input_size is not None and (not is_whole(input_size) or not 0 <= input_size <= LARGEST_INPUT):
        wanted = f"want a whole number of pixels, at most {LARGEST_INPUT}, or 0 to leave images as they are"
        raise ValueError(f"input_size is {shown(input_size)}; {wanted}")
    wanted = f"name a TorchScript or ONNX file, or {SHIPPED_CLASSIFIER}, which is bundled"
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(f"the extractor is {shown(source)}; {wanted}")
    if source == SHIPPED_CLASSIFIER:
        if (input_size, scale) != (None, None):
            raise ValueError(
                f"input_size and scale do not apply to {SHIPPED_CLASSIFIER}; leave them out, or name a file"
            )
    elif not os.path.exists(check_regular(source)):
        raise ValueError(f"there is no file {source}; {wanted}")
    return device, None if input_size is None else int(input_size)


def extract(
    extractor: Extractor,
    batches: Iterable[np.ndarray],
    count: int,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Compute the features of all images.

    Args:
        batches: uint8 [n, H, W, C], each of any n; their sizes may differ.
        count: the number of images in all batches, at least 1.
        batch_size: how many images the network gets at once; None chooses by the device. If memory runs out it is
            halved, with a warning.
        progress: show a bar.
    Returns: float32 [count, D].
    Raises: ValueError: batch_size is not a whole number, at least 1, there are fewer images, or the extractor fails, or
            returns other numbers of features for other images.
        torch.OutOfMemoryError: not even one image fits.
    """
    from tqdm import tqdm

    if batch_size is not None:
        whole("batch_size", batch_size, 1)
    features, done = torch.empty(0, dtype=torch.float32, device="cpu"), 0
    with tqdm(total=count, desc="features", unit="image", disable=not progress, leave=False) as bar:
        for images in batches:
            start, size = 0, batch_size or extractor.batch_size(images)
            while start < len(images):
                part = images[start : start + size]
                try:
                    new = extractor(part)
                except Exception as error:
                    if len(part) == 1 or not is_out_of_memory(error):
                        raise
                    failure = " ".join(str(error).split())[:200]
                    batch_size = size = halved(len(part), failure, stacklevel=2)
                    continue
                if done == 0:  # one tensor for all: small ones that are kept among large ones would fragment the memory
                    features = new.new_empty(count, new.shape[1])
                elif new.shape[1] != features.shape[1]:
                    sizes = f"{features.shape[1]} features of some images and {new.shape[1]} of others"
                    raise ValueError(f"{extractor.name} returns {sizes}; see --input-size")
                features[done : done + len(part)] = new
                start, done = start + len(part), done + len(part)
                bar.update(len(part))
    if done != count:
        raise ValueError(f"there are {done} images, not {count}; they changed while they were read")
    return features


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize as TensorFlow 1's resize_bilinear(align_corners=False) does, with which published FIDs were computed.

    Pixel i of the result lies at i * in / out, without an offset of half a pixel. Images that shrink are not smoothed.
    Beyond the last pixel its value is repeated. The width comes first: the order of operations is TensorFlow's.

    Args: x: [..., H, W], floating point.
    Returns: [..., height, width] in x's dtype.
    """
    for axis, size in ((-1, width), (-2, height)):
        if size == x.shape[axis]:
            continue
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (x.shape[axis] / size)
        below = at.long()
        above = (below + 1).clamp(max=x.shape[axis] - 1)
        weight = (at - below).view(-1, *[1] * (-1 - axis))
        low, high = x.index_select(axis, below), x.index_select(axis, above)
        x = low + (high - low) * weight
    return x


def _shipped_extractor(device: torch.device) -> Extractor:
    """The bundled classifier's features."""
    features = shipped_classifier().features.to(device)

    def network(x: Tensor) -> Tensor:
        if x.shape[1:] != (1, SIDE, SIDE):
            c, h, w = x.shape[1:]
            raise ValueError(
                f"{SHIPPED_CLASSIFIER} takes grey images of {SIDE}x{SIDE}, but these are {w}x{h} with {c} channels; "
                "name the file of another extractor, such as FID's Inception network, with --features"
            )
        return features(x)

    identity = _identity(_classifier_file(), None)
    return Extractor(SHIPPED_CLASSIFIER, identity, network, None, None, "signed", device)


# a file's network: a function of [n, C, H, W], the C, H and W that it takes (None: any H, any W), and its dtype
_Loaded = tuple[Callable[[Tensor], Any], tuple[int, int | None, int | None], torch.dtype]


def _load_torchscript(path: Path, device: torch.device) -> _Loaded:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
        try:
            with open(path, "rb") as file:  # torch opens only files whose names are UTF-8
                network = torch.jit.load(file, map_location=device)
        except Exception as error:  # another kind of zip file fails in many ways
            cause = str(error).strip().partition("\n")[0][:200]
            raise ValueError(
                f"cannot load {path} as TorchScript ({cause}); want a file by torch.jit.save, or an .onnx"
            ) from error
    network.eval()
    if not hasattr(network, "forward"):
        raise ValueError(f"{path} has no forward; want a module that takes images [N, 3, H, W]")
    arguments = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in arguments else {}
    return lambda x: network(x, **options), (3, None, None), torch.float32


def _load_onnx(path: Path, device: torch.device) -> _Loaded:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{path} needs onnxruntime; pip install 'fastddpm[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index, "use_tf32": 0}))
    try:
        session = onnxruntime.InferenceSession(_onnx_source(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises many classes, without a common base
        raise ValueError(f"cannot load {path} as ONNX: {' '.join(str(error).split())[:200]}") from error
    inputs = session.get_inputs()
    shape = [side if isinstance(side, int) else None for each in inputs for side in each.shape]
    dtype = _ONNX_TYPES.get(inputs[0].type) if len(inputs) == 1 and len(shape) == 4 else None
    if dtype is None or shape[1] not in (None, 1, 3):
        came = ", ".join(f"{each.name} {each.shape} {each.type}" for each in inputs) or "nothing"
        raise ValueError(f"{path} takes {came}; want one input [N, C, H, W] of float or uint8, C = 1 or 3")
    batch, channels, height, width = shape

    def run(x: Tensor) -> Tensor:
        outputs = []
        for part in x.to(dtype).cpu().split(batch or len(x)):
            padding = part[:1].expand((batch or len(part)) - len(part), -1, -1, -1)  # a graph may fix its batch size
            values = {inputs[0].name: torch.cat([part, padding]).numpy()}
            outputs.append(torch.from_numpy(session.run(None, values)[0])[: len(part)])
        return torch.cat(outputs)

    return run, (channels or 3, height, width), dtype


def _onnx_source(path: Path) -> str | bytes:
    """The path, beside which ONNX Runtime looks for weights; the content, if the name is not UTF-8, as it must be."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return path.read_bytes()
    return os.fspath(path)


def _classifier_file() -> Path:
    return Path(__file__).parents[1] / "models" / f"{SHIPPED_CLASSIFIER}-classifier" / "classifier.safetensors"


def _identity(path: Path, preparation: object) -> str:
    """SHA-256 of a network's file, of the files beside it that hold an ONNX graph's weights, and of the preparation."""
    content = path.read_bytes()
    digest = hashlib.sha256(json.dumps(preparation).encode())
    digest.update(content)
    # the field `location` of a protobuf, then its length: seven bits in a byte, the low ones first
    for match in re.finditer(rb"\x08location\x12([\x80-\xff]?[\x01-\x7f])", content):
        length = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(match[1]))
        name = content[match.end() : match.end() + length]
        beside = path.parent / os.fsdecode(name)
        if os.path.isfile(beside):  # False also for a name that is too long
            digest.update(beside.read_bytes())
    return digest.hexdigest()


def _shape_and_dtype(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f" {x.layout}"
    return f"{list(x.shape)} {x.dtype}{layout}".replace("torch.", "")
