"""Where images come from: each source gives a training and a test split as uint8 tensors.

A source knows its classes, shape and statistics without opening a file, so that a network can be
built before any data is there, and turns every defect of its files into one line that says what is
wrong, where, and what to do about it.
"""

import hashlib
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
from torch import Tensor

from common.attacks.randomness import ExampleRandom, Stream
from common.data.base import Arrays, ImageSource, ImageSpec, Split
from common.data.downloads import DownloadedSource
from common.data.folders import FolderSource
from common.data.reading import read_idx, read_mat, read_pickle, read_unpacked, whole_numbers
from common.errors import ConfigurationError, check_choice


def stratified_split(y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions so that both parts have the classes in equal proportions.

    Each class gives its share of ``count`` rounded down; the rest goes to the largest
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
    score = ExampleRandom(seed, 0, torch.arange(len(y)), stream=Stream.SPLIT).integers(2**53, ())
    second = torch.zeros(len(y), dtype=torch.bool)
    for label, n in enumerate(take.tolist()):
        members = torch.nonzero(y == label).flatten()
        second[members[torch.argsort(score[members], stable=True)[:n]]] = True
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


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
        check_choice("split", split, Split)
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


class CIFAR10(DownloadedSource):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, 10 classes."""

    folder = torchvision.datasets.CIFAR10.base_folder
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
        return dict([*self.dataset.train_list, *self.dataset.test_list])

    def _archive_checksums(self) -> dict[str, str]:
        return {self.dataset.filename: self.dataset.tgz_md5}

    def _fetch(self, folder: Path) -> None:
        self.dataset(folder, download=True)

    def _read(self, split: Split) -> Arrays:
        files = self.dataset.train_list if split == "train" else self.dataset.test_list
        entries = [read_pickle(self._paths[name]) for name, _ in files]
        labels = "labels" if "labels" in entries[0] else "fine_labels"
        return (
            np.concatenate([entry["data"].reshape(-1, 3, 32, 32) for entry in entries]),
            np.concatenate([whole_numbers(entry[labels]) for entry in entries]),
        )


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

    folder = torchvision.datasets.CIFAR100.base_folder
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

    folder = ""
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
        name = torchvision.datasets.SVHN.split_list[split][1]
        images, labels = read_mat(self._paths[name], ("X", "y"))
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
    dataset: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.MNIST
    contents: ClassVar[dict[str, str]] = {}  # SHA-256 of the unpacked files, where they are known
    spec = ImageSpec(
        name="MNIST",
        num_classes=10,
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
        class_names=tuple("0123456789"),
    )

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

    def _fetch(self, folder: Path) -> None:
        self.dataset(folder, download=True)

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
    dataset = torchvision.datasets.FashionMNIST
    # Packed again by gzip -6 with their time of 2017, these contents have torchvision's MD5s.
    contents: ClassVar[dict[str, str]] = {
        MNIST.PARTS[0]: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        MNIST.PARTS[1]: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        MNIST.PARTS[2]: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        MNIST.PARTS[3]: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
    spec = ImageSpec(
        name="Fashion-MNIST",
        num_classes=10,
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        class_names=tuple(torchvision.datasets.FashionMNIST.classes),
    )


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


class TinyImageNet(FolderSource):
    """Tiny-ImageNet (Stanford CS231n, 2015): 200 classes of 500 + 50 photographs of 64x64.

    The 10,000 labelled validation images are the test split, as is usual: the official test
    images have no labels. Labels follow the sorted WordNet identifiers.
    """

    folder = "tiny-imagenet-200"
    address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    sizes: ClassVar[dict[Split, int]] = {"train": 100_000, "test": 10_000}
    spec = ImageSpec(
        name="Tiny-ImageNet",
        num_classes=200,
        shape=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        class_names=tuple(_TINY_IMAGENET_CLASSES.split()),
    )
