"""Checks of images and class labels read from a user's files; the errors say how to convert them."""

import numpy as np

# the end of an error
WANTED = "want an .npz or .npy, an MNIST-format file (idx, plain or .gz), or images in a folder, a .zip or a .tar"
CHANNEL_SHAPES = ((), (1,), (3,), (4,))  # what may follow [N, H, W] in a shape


def as_images(array: np.ndarray, name: object) -> np.ndarray:
    """Return images as uint8 [N, H, W, C]. Raises: ValueError: array is not uint8 images, or holds none."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[3:] not in CHANNEL_SHAPES:
        wanted = "uint8 (0..255) [N, H, W] or [N, H, W, C] with C = 1, 3 or 4"
        raise ValueError(f"{name} is {list(array.shape)} {array.dtype}; want {wanted}{_conversion(array)}")
    if array.size == 0:
        raise ValueError(f"{name} is {list(array.shape)}: it holds no images")
    check_brightest(array.max(), name)
    return array if array.ndim == 4 else array[..., None]


def check_brightest(value: int, name: object) -> None:
    """Refuse images whose largest value is 1: they are probably not in 0..255."""
    if value == 1:
        raise ValueError(f"{name} holds only 0 and 1, almost black in 0..255; multiply it by 255")


def as_labels(labels: np.ndarray, name: str, count: int, classes: int | None) -> np.ndarray:
    """Return the class labels of `count` images as int64 [count], from 0 to classes - 1.

    Raises: ValueError: labels are not integers [count] or [count, 1], or out of range; or, without `classes`, they are
        not 0, 1, ... with each class present, or all the same.
    """
    if labels.dtype.kind not in "iu" or labels.ndim == 0 or labels.shape[1:] not in ((), (1,)):
        wanted = "integers [N]; number classes with np.unique(y, return_inverse=True)[1], one-hot ones with y.argmax(1)"
        raise ValueError(f"{name} is {list(labels.shape)} {labels.dtype}; want {wanted}")
    if len(labels) != count:
        raise ValueError(f"{name} holds {len(labels)} labels, but there are {count} images; want one for each")
    if classes is not None:
        low, high = labels.min(), labels.max()
        if low < 0 or high >= classes:
            raise ValueError(f"{name} has labels from {low} to {high}; want the model's, 0 to {classes - 1}")
        return labels.reshape(-1).astype(np.int64)
    present, labels = np.unique(labels, return_inverse=True)
    if present[0] < 0:
        raise ValueError(f"{name} has the label {present[0]}; want 0, 1, ..., each of them at least once")
    if present[0] != 0 or present[-1] != len(present) - 1:
        missing = np.setdiff1d(np.arange(len(present)), present)[0]
        way_out = "number the classes 0, 1, ... with np.unique(y, return_inverse=True)[1]"
        raise ValueError(f"{name} has labels from {present[0]} to {present[-1]}, but none is {missing}; {way_out}")
    if len(present) == 1:
        raise ValueError(f"{name} has a single class; train without labels, or give the folder above the classes")
    return labels.reshape(-1)


def _conversion(x: np.ndarray) -> str:
    """How to convert numbers that look like images, as the end of an error message."""
    if x.ndim == 4 and x.shape[1] in (1, 3, 4) and x.shape[3] not in (1, 3, 4):
        return "; move its channels: x.transpose(0, 2, 3, 1)"
    if x.dtype.kind not in "fiu" or x.dtype == np.uint8 or x.size == 0 or x.ndim not in (3, 4):
        return ""
    low, high = x.min(), x.max()
    if x.dtype.kind == "f" and low >= -1 and high <= 1:
        return f"; convert it: ({'x * 255' if low >= 0 else '(x + 1) * 127.5'}).round().astype('uint8')"
    return "; convert it: x.round().astype('uint8')" if low >= 0 and high <= 255 else ""
