"""Files of the data sets: what they must be, and how they are read. Whatever is wrong is told before training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

READERS = min(8, os.cpu_count() or 1)


def folder(path: Path) -> Path:
    """The path.

    Raises:
        BenchError: it is no folder.
    """
    if not path.is_dir():
        raise BenchError(f"no folder {path}")
    return path


def lines(path: Path) -> list[str]:
    """Its lines, without empty ones at the end.

    Raises:
        BenchError: it is missing, empty, or no text.
    """
    if not path.is_file():
        raise BenchError(f"no file {path}")
    try:
        found = path.read_text().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is not a text file ({error})") from error
    if not found:
        raise BenchError(f"{path} is empty")
    return found


def check_all(check: Callable[[Any], None], items: Sequence[Any], what: str) -> None:
    """Run ``check`` on each, several at a time; the first error is raised, and what was not begun is left."""
    size = 64 * READERS
    with ThreadPoolExecutor(READERS) as pool, tqdm(total=len(items), desc=what, unit="file", leave=False) as bar:
        rest = iter(items)
        while some := list(islice(rest, size)):
            for _ in pool.map(check, some):
                bar.update()


def check_size(what: str, found: int, expected: int | None) -> None:
    """A warning where a split is not as large as the protocol's; None expects nothing."""
    if expected is not None and found != expected:
        print(f"warning: {what} has {found} samples, the protocol {expected}: not the same data", file=sys.stderr)


# --- arrays: FOLDER/{train,val}/{image,label,depth,normal}/{i}.npy -----------------------------------------------


def count_arrays(kind: Path) -> int:
    """How many arrays the folder has, numbered from 0 without a gap.

    Raises:
        BenchError: there is no such folder, it has none, or one is missing.
    """
    names = {path.stem for path in folder(kind).glob("*.npy")}
    missing = next((i for i in range(len(names)) if str(i) not in names), None)
    if missing is not None:
        raise BenchError(f"{kind / f'{missing}.npy'} is missing: {len(names)} files are numbered from 0")
    if not names:
        raise BenchError(f"{kind} has no .npy files")
    return len(names)


def check_array(path: Path, shape: tuple[int, ...], classes: int | None) -> None:
    """Whether it is whole, of that shape and, with ``classes``, of labels below that.

    Raises:
        BenchError: it is not.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BenchError(f"{path} is damaged or cut off ({error})") from error
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise BenchError(f"{path} holds {array.dtype} of shape {array.shape}, where numbers of {shape} are expected")
    if classes is not None:
        highest = array.max()
        if not highest < classes:
            raise BenchError(f"{path} has the label {highest}: with {classes} classes it must be below {classes}")


class Arrays(Dataset):
    """Images with a label, a depth and maybe a normal for each pixel, from .npy files.

    Args:
        root: with a folder for each of ``kinds``.
        kinds: "image", "label" (or "label_7"), "depth", and maybe "normal".
        size: height and width.
        classes: labels are below; negative ones are none.
        augment: scale and flip at random.

    Raises:
        BenchError: a folder or file is missing, cut off or of another shape; numbers differ; a label is too high.
    """

    def __init__(
        self, root: Path, kinds: Sequence[str], size: tuple[int, int], classes: int, augment: bool = False
    ) -> None:
        self.root, self.kinds, self.augment = root, kinds, augment
        counts = {kind: count_arrays(root / kind) for kind in kinds}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
            raise BenchError(f"{root}: the numbers of files differ: {told}")
        self.count = counts[kinds[0]]
        shapes = {"image": (*size, 3), "depth": (*size, 1), "normal": (*size, 3)}
        asked = [
            (root / kind / f"{i}.npy", shapes.get(kind, size), None if kind in shapes else classes)
            for kind in kinds
            for i in range(self.count)
        ]
        check_all(lambda one: check_array(*one), asked, f"checking {root.name}")

    def __len__(self) -> int:
        """How many images."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """The image (3, H, W); label (H, W), depth (1, H, W), normal (3, H, W)."""
        found = [torch.from_numpy(np.load(self.root / kind / f"{index}.npy")).float() for kind in self.kinds]
        channels = [x.movedim(-1, 0) if x.ndim == 3 else x[None] for x in found]
        if self.augment:
            channels = augmented(channels)
        image, label, *others = channels
        return image.contiguous(), [label[0].long().clamp_min(-1), *(x.contiguous() for x in others)]


def augmented(channels: list[Tensor]) -> list[Tensor]:
    """A random crop scaled up by 1, 1.2 or 1.5 (which brings things nearer), flipped in one case of two.

    As in the protocol of Nash-MTL and FAMO: image and normal between pixels, label and depth by the nearest one.
    """
    height, width = channels[0].shape[-2:]
    scale = (1.0, 1.2, 1.5)[int(torch.randint(3, ()))]
    h, w = int(height / scale), int(width / scale)
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    flip = bool(torch.rand(()) < 0.5)
    found = []
    for kind, x in enumerate(channels):  # image, label, depth, normal
        x = x[None, :, top : top + h, left : left + w]
        smooth = {"mode": "bilinear", "align_corners": True} if kind in (0, 3) else {"mode": "nearest"}
        x = torch.nn.functional.interpolate(x, (height, width), **smooth)[0]  # type: ignore[arg-type]
        x = x / scale if kind == 2 else x
        x = x.flip(-1) if flip else x
        if flip and kind == 3:
            x = torch.cat([-x[:1], x[1:]])  # to the left is to the right
        found.append(x)
    return found


# --- pictures ----------------------------------------------------------------------------------------------------


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        BenchError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise BenchError("pictures need Pillow, which is not installed: pip install 'dbmtl-kernels[vision]'") from error
    return Image


def check_picture(path: Path) -> None:
    """Whether it is there and can be decoded to its end, at an eighth of its size where that is quicker.

    Raises:
        BenchError: it is not.
    """
    if not path.is_file():
        raise BenchError(f"no file {path}")
    try:
        with pillow().open(path) as picture:
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"{path} is damaged or cut off ({error})") from error


class Pictures(Dataset):
    """Pictures, scaled to a size, with labels.

    Args:
        paths: of N pictures.
        labels: (N, ...) tensor.
        size: height and width to scale to.
        mean: of each channel, taken away; with ``deviation`` that it is divided by.
        deviation: see ``mean``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        size: tuple[int, int],
        mean: Iterable[float] = (0.0, 0.0, 0.0),
        deviation: Iterable[float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.paths, self.labels, self.size = paths, labels, size
        self.mean, self.deviation = (torch.tensor(list(x)).view(3, 1, 1) for x in (mean, deviation))

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The picture, (3, H, W), from 0 to 1 before the mean is taken away, and its labels."""
        image = pillow()
        try:
            with image.open(self.paths[index]) as picture:
                pixels = np.array(picture.convert("RGB").resize(self.size[::-1], image.Resampling.BILINEAR))
        except OSError as error:
            raise BenchError(f"{self.paths[index]} cannot be read ({error})") from error
        scaled = torch.from_numpy(pixels).movedim(-1, 0).float() / 255
        return ((scaled - self.mean) / self.deviation).contiguous(), self.labels[index]
