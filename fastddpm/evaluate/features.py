"""Features of images, by which sets of them are compared: of a network the user names, or of one in the package.

A file is a TorchScript module or an ONNX graph, as the Inception network of the FID comes in. Images are resized as
TensorFlow 1 did for the published FIDs, which other ways of resizing do not reproduce.
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

from fastddpm.sampling.engine import arithmetic
from fastddpm.sampling.sampler import device_and_precision

SHIPPED = "fashion-mnist"
SIDE, CLASSES, FEATURES = 28, 10, 128  # of the classifier in the package
INPUT_SIZE = 299  # of Inception
# pixels in a batch: on one core of a Xeon Inception makes 10 images/s in batches of 8, 8 in those of 64
PIXELS_PER_BATCH = {"cpu": 8 * INPUT_SIZE**2, "cuda": 256 * INPUT_SIZE**2}
# what becomes of pixels 0..255
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "fid": lambda x: (x - 128) / 128,
    "unit": lambda x: x / 255,
    "signed": lambda x: x / 127.5 - 1,
    "bytes": lambda x: x.round().to(torch.uint8),
}
_ONNX_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}


class Classifier(nn.Module):
    """Of Fashion-MNIST: two convolutions and two linear layers; the features are what the last layer reads."""

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
    """The classifier in the package, on the CPU; see its README.md."""
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict(load_file(_shipped_file()))
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@dataclass(frozen=True)
class Extractor:
    """A network of features: callable on uint8 [n, H, W, C] with C = 1, 3 or 4; gives float32 [n, D] on the CPU.

    Attributes:
        name: what it was loaded by.
        identity: SHA-256 of the network and of how images are prepared for it.
        network: takes [n, channels, *size] on the device; returns [n, D], [n, D, 1, 1], or a sequence that begins so.
        channels: 1 or 3; grey images are repeated and alpha is dropped. None: as they are.
        size: (H, W) to which images are resized; None: as they are.
        scale: one of SCALES.
        device: of the network.
    """

    name: str
    identity: str
    network: Callable[[Tensor], Any]
    channels: int | None
    size: tuple[int, int] | None
    scale: str
    device: torch.device

    def batch_size(self, images: np.ndarray) -> int:
        """How many of such images the network gets at once where nobody says."""
        height, width = self.size or images.shape[1:3]
        return max(1, PIXELS_PER_BATCH[self.device.type] // (height * width))

    def prepare(self, images: np.ndarray) -> Tensor:
        """What the network takes of uint8 images [n, H, W, C]: float32, or uint8 for the scale bytes."""
        x = torch.from_numpy(images).to(self.device).movedim(-1, 1)
        if x.shape[1] == 4:
            x = x[:, :3]
        if self.channels == 1 and x.shape[1] == 3:
            raise ValueError(f"{self.name} takes grey images, these have colours; name another extractor")
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
            if isinstance(error, ValueError) or _is_out_of_memory(error):
                raise
            why = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise ValueError(f"{self.name} fails on {_said(x)}: {why}; see --input-size and --scale") from error
        out = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2:] == (1, 1):
            out = out.flatten(1)
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) or not out.is_floating_point():
            found = _said(out) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name} returns {found} for {len(x)} images; want features [{len(x)}, D]")
        if not out.isfinite().all():
            raise ValueError(f"{self.name} returns NaN or infinity; see --scale, or name another extractor")
        return out.float().cpu()


def load_extractor(
    source: str | os.PathLike[str] = SHIPPED,
    *,
    device: torch.device | str | None = None,
    input_size: int | None = None,
    scale: str | None = None,
) -> Extractor:
    """A network of features, from a file.

    Args:
        source: "fashion-mnist": the classifier in the package, for grey images of 28 x 28;
            an .onnx: a graph of one input [N, C, H, W], which onnxruntime runs, on a GPU where it can;
            else TorchScript. Where its forward takes `return_features`, as NVIDIA's Inception does, it is True.
        device: "cuda" where there is one, else "cpu".
        input_size: images for a file's network become squares of so many pixels; 0: stay as they are. By default what
            the ONNX graph says if it does, 0 for the scale bytes, and else Inception's 299.
        scale: what the network takes pixels as: "fid", (x - 128) / 128, the default; "unit", x / 255; "signed",
            x / 127.5 - 1; or "bytes", uint8, the default of an ONNX graph that takes those.
    Raises: ValueError: an argument is not as above, the file is none of these, or onnxruntime is missing.
    """
    device = device_and_precision(device, "fp32")[0]
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; want one of {', '.join(SCALES)}")
    if input_size is not None and (type(input_size) is not int or input_size < 0):
        raise ValueError(
            f"input_size is {input_size!r}; want a whole number of pixels, or 0 to leave images as they are"
        )
    if source == SHIPPED:
        if (input_size, scale) != (None, None):
            raise ValueError(f"input_size and scale do not apply to {SHIPPED}; leave them out, or name a file")
        network = _takes_garments(shipped_classifier().features.to(device))
        return Extractor(SHIPPED, _digest(_shipped_file()), network, None, None, "signed", device)
    if not Path(source).is_file():
        raise ValueError(f"there is no file {source}; name a TorchScript or ONNX file, or {SHIPPED}, in the package")
    load = _load_onnx if Path(source).suffix.lower() == ".onnx" else _load_torchscript
    network, (channels, *fixed), dtype = load(Path(source), device)
    scale = scale or ("bytes" if dtype == torch.uint8 else "fid")
    if dtype == torch.uint8 and scale != "bytes":
        raise ValueError(f"scale is {scale!r}, but {source} takes bytes; leave it out")
    if input_size is not None and any(side not in (None, input_size) for side in fixed):
        raise ValueError(f"input_size is {input_size}, but {source} takes {fixed} pixels; leave it out")
    if input_size is None:
        input_size = 0 if scale == "bytes" else INPUT_SIZE
    height, width = (side or input_size for side in fixed)
    size = (height, width) if height and width else None
    identity = _digest(Path(source), [channels, size, scale])
    return Extractor(str(source), identity, network, channels, size, scale, device)


def extract(
    extractor: Extractor,
    batches: Iterable[np.ndarray],
    count: int,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Features of all images, float32 [count, D]. Without enough memory for a batch it is halved.

    Args:
        batches: uint8 [n, H, W, C], of any n; the network gets at most `batch_size` at once (default: by the device).
        count: how many images there are in all, at least 1.
    Raises: ValueError: there are fewer, or as of `Extractor`; torch.OutOfMemoryError: not even one image fits.
    """
    from tqdm import tqdm

    check_batch_size(batch_size)
    found, done = torch.empty(0), 0
    with tqdm(total=count, desc="features", unit="image", disable=not progress, leave=False) as bar:
        for images in batches:
            start, size = 0, batch_size or extractor.batch_size(images)
            while start < len(images):
                part = images[start : start + size]
                try:
                    features = extractor(part)
                except Exception as error:
                    if len(part) == 1 or not _is_out_of_memory(error):
                        raise
                    batch_size = size = (len(part) + 1) // 2
                    warnings.warn(f"out of memory; going on with batches of {size}", stacklevel=2)
                    continue
                if done == 0:  # once: small tensors that stay among large ones that go would fragment the memory
                    found = features.new_empty(count, features.shape[1])
                found[done : done + len(part)] = features
                start, done = start + len(part), done + len(part)
                bar.update(len(part))
    if done != count:
        raise ValueError(f"there are {done} images, not {count}; they changed while they were read")
    return found


def check_batch_size(batch_size: int | None) -> None:
    """Raises: ValueError: it is neither None nor a whole number, at least 1."""
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; want a whole number, at least 1")


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear as in TensorFlow 1's resize_bilinear(align_corners=False), by which FIDs are published.

    Pixel i of the result lies at i * in / out, with no offset of half a pixel and no smoothing where images shrink;
    beyond the last pixel its value goes on. Along the width first: the order of operations is TensorFlow's.

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


def _takes_garments(network: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if x.shape[1:] != (1, SIDE, SIDE):
            c, h, w = x.shape[1:]
            raise ValueError(
                f"{SHIPPED} takes grey images of {SIDE}x{SIDE}, these are {w}x{h} with {c} channels; name the file of "
                "another extractor, such as FID's Inception network, with --features"
            )
        return network(x)

    return run


# what a file's network is: a function of [n, C, H, W], the C, H and W that it takes (None: any), and its dtype
_Loaded = tuple[Callable[[Tensor], Any], tuple[int, int | None, int | None], torch.dtype]


def _load_torchscript(path: Path, device: torch.device) -> _Loaded:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        try:
            network = torch.jit.load(path, map_location=device)
        except Exception as error:  # a zip of something else fails in many ways
            why = str(error).strip().partition("\n")[0][:200]
            raise ValueError(
                f"cannot load {path} as TorchScript ({why}); want what torch.jit.save wrote, or an .onnx"
            ) from error
    network.eval()
    if not hasattr(network, "forward"):
        raise ValueError(f"{path} has no forward; want a module that takes images [N, 3, H, W]")
    takes = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in takes else {}
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
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a class for each kind
        raise ValueError(f"cannot load {path} as ONNX: {' '.join(str(error).split())[:200]}") from error
    takes = session.get_inputs()
    shape = [side if isinstance(side, int) else None for given in takes for side in given.shape]
    dtype = _ONNX_TYPES.get(takes[0].type) if len(takes) == 1 and len(shape) == 4 else None
    if dtype is None or shape[1] not in (None, 1, 3):
        found = ", ".join(f"{given.name} {given.shape} {given.type}" for given in takes) or "nothing"
        raise ValueError(f"{path} takes {found}; want one input [N, C, H, W] of float or uint8, C = 1 or 3")
    batch, channels, height, width = shape

    def run(x: Tensor) -> Tensor:
        outputs = []
        for part in x.to(dtype).cpu().split(batch or len(x)):
            padding = part[:1].expand((batch or len(part)) - len(part), -1, -1, -1)  # a graph may fix its batch
            given = {takes[0].name: torch.cat([part, padding]).numpy()}
            outputs.append(torch.from_numpy(session.run(None, given)[0])[: len(part)])
        return torch.cat(outputs)

    return run, (channels or 3, height, width), dtype


def _shipped_file() -> Path:
    return Path(__file__).parents[1] / "models" / f"{SHIPPED}-classifier" / "classifier.safetensors"


def _digest(path: Path, how: object = None) -> str:
    """SHA-256 of a network's file, of those beside it where an ONNX graph has its weights, and of how it is used."""
    content = path.read_bytes()
    digest = hashlib.sha256(json.dumps(how).encode())
    digest.update(content)
    # a field of a protobuf, and its length: seven bits in a byte, the low ones first
    for found in re.finditer(rb"\x08location\x12([\x80-\xff]?[\x01-\x7f])", content):
        length = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(found[1]))
        name = content[found.end() : found.end() + length]
        beside = path.parent / os.fsdecode(name)
        if beside.is_file():
            digest.update(beside.read_bytes())
    return digest.hexdigest()


def _is_out_of_memory(error: Exception) -> bool:
    """Also where TorchScript or onnxruntime has made another error of it."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "Failed to allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _said(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
