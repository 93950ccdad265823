"""The data sets. Each knows its classes, shape and statistics without opening a file of images."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from common.attacks.randomness import ExampleRandom, Stream
from common.data.base import Arrays, ImageSource, ImageSpec, Split
from common.data.downloads import DownloadedSource
from common.data.folders import FolderSource
from common.data.reading import read_idx, read_mat, read_pickle, read_unpacked, whole_numbers
from common.errors import ConfigurationError, check_choice

_DIGITS = "0123456789"


def _spec(
    name: str,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: Iterable[str] = (),
) -> ImageSpec:
    """A specification; where no names are given, the folder ``classes`` has them."""
    if not class_names:
        path = Path(__file__).parent / "classes" / f"{name}.txt"
        class_names = path.read_text(encoding="utf-8").split()
    names = tuple(class_names)
    return ImageSpec(name, len(names), shape, mean, std, names)


def stratified_split(y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions so that both parts have the classes in equal proportions.

    Each class gives its share of ``count`` rounded down; the rest goes to the largest remainders.
    Which examples it gives is decided by hashing their positions, so that the split is the same on
    every machine.

    Returns:
        Positions of the first part ``(N - count,)`` and of the second ``(count,)``, ascending.
    """
    sizes = torch.bincount(y)
    share = sizes.double() * count / max(len(y), 1)
    take = share.floor().long()
    by_remainder = torch.argsort(share - take, descending=True, stable=True)
    take[by_remainder[: max(count - int(take.sum()), 0)]] += 1
    if count >= len(y) or bool((take >= sizes)[sizes > 0].any()):
        raise ConfigurationError(
            f"holding out {count:,} of {len(y):,} examples leaves a class without any "
            f"(the smallest class has {int(sizes[sizes > 0].min()) if len(y) else 0}); "
            "hold out fewer"
        )
    score = ExampleRandom(seed, 0, torch.arange(len(y)), stream=Stream.SPLIT).integers(2**53, ())
    second = torch.zeros(len(y), dtype=torch.bool)
    for label, n in enumerate(take.tolist()):
        members = torch.nonzero(y == label).flatten()
        second[members[torch.argsort(score[members], stable=True)[:n]]] = True
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


class Digits(ImageSource):
    """scikit-learn's 1,797 handwritten 8x8 digits, embedded in the package: no file, no network.

    Pixels are ``round(v * 255 / 16)``. 700 images are the test split, in equal proportions of the
    classes; the other 1,097 are the training split.

    Args:
        size: Height and width after antialiased bilinear resizing; the statistics are those of 8x8.
    """

    sizes: ClassVar[Mapping[Split, int]] = {"train": 1_097, "test": 700}

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ConfigurationError(f"size of the digits must be at least 1, got {size}; try 8")
        self.size = size
        self.spec = _spec("Digits", (1, size, size), (0.3067,), (0.3763,), _DIGITS)

    def prepare(self) -> None:
        """Does nothing: the images come with scikit-learn."""

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        check_choice("split", split, Split)
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        x = torch.from_numpy(digits.images).mul(255 / 16).round()[:, None]
        y = torch.from_numpy(digits.target).long()
        train, test = stratified_split(y, self.sizes["test"], seed=0)
        rows = train if split == "train" else test
        x = x[rows]
        if self.size != 8:
            size = (self.size, self.size)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
        return x.to(torch.uint8), y[rows]


class CIFAR10(DownloadedSource):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, 10 classes."""

    folder = datasets.CIFAR10.base_folder
    archives = ("cifar-10-python.tar.gz",)
    address = "https://www.cs.toronto.edu/~kriz/cifar.html"
    dataset = datasets.CIFAR10
    spec = _spec("CIFAR-10", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    sizes: ClassVar[Mapping[Split, int]] = {"train": 50_000, "test": 10_000}

    def _checksums(self) -> dict[str, str]:
        return dict([*self.dataset.train_list, *self.dataset.test_list])

    def _archive_checksums(self) -> dict[str, str]:
        return {self.dataset.filename: self.dataset.tgz_md5}

    def _read(self, split: Split) -> Arrays:
        files = self.dataset.train_list if split == "train" else self.dataset.test_list
        entries = [read_pickle(self._paths[name]) for name, _ in files]
        labels = "labels" if "labels" in entries[0] else "fine_labels"
        return (
            np.concatenate([entry["data"].reshape(-1, 3, 32, 32) for entry in entries]),
            np.concatenate([whole_numbers(entry[labels]) for entry in entries]),
        )


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, 100 fine labels."""

    folder = datasets.CIFAR100.base_folder
    archives = ("cifar-100-python.tar.gz",)
    dataset = datasets.CIFAR100
    spec = _spec("CIFAR-100", (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class SVHN(DownloadedSource):
    """SVHN (Netzer et al. 2011), cropped house numbers of 32x32: 73,257 ``train``, 26,032 ``test``.

    The 531,131 easier images of its ``extra`` split are not used.
    """

    folder = ""
    archives = ("train_32x32.mat", "test_32x32.mat")
    address = "http://ufldl.stanford.edu/housenumbers"
    dataset = datasets.SVHN
    spec = _spec("SVHN", (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), _DIGITS)
    sizes: ClassVar[Mapping[Split, int]] = {"train": 73_257, "test": 26_032}

    def _checksums(self) -> dict[str, str]:
        lists = self.dataset.split_list
        return {lists[split][1]: lists[split][2] for split in ("train", "test")}

    def _fetch(self, folder: Path) -> None:
        for split in ("train", "test"):
            self.dataset(folder, split=split, download=True)

    def _read(self, split: Split) -> Arrays:
        images, labels = read_mat(self._paths[self.dataset.split_list[split][1]], ("X", "y"))
        # The file calls the digit 0 "10".
        return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.reshape(-1) % 10


class MNIST(DownloadedSource):
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 grey handwritten digits of 28x28.

    The files may be packed or not, and spelled with a dot before ``idx``.
    """

    PARTS = (
        *("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        *("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    )
    folder = "MNIST/raw"
    archives = tuple(f"MNIST/raw/{part}" for part in PARTS)
    address = "https://ossci-datasets.s3.amazonaws.com/mnist"
    dataset = datasets.MNIST
    contents: ClassVar[dict[str, str]] = {}  # SHA-256 of the unpacked files, where they are known
    spec = _spec("MNIST", (1, 28, 28), (0.1307,), (0.3081,), _DIGITS)
    sizes: ClassVar[Mapping[Split, int]] = {"train": 60_000, "test": 10_000}

    def _checksums(self) -> dict[str, str]:
        return dict(self.dataset.resources)

    def _spellings(self, name: str) -> tuple[str, ...]:
        plain = name.removesuffix(".gz")
        dotted = plain.replace("-idx", ".idx")
        return name, plain, f"{dotted}.gz", dotted, f"{plain}/{plain}", f"{dotted}/{dotted}"

    def _problem(self, path: Path, name: str) -> str:
        if name not in self.contents:
            problem = super()._problem(path, name)
            if not problem or path.name.endswith(".gz"):
                return problem
            return f"it is unpacked, and only the MD5 of {name} is known: put that beside it"
        try:
            found = hashlib.sha256(read_unpacked(path)).hexdigest()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            return f"it cannot be unpacked, {error}"
        official = self.contents[name]
        return "" if found == official else f"SHA-256 {found} unpacked, expected {official}"

    def _read(self, split: Split) -> Arrays:
        names = self.PARTS[:2] if split == "train" else self.PARTS[2:]
        images, labels = (read_idx(self._paths[name]) for name in names)
        return images[:, None], labels


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey pictures of clothing, 28x28."""

    folder = "FashionMNIST/raw"
    archives = tuple(f"FashionMNIST/raw/{part}" for part in MNIST.PARTS)
    elsewhere = ("/usr/share/datasets/fashion-mnist",)
    package = "dataset-fashion-mnist"
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    dataset = datasets.FashionMNIST
    # Packed again by gzip -6 with their time of 2017, these contents have torchvision's MD5s.
    contents: ClassVar[dict[str, str]] = {
        MNIST.PARTS[0]: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        MNIST.PARTS[1]: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        MNIST.PARTS[2]: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        MNIST.PARTS[3]: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
    spec = _spec("Fashion-MNIST", (1, 28, 28), (0.2860,), (0.3530,), dataset.classes)


class TinyImageNet(FolderSource):
    """Tiny-ImageNet (Stanford CS231n, 2015): 200 classes of 500 + 50 photographs of 64x64.

    The 10,000 labelled validation images are the test split, as is usual: the official test
    images have no labels. Labels follow the sorted WordNet identifiers.
    """

    folder = "tiny-imagenet-200"
    address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    sizes: ClassVar[Mapping[Split, int]] = {"train": 100_000, "test": 10_000}
    spec = _spec("Tiny-ImageNet", (3, 64, 64), (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
