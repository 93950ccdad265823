"""Where images come from: each source gives a training and a test split as uint8 tensors.

A source knows its classes, shape and statistics without opening a file, so that a network can be
built before any data is there, and turns every defect of its files into one line that says what is
wrong, where, and what to do about it.
"""

import gzip
import hashlib
import io
import pickle
import shutil
import socket
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError, DataUnavailableError, RunDirectoryError
from common.files import damage_of, write_sealed

Split = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

_SPLIT_STREAM = 3  # keeps the draws for splits apart from the streams named in randomness.py
_NETWORK_TIMEOUT = 15.0  # seconds without an answer; torchvision itself would wait for ever


@dataclass(frozen=True)
class ImageSpec:
    """What is known about a data set before any file is read.

    Args:
        name: As papers print it.
        num_classes: Labels lie in ``[0, num_classes)``.
        shape: Of one image, ``(C, H, W)``.
        mean: Of the training split, per channel, for pixels in [0, 1].
        std: Of the training split's pixels, per channel, for pixels in [0, 1].
        class_names: In the order of the labels.
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


class ImageSource(ABC):
    """A data set with a training and a test split, held in memory as uint8."""

    spec: ImageSpec

    @abstractmethod
    def prepare(self) -> None:
        """Fetches and checks the files; called by one process per machine.

        Raises:
            DataUnavailableError: A file is missing, altered or cannot be fetched.
        """

    @abstractmethod
    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images, uint8 ``(N, C, H, W)`` in [0, 255], and labels, int64 ``(N,)``.

        Raises:
            DataUnavailableError: A file is missing, altered or cannot be read.
        """


def stratified_split(y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions so that both parts have the classes in equal proportions.

    Each class gives its share of ``count`` rounded down; what is left goes to the largest
    remainders. Which of its examples a class gives is decided by hashing their positions, so the
    split is the same on every machine and for every version of every library.

    Args:
        y: Labels, ``(N,)``.
        count: Size of the second part.
        seed: Of the split alone.

    Returns:
        Positions of the first part ``(N - count,)`` and of the second ``(count,)``, ascending.

    Raises:
        ConfigurationError: A class would have no example left in the first part.
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
    score = ExampleRandom(seed, 0, torch.arange(len(y)), stream=_SPLIT_STREAM).integers(2**53, ())
    second = torch.zeros(len(y), dtype=torch.bool)
    for label, n in enumerate(take.tolist()):
        members = torch.nonzero(y == label).flatten()
        second[members[torch.argsort(score[members], stable=True)[:n]]] = True
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


def _as_tensors(
    images: NDArray[np.uint8], labels: NDArray[Any], spec: ImageSpec
) -> tuple[Tensor, Tensor]:
    """Checks what a file held against the specification.

    Raises:
        ValueError: Saying what does not fit.
    """
    if images.dtype != np.uint8 or images.shape[1:] != spec.shape:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape[1:])}, expected uint8 {spec.shape}"
        )
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
    if int(y.min()) < 0 or int(y.max()) >= spec.num_classes:
        raise ValueError(
            f"labels run from {int(y.min())} to {int(y.max())}, expected 0 to "
            f"{spec.num_classes - 1}"
        )
    return torch.from_numpy(np.require(images, requirements=["C", "W"])), y


class Digits(ImageSource):
    """scikit-learn's 1,797 handwritten 8x8 digits, embedded in the package: no file, no network.

    Pixels are ``round(v * 255 / 16)``. 700 images are the test split, drawn once and for all in
    equal proportions of the classes; the other 1,097 are the training split.

    Args:
        size: Height and width after antialiased bilinear resizing. The statistics in the
            specification are those of the 8x8 images.

    Raises:
        ConfigurationError: ``size`` is below 1.
    """

    TEST_SIZE = 700

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ConfigurationError(f"size of the digits must be at least 1, got {size}; try 8")
        self.size = size
        self.spec = ImageSpec(
            name="Digits",
            num_classes=10,
            shape=(1, size, size),
            mean=(0.3067,),
            std=(0.3763,),
            class_names=tuple("0123456789"),
        )

    def prepare(self) -> None:
        """Does nothing: the images come with scikit-learn."""

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        x = torch.from_numpy(digits.images).mul(255 / 16).round()[:, None]
        y = torch.from_numpy(digits.target).long()
        train, test = stratified_split(y, self.TEST_SIZE, seed=0)
        rows = train if split == "train" else test
        x = x[rows]
        if self.size != 8:
            size = (self.size, self.size)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
        return x.to(torch.uint8), y[rows]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists, strings and dictionaries only: any other pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = {"ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"}
        is_array = module.split(".")[0] == "numpy" and name in arrays
        if is_array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a set of images")


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class DownloadedSource(ImageSource):
    """A data set that torchvision knows the address, the file names and the checksums of.

    Args:
        root: Folder that has, or will have, the files in torchvision's layout.
        download: Whether missing files may be fetched. They arrive in a temporary folder first:
            an interrupted download leaves nothing half-written and nothing is ever overwritten.
        verify: Whether the files must be the official ones, by checksum. Switch it off for a
            subset or for images of your own in the same format; then only their form is checked.
    """

    archives: ClassVar[tuple[str, ...]]  # what to put into root by hand, relative to it
    address: ClassVar[str]

    def __init__(self, root: str = "data", download: bool = True, verify: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.verify = verify
        self._is_checked = False

    @abstractmethod
    def _checksums(self) -> dict[str, str]:
        """Files relative to ``root``, with their official MD5."""

    @abstractmethod
    def _fetch(self, folder: Path) -> None:
        """Lets torchvision fill ``folder``, using archives that are already there."""

    @abstractmethod
    def _read(self, split: Split) -> Arrays:
        """Images ``(N, C, H, W)`` and labels ``(N,)`` as the files have them."""

    def prepare(self) -> None:
        """See :meth:`ImageSource.prepare`."""
        missing = self._check()
        if not missing:
            return
        # Official files mixed with someone's own would be neither.
        is_own_subset = not self.verify and len(missing) < len(self._checksums())
        if is_own_subset or not self.download:
            raise self._missing(missing)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (
                FileLock(self.root / ".download.lock"),
                tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as folder,
            ):
                missing = self._check()  # another run may have fetched them meanwhile
                if missing:
                    self._fetch_into(Path(folder), missing)
        except DataUnavailableError:
            raise
        except Exception as error:  # sockets, servers, archives and disks fail in many ways
            raise DataUnavailableError(
                f"{self.spec.name} is not in {self.root} ({_listed(missing, 1)} missing) and could "
                f"not be downloaded from {self.address} ({_one_line(error)}): connect to a "
                f"network, or put {_listed(self.archives)} into {self.root} by hand"
            ) from error

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        missing = self._check()
        if missing:
            raise self._missing(missing)
        try:
            return _as_tensors(*self._read(split), self.spec)
        except Exception as error:  # a damaged file can fail at any depth of its reader
            raise DataUnavailableError(
                f"the {split} split of {self.spec.name} in {self.root} cannot be read "
                f"({_one_line(error)}): delete {_listed(self._checksums())} there to have "
                "the official files downloaded anew, or mend your own"
            ) from error

    def _check(self) -> list[str]:
        """Missing files; altered ones are an error at once."""
        if self._is_checked:
            return []
        missing = []
        for name, official in self._checksums().items():
            path = self.root / name
            if not path.is_file():
                missing.append(name)
            elif self.verify and (found := _md5(path)) != official:
                raise DataUnavailableError(
                    f"{path} is not the official {self.spec.name} file ({path.stat().st_size:,} "
                    f"bytes, MD5 {found}, expected {official}): if it is truncated or damaged, "
                    "delete it to have it downloaded anew; if it is your own or a subset, set "
                    "--data.source.verify false"
                )
        self._is_checked = not missing
        return missing

    def _missing(self, missing: list[str]) -> DataUnavailableError:
        way = (
            "set --data.source.download true, with a network or with "
            f"{_listed(self.archives)} put into {self.root} by hand"
            if not self.download
            else f"put what is missing into {self.root}"
            if not self.verify
            else "run prepare_data() first"
        )
        return DataUnavailableError(
            f"{self.spec.name} is not complete in {self.root} ({_listed(missing, 2)} missing): "
            f"{way}"
        )

    def _fetch_into(self, folder: Path, missing: list[str]) -> None:
        for name in self.archives:
            if (self.root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / name, folder / name)
        with _network_timeout():
            self._fetch(folder)
        for name in missing:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(self.root / name)


def _listed(names: Iterable[str], most: int = 4) -> str:
    """At most so many names, then how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class CIFAR10(DownloadedSource):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, 10 classes."""

    archives = ("cifar-10-python.tar.gz",)
    address = "https://www.cs.toronto.edu/~kriz/cifar.html"
    dataset: ClassVar[type[torchvision.datasets.CIFAR10]] = torchvision.datasets.CIFAR10
    spec = ImageSpec(
        name="CIFAR-10",
        num_classes=10,
        shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=(
            "airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck",
        ),
    )  # fmt: skip

    def _checksums(self) -> dict[str, str]:
        files = self.dataset.train_list + self.dataset.test_list
        return {f"{self.dataset.base_folder}/{name}": md5 for name, md5 in files}

    def _fetch(self, folder: Path) -> None:
        self.dataset(folder, download=True)

    def _read(self, split: Split) -> Arrays:
        files = self.dataset.train_list if split == "train" else self.dataset.test_list
        images, labels = [], []
        for name, _ in files:
            with (self.root / self.dataset.base_folder / name).open("rb") as file:
                entry = _ArrayUnpickler(file, encoding="latin1").load()
            # Python 2 wrote the official keys as text; Python 3 tools often write bytes.
            entry = {k.decode() if isinstance(k, bytes) else k: v for k, v in entry.items()}
            images.append(np.asarray(entry["data"]).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(entry["labels" if "labels" in entry else "fine_labels"]))
        return np.concatenate(images), np.concatenate(labels)


_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, 100 fine labels."""

    archives = ("cifar-100-python.tar.gz",)
    dataset = torchvision.datasets.CIFAR100
    spec = ImageSpec(
        name="CIFAR-100",
        num_classes=100,
        shape=(3, 32, 32),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        class_names=tuple(_CIFAR100_CLASSES.split()),
    )


class SVHN(DownloadedSource):
    """SVHN (Netzer et al. 2011), cropped house numbers of 32x32: 73,257 ``train``, 26,032 ``test``.

    The 531,131 easier images of its ``extra`` split are not used.
    """

    archives = ("train_32x32.mat", "test_32x32.mat")
    address = "http://ufldl.stanford.edu/housenumbers"
    spec = ImageSpec(
        name="SVHN",
        num_classes=10,
        shape=(3, 32, 32),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        class_names=tuple("0123456789"),
    )

    def _checksums(self) -> dict[str, str]:
        lists = torchvision.datasets.SVHN.split_list
        return {lists[split][1]: lists[split][2] for split in ("train", "test")}

    def _fetch(self, folder: Path) -> None:
        for split in ("train", "test"):
            torchvision.datasets.SVHN(folder, split=split, download=True)

    def _read(self, split: Split) -> Arrays:
        from scipy.io import loadmat  # slow to import, and only needed here

        content = loadmat(self.root / torchvision.datasets.SVHN.split_list[split][1])
        labels = content["y"].astype(np.int64).reshape(-1) % 10  # the file calls the digit 0 "10"
        return np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)), labels


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the IDX format: two zeros, type, rank, big-endian sizes, content."""
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} is no IDX file of bytes")
    sizes = np.frombuffer(content, dtype=">u4", count=content[3], offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy()


class MNIST(DownloadedSource):
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 grey handwritten digits of 28x28."""

    archives = tuple(
        f"MNIST/raw/{part}.gz"
        for part in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
    )
    address = "https://ossci-datasets.s3.amazonaws.com/mnist"
    dataset: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.MNIST
    spec = ImageSpec(
        name="MNIST",
        num_classes=10,
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
        class_names=tuple("0123456789"),
    )

    def _checksums(self) -> dict[str, str]:
        md5 = dict(self.dataset.resources)
        return {name: md5[Path(name).name] for name in self.archives}

    def _fetch(self, folder: Path) -> None:
        self.dataset(folder, download=True)

    def _read(self, split: Split) -> Arrays:
        names = self.archives[:2] if split == "train" else self.archives[2:]
        images, labels = (_read_idx(self.root / name) for name in names)
        return images[:, None], labels.astype(np.int64)


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey pictures of clothing, 28x28."""

    archives = tuple(name.replace("MNIST/", "FashionMNIST/") for name in MNIST.archives)
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    dataset = torchvision.datasets.FashionMNIST
    spec = ImageSpec(
        name="Fashion-MNIST",
        num_classes=10,
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        class_names=(
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
    )  # fmt: skip


_TINY_IMAGENET_CLASSES = """
n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384
n01774750 n01784675 n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731
n01983481 n01984695 n02002724 n02056570 n02058221 n02074367 n02085620 n02094433 n02099601
n02099712 n02106662 n02113799 n02123045 n02123394 n02124075 n02125311 n02129165 n02132136
n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443 n02279972
n02281406 n02321529 n02364673 n02395406 n02403003 n02410509 n02415577 n02423022 n02437312
n02480495 n02481823 n02486410 n02504458 n02509815 n02666196 n02669723 n02699494 n02730930
n02769748 n02788148 n02791270 n02793495 n02795169 n02802426 n02808440 n02814533 n02814860
n02815834 n02823428 n02837789 n02841315 n02843684 n02883205 n02892201 n02906734 n02909870
n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304 n02999410 n03014705
n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701 n03201208
n03250847 n03255030 n03355925 n03388043 n03393912 n03400231 n03404251 n03424325 n03444034
n03447447 n03544143 n03584254 n03599486 n03617480 n03637318 n03649909 n03662601 n03670208
n03706229 n03733131 n03763968 n03770439 n03796401 n03804744 n03814639 n03837869 n03838899
n03854065 n03891332 n03902125 n03930313 n03937543 n03970156 n03976657 n03977966 n03980874
n03983396 n03992509 n04008634 n04023962 n04067472 n04070727 n04074963 n04099969 n04118538
n04133789 n04146614 n04149813 n04179913 n04251144 n04254777 n04259630 n04265275 n04275548
n04285008 n04311004 n04328186 n04356056 n04366367 n04371430 n04376876 n04398044 n04399382
n04417672 n04456115 n04465501 n04486054 n04487081 n04501370 n04507155 n04532106 n04532670
n04540053 n04560804 n04562935 n04596742 n04597913 n06596364 n07579787 n07583066 n07614500
n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607 n07749582 n07753592
n07768694 n07871810 n07873807 n07875152 n07920052 n09193705 n09246464 n09256479 n09332890
n09428293 n12267677
"""


class TinyImageNet(ImageSource):
    """Tiny-ImageNet (Stanford CS231n, 2015): 200 classes of 500 + 50 photographs of 64x64.

    The 10,000 labelled validation images are the test split, as is usual: the official test
    images have no labels. Labels follow the sorted WordNet identifiers. Images are ordered by
    their rank within the class, so that the first n hold all classes alike.

    Decoding takes about a minute, once: the pixels are kept as ``tiny-imagenet-200.<split>.pt``
    beside the folder. Delete these files after editing an image in place.

    Args:
        root: Folder that has ``tiny-imagenet-200`` in it.
        verify: Whether all 100,000 + 10,000 images must be there. Switch it off for a subset.
    """

    FOLDER = "tiny-imagenet-200"
    ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    SIZES: ClassVar[dict[Split, int]] = {"train": 100_000, "test": 10_000}
    spec = ImageSpec(
        name="Tiny-ImageNet",
        num_classes=200,
        shape=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        class_names=tuple(_TINY_IMAGENET_CLASSES.split()),
    )

    def __init__(self, root: str = "data", verify: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        self.verify = verify

    def prepare(self) -> None:
        """Checks the folder and decodes it, so that other processes find the pixels ready."""
        for split in self.SIZES:
            self.load(split)

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        files, labels = self._list(split)
        if self.verify and len(files) != self.SIZES[split]:
            raise self._unavailable(
                f"has {len(files):,} images of the {split} split, expected {self.SIZES[split]:,}",
                "; for a subset set --data.source.verify false",
            )
        if not files:
            raise self._unavailable(f"has no image of the {split} split")
        names = "\n".join(
            f"{path.relative_to(self.root)} {y}" for path, y in zip(files, labels, strict=True)
        )
        digest = hashlib.sha256(names.encode()).hexdigest()
        cache = self.root / f"{self.FOLDER}.{split}.pt"
        x = self._cached(cache, digest, len(files))
        if x is None:
            x = self._decode(files)
            self._keep(cache, {"x": x, "digest": digest})
        return x, torch.tensor(labels, dtype=torch.int64)

    def _list(self, split: Split) -> tuple[list[Path], list[int]]:
        """Image files and their labels, in the order of the split."""
        number = {wnid: label for label, wnid in enumerate(self.spec.class_names)}
        folder = self.root / self.FOLDER
        try:
            if split == "train":
                ranked = [
                    (rank, number[wnid.name], path)
                    for wnid in sorted((folder / "train").iterdir())
                    if wnid.is_dir()
                    for rank, path in enumerate(sorted((wnid / "images").glob("*.JPEG")))
                ]
                ranked.sort(key=lambda item: item[:2])
                return [path for *_, path in ranked], [label for _, label, _ in ranked]
            lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
            fields = [line.split("\t") for line in lines if line.strip()]
            files = [folder / "val" / "images" / name for name, *_ in fields]
            return files, [number[wnid] for _, wnid, *_ in fields]
        except OSError as error:
            raise self._unavailable(f"is missing or incomplete ({_one_line(error)})") from error
        except (KeyError, ValueError) as error:
            raise self._unavailable(
                f"has an unknown class or a damaged annotation ({_one_line(error)})"
            ) from error

    def _unavailable(self, what: str, remedy: str = "") -> DataUnavailableError:
        return DataUnavailableError(
            f"{self.spec.name}: {self.root / self.FOLDER} {what}: fetch {self.ADDRESS} and unpack "
            f"it in {self.root}{remedy}"
        )

    def _decode(self, files: list[Path]) -> Tensor:
        x = torch.empty((len(files), *self.spec.shape), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # the decoder releases the interpreter lock
            for row, image in enumerate(pool.map(self._decode_one, files)):
                x[row] = torch.from_numpy(image)
        return x

    def _decode_one(self, path: Path) -> NDArray[np.uint8]:
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise self._unavailable(f"has a damaged image, {path} ({_one_line(error)})") from error
        if pixels.shape != (64, 64, 3):
            raise self._unavailable(f"has an image of {pixels.shape[:2]}, not 64x64, {path}")
        return pixels.transpose(2, 0, 1)

    def _cached(self, cache: Path, digest: str, count: int) -> Tensor | None:
        """The kept pixels, or None where there are none of these very files."""
        if not cache.is_file():
            return None
        try:
            if damage := damage_of(cache):
                raise ValueError(damage)
            content = torch.load(cache, weights_only=True)
            x: Tensor = content["x"]
            if content["digest"] == digest and x.shape == (count, *self.spec.shape):
                return x
        except Exception as error:  # whatever is wrong with it, decoding anew puts it right
            warnings.warn(
                f"{cache} is damaged ({_one_line(error)}); the images are decoded again",
                stacklevel=2,
            )
        return None

    def _keep(self, cache: Path, content: dict[str, Any]) -> None:
        try:
            archive = io.BytesIO()
            torch.save(content, archive)
            write_sealed(cache, archive)
        except RunDirectoryError as error:
            warnings.warn(
                f"the decoded images could not be kept as {cache} ({error}); every run will decode "
                "them again",
                stacklevel=2,
            )
