"""Lightning's view of an image source: dict batches, a held-out split, augmentation on the device.

The whole set stays in memory as uint8, with a GPU in that of the GPU. A batch is one indexing
operation; its bytes become float32 in [0, 1] on the device.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.data.base import ImageSource, Split
from common.data.extra import ExtraImages, MixedDataset, MixedSampler
from common.data.sources import stratified_split
from common.data.subset import lacking_classes, subset
from common.errors import ConfigurationError, check_choice

Batch = dict[str, Tensor]

CropPadding = Literal["zero", "reflect"]
ValidateOn = Literal["held-out", "test"]
"""What stands around an image before it is cropped: zeros, or the image mirrored at its edge."""

_NEXT_VIEW = 2**40  # what the index of an image's next version is ahead: more than any set has


class Views(ABC):
    """More versions of each training image, for losses that compare them."""

    @abstractmethod
    def __call__(self, x: Tensor, random: ExampleRandom) -> list[Tensor]:
        """Versions of the whole images, before crop and flip.

        Args:
            x: Images, uint8 ``(N, C, H, W)``.
            random: Random numbers of these images.

        Returns:
            Each like ``x``; the images themselves are not among them.
        """


class ImageDataset(Dataset[Batch]):
    """Chosen rows of a set of images, fetched a batch at a time.

    Args:
        x: All images, uint8 ``(M, C, H, W)``; shared, not copied. Batches are where these are.
        y: All labels, int64 ``(M,)``.
        rows: Which of them this data set has, ``(N,)``.

    Attributes:
        remarks: What a reader of figures about it should know.
    """

    def __init__(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        self._x, self._y, self.rows = x, y, rows
        self.remarks: list[str] = []

    @property
    def y(self) -> Tensor:
        """Labels, ``(N,)``."""
        return self._y[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[index]
        batch = {"x": self._x, "y": self._y[rows], "index": index}
        if self._x.is_cuda:  # nobody waits for small things that come from pinned memory
            batch |= {key: batch[key].pin_memory() for key in ("y", "index")}
            rows = rows.pin_memory().to(self._x.device, non_blocking=True)
        batch["x"] = self._x[rows]
        return batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _TrainLoader(DataLoader[Batch]):
    """Starts an interrupted epoch where it stopped, with the order that belongs to the epoch.

    Lightning asks for the iterator before it has told the sampler the epoch, and worker processes
    begin to read at once: a resumed run would go through the first epoch's order again. And it
    counts the batches done before the interruption without skipping them. Beginning at the first
    ``next`` and skipping here settles both.

    Where a batch does not count like the others, in its optimiser step or on one of the processes,
    its examples get a ``window`` or a ``weight``, see :func:`common.objectives.weighted`.
    """

    batches_done: Callable[[], int]
    factors_of: Callable[[int, int], dict[str, float]]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for number, batch in islice(enumerate(super().__iter__()), self.batches_done(), None):
            for key, factor in self.factors_of(number, len(self)).items():
                batch[key] = torch.full(batch["y"].shape, factor, dtype=torch.float64)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: epoch and progress, which Lightning keeps, determine the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, as :meth:`state_dict`."""


class _SharingSampler(DistributedSampler[int]):
    """This process's part of the order of a single process, nothing repeated.

    Args:
        dataset: What is shuffled.
        part: Places in the order.
        seed: Decides it, together with the epoch.
    """

    def __init__(self, dataset: Dataset[Batch], part: range, seed: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        self._part = part

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        return (order[place] for place in self._part)

    def __len__(self) -> int:
        return len(self._part)


def shift_and_flip(
    x: Tensor, shift: Tensor, is_flipped: Tensor, padding: int, padding_mode: CropPadding = "zero"
) -> Tensor:
    """Crops each padded image at its own place, then mirrors it or not.

    The random crop and horizontal flip of He et al. 2016 (Section 4.2, "4 pixels are padded on each
    side"), one gather for the whole batch.

    Args:
        x: Images, ``(N, C, H, W)``, any type.
        shift: Top and left corner of the crops in the padded images, int64 in
            ``[0, 2 * padding]``, ``(N, 2)``.
        is_flipped: Whether the crop is mirrored left to right, bool ``(N,)``.
        padding: Pixels added on each side.
        padding_mode: ``zero``, or ``reflect`` for the image mirrored at its edge, whose own pixels
            are not repeated; ``padding`` is below the sides of the image then.

    Returns:
        Images of the same shape and type.
    """
    check_choice("padding_mode", padding_mode, CropPadding)
    n, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) + shift[:, :1]
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(is_flipped[:, None], width - 1 - columns, columns) + shift[:, 1:]
    if padding_mode == "reflect":  # by index: torch pads no bytes this way
        rows = height - 1 - (height - 1 - (rows - padding).abs()).abs()
        columns = width - 1 - (width - 1 - (columns - padding).abs()).abs()
        padding = 0
    return F.pad(x, (padding,) * 4)[
        torch.arange(n, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class ImageDataModule(LightningDataModule):
    """Batches ``{"x": float32 (N, C, H, W) in [0, 1], "y": int64 (N,), "index": int64 (N,)}``.

    ``index`` counts from 0 within the split the batch comes from. Order and augmentation depend on
    seed, epoch and index alone: not on the number of devices, nor on the batch size as far as
    augmentation goes, nor on where a run was interrupted. No example is ever repeated: where
    devices cannot share the last training batch evenly, their parts of it are weighted by size.

    The trainer must be made with ``use_distributed_sampler=False``.

    Args:
        source: The data set.
        batch_size: Of training, over all devices together.
        eval_batch_size: Of validation and test, per device.
        val_size: How much of the training split is held out for validation, in equal proportions
            of the classes: a number of examples (int) or a fraction (float).
        validate_on: ``"held-out"``, or ``"test"`` to hold nothing out and validate on the test
            split, as some papers select their checkpoints.
        split_seed: Decides which examples are held out; independent of the training seed.
        crop_padding: Pixels added on each side before the random crop in training; 0 for no crop.
        crop_padding_mode: What they are: ``zero``, or ``reflect`` for the image mirrored.
        flip: Whether half of the training images are mirrored left to right.
        seed: Of order and augmentation; ``None`` for the run's own (``seed_everything``).
        train_limit: Use only so many training examples, of all classes in proportion, see
            :func:`common.data.subset.subset`.
        val_limit: The same for validation.
        test_limit: The same for test.
        num_workers: Processes that fetch batches. The set is in memory, so 0 is usually best; and
            with 0, without ``extra``, a GPU keeps it in its own (CIFAR-10 takes 150 MB).
        drop_last: Whether a last training batch that is not full is left out.
        extra: Pseudo-labelled images for a part of every training batch, see
            :class:`~common.data.extra.MixedSampler`. Their ``index`` counts on from that of the
            labelled ones. All batches are full then.
        extra_fraction: How large that part is, between 0.0 and 1.0.
        views: More versions of each training image. A training batch is then the images, behind
            them their second versions, and so on; each is cropped and flipped by itself, has the
            label of its image and an ``index`` that no other example has, and ``view`` counts the
            versions from 0.

    Raises:
        ConfigurationError: A size, limit or fraction is out of range, or the padding unknown.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        val_size: int | float = 0.1,
        validate_on: ValidateOn = "held-out",
        split_seed: int = 0,
        crop_padding: int = 0,
        crop_padding_mode: CropPadding = "zero",
        flip: bool = False,
        seed: int | None = None,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        extra: ExtraImages | None = None,
        extra_fraction: float = 0.5,
        views: Views | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("crop_padding", crop_padding, 0),
            ("train_limit", train_limit, 1),
            ("val_limit", val_limit, 1),
            ("test_limit", test_limit, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ConfigurationError(f"data.{name} must be at least {least}, got {value}")
        if not (0 < val_size < 1 if isinstance(val_size, float) else val_size >= 1):
            raise ConfigurationError(
                "data.val_size must be a number of examples, at least 1, or a fraction between 0.0 "
                f"and 1.0, got {val_size!r}; to hold nothing out, set data.validate_on: test"
            )
        if not 0.0 < extra_fraction < 1.0:
            raise ConfigurationError(
                f"data.extra_fraction must be between 0.0 and 1.0, got {extra_fraction}; to train "
                "without extra images, set data.extra: null"
            )
        check_choice("data.validate_on", validate_on, ValidateOn)
        check_choice("data.crop_padding_mode", crop_padding_mode, CropPadding)
        if crop_padding_mode == "reflect" and crop_padding >= min(source.spec.shape[1:]):
            raise ConfigurationError(
                f"data.crop_padding {crop_padding} is more than an image of "
                f"{'x'.join(map(str, source.spec.shape[1:]))} has to mirror; make it smaller or "
                "set data.crop_padding_mode: zero"
            )
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.validate_on = validate_on
        self.split_seed = split_seed
        self.crop_padding = crop_padding
        self.crop_padding_mode: CropPadding = crop_padding_mode
        self.flip = flip
        self.seed = seed
        self.train_limit = train_limit
        self.val_limit = val_limit
        self.test_limit = test_limit
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.extra = extra
        self.extra_fraction = extra_fraction
        self.views = views
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None
        self._loaded: dict[Split, tuple[Tensor, Tensor]] = {}
        self._on_device: dict[Split, Tensor] = {}
        self._extra: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        """Known without any file, as are the properties below."""
        return self.source.spec.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image, ``(C, H, W)``."""
        return self.source.spec.shape

    @property
    def in_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.source.spec.shape[0]

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the training pixels in [0, 1], per channel."""
        return self.source.spec.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Of the training pixels in [0, 1], per channel."""
        return self.source.spec.std

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.source.spec.class_names

    @property
    def order_seed(self) -> int:
        """What order and augmentation are drawn from: ``seed``, or else the run's."""
        return run_seed() if self.seed is None else self.seed

    def prepare_data(self) -> None:
        """Fetches and checks the files; Lightning calls it in one process per machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs (``fit``, ``validate``, ``test``, ``predict``, None for all).

        Raises:
            ConfigurationError: The devices cannot share a batch evenly, or a split would be empty.
            DataUnavailableError: The files are missing, altered or cannot be read.
        """
        self._check_devices()
        if stage in (None, "fit", "validate") and self.val_set is None:
            if self.validate_on == "test":
                self.val_set = self._dataset("test", None, self.val_limit)
            else:
                rows, held_out = self._split()
                self.train_set = self._dataset("train", rows, self.train_limit)
                self.val_set = self._dataset("train", held_out, self.val_limit)
        if stage in (None, "fit"):
            if self.train_set is None:
                self.train_set = self._dataset("train", None, self.train_limit)
            leaves_a_rest = self.drop_last and self.extra is None
            if leaves_a_rest and len(self.train_set) < self.batch_size:
                raise ConfigurationError(
                    f"data.batch_size {self.batch_size} exceeds the {len(self.train_set)} training "
                    "examples and data.drop_last leaves no batch at all: make batch_size smaller "
                    "or set drop_last: false"
                )
            if self.extra is not None and self._extra is None:
                self._extra = self.extra.load(self.source.spec)
        if stage in (None, "test", "predict") and self.test_set is None:
            self.test_set = self._dataset("test", None, self.test_limit)

    def train_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the training batches; the epoch decides the order.

        Process r of W takes every W-th example from the r-th on, so that together the b-th batches
        of all processes are the b-th batch of a single one.
        """
        labelled = self._ready(self.train_set, "fit")
        dataset: Dataset[Batch] = labelled
        sampler: Sampler[int]
        if self._extra is None:
            used = len(labelled)
            self._check_last_batch(used)
            if self.drop_last:
                used -= used % self.batch_size
            part = range(self._rank, used, self._world_size)
            sampler = _SharingSampler(labelled, part, self.order_seed)
        else:
            dataset = MixedDataset(labelled, len(labelled), *self._extra)
            sampler = MixedSampler(
                len(labelled),
                len(self._extra[1]),
                self.batch_size,
                self.extra_fraction,
                self.order_seed,
                self._world_size,
                self._rank,
            )
        loader = _TrainLoader(
            dataset,
            batch_size=self.batch_size // self._world_size,
            sampler=sampler,
            drop_last=self.drop_last,
            **self._loader_options(),
        )
        loader.batches_done = self._batches_done
        loader.factors_of = self._factors
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the validation examples, each in exactly one process."""
        return self._eval_loader(self._ready(self.val_set, "validate"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the test examples, each in exactly one process."""
        return self._eval_loader(self._ready(self.test_set, "test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test examples again."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments in training and turns bytes into numbers in [0, 1], both on the device.

        They are float32, or float64 where the trainer computes in double precision.
        """
        if self.trainer is not None and self.trainer.training:
            if self.views is not None:
                batch |= self._with_views(self.views, batch, self.trainer.current_epoch)
            x = self.augment(batch["x"], batch["index"], self.trainer.current_epoch)
        else:
            x = batch["x"]
        # A divisor on the device: CUDA multiplies by the reciprocal of a plain number, which
        # rounds some of the 256 values differently from a CPU.
        is_double = self.trainer is not None and self.trainer.precision == "64-true"
        dtype = torch.float64 if is_double else torch.float32
        divisor = torch.full((), 255.0, dtype=dtype, device=x.device)
        batch["x"] = x.to(dtype) / divisor
        return batch

    def augment(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Crops and flips each image as its index and the epoch decide.

        Args:
            x: Images, ``(N, C, H, W)``.
            index: Positions in the training set, ``(N,)``.
            epoch: Counts from 0.

        Returns:
            Images of the same shape and type.
        """
        if not self.crop_padding and not self.flip:
            return x
        random = ExampleRandom(self.order_seed, epoch, index, stream=Stream.AUGMENTATION)
        shift = random.integers(2 * self.crop_padding + 1, (2,))
        is_flipped = (random.integers(2, ()) == 1) & self.flip
        return shift_and_flip(x, shift, is_flipped, self.crop_padding, self.crop_padding_mode)

    def _with_views(self, views: Views, batch: Batch, epoch: int) -> Batch:
        """The images and, behind them, their other versions."""
        x, y, index = batch["x"], batch["y"], batch["index"]
        random = ExampleRandom(self.order_seed, epoch, index, stream=Stream.VIEWS)
        versions = [x, *views(x, random)]
        count = range(len(versions))
        return {
            "x": torch.cat(versions),
            "y": y.repeat(len(versions)),
            "index": torch.cat([index + k * _NEXT_VIEW for k in count]),
            "view": torch.cat([torch.full_like(index, k) for k in count]),
        }

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _check_devices(self) -> None:
        devices = self._world_size
        if self.batch_size % devices:
            below = self.batch_size // devices * devices
            choices = " or ".join(str(size) for size in (below, below + devices) if size)
            raise ConfigurationError(
                f"data.batch_size {self.batch_size} is the batch over all devices and {devices} "
                f"cannot share it evenly: choose {choices}, or another number of devices"
            )
        if self.trainer is None or devices == 1:
            return
        if self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigurationError(
                "trainer.use_distributed_sampler is true, but the data already come divided over "
                "the devices, without repeating examples in evaluation: set it to false"
            )

    def _check_last_batch(self, examples: int) -> None:
        rest, devices = examples % self.batch_size, self._world_size
        if not self.drop_last and 0 < rest < devices:
            raise ConfigurationError(
                f"the last training batch has {rest} of the {examples} examples, too few for "
                f"{devices} devices: set data.drop_last: true, or choose another data.batch_size "
                "or fewer devices"
            )

    def _factors(self, number: int, batches: int) -> dict[str, float]:
        """What a training batch's mean loss is multiplied by, where that is not 1.

        Args:
            number: Of the batch in its epoch, from 0.
            batches: How many an epoch has.

        Returns:
            ``weight``, this process's examples of the batch over the mean of all processes, and
            ``window``, the batch's examples over those of its optimiser step, times the number of
            accumulated batches that Lightning divides every loss by.
        """
        accumulated: int = getattr(self.trainer, "accumulate_grad_batches", 1)
        limit: float = getattr(self.trainer, "num_training_batches", batches)
        begin = number - number % accumulated
        end = min(begin + accumulated, batches, limit if number < limit else batches)
        examples = sum(self._examples_of(b) for b in range(begin, int(end)))
        here, devices = self._examples_of(number), self._world_size
        mine = len(range(self._rank, here, devices))
        factors = {"weight": mine * devices / here, "window": here * accumulated / examples}
        return {key: factor for key, factor in factors.items() if factor != 1.0}

    def _examples_of(self, number: int) -> int:
        """Of a training batch, over all processes."""
        if self._extra is not None:
            return self.batch_size
        left = len(self._ready(self.train_set, "fit")) - number * self.batch_size
        return min(self.batch_size, left)

    def _batches_done(self) -> int:
        """Batches of the current epoch that a resumed run has behind it; 0 otherwise."""
        if self.trainer is None:
            return 0
        loop = self.trainer.fit_loop.epoch_loop
        is_resumed = loop.restarting or getattr(loop, "has_made_up", False)
        return loop.batch_progress.current.ready if is_resumed else 0

    def _load(self, split: Split) -> tuple[Tensor, Tensor]:
        if split not in self._loaded:
            self._loaded[split] = self.source.load(split)
        return self._loaded[split]

    def _images(self, split: Split) -> Tensor:
        """All images of a split, where batches are to be fetched from."""
        x, _ = self._load(split)
        if not self._is_resident:
            return x
        device = self.trainer.strategy.root_device  # type: ignore[union-attr]
        if split not in self._on_device or self._on_device[split].device != device:
            self._on_device[split] = x.to(device)
        return self._on_device[split]

    @property
    def _is_resident(self) -> bool:
        """Whether the images are kept in the memory of a GPU."""
        is_simple = self.num_workers == 0 and self.extra is None
        return is_simple and self._is_on_cuda

    @property
    def _is_on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _split(self) -> tuple[Tensor, Tensor]:
        """Rows of the training split to train on, and rows held out."""
        _, y = self._load("train")
        count = self.val_size
        if isinstance(count, float):
            count = max(round(count * len(y)), 1)
        try:
            return stratified_split(y, count, self.split_seed)
        except ConfigurationError as error:
            raise ConfigurationError(f"data.val_size {self.val_size}: {error}") from None

    def _dataset(self, split: Split, rows: Tensor | None, limit: int | None) -> ImageDataset:
        _, y = self._load(split)
        rows = torch.arange(len(y)) if rows is None else rows
        chosen = subset(y[rows], limit)
        dataset = ImageDataset(self._images(split), y, rows[chosen])
        if lacking := lacking_classes(y[rows], chosen):
            dataset.remarks.append(lacking)
            warnings.warn(f"{split} split: {lacking}", stacklevel=2)
        if len(dataset) < self._world_size:
            raise ConfigurationError(
                f"{len(dataset)} examples cannot be divided over {self._world_size} devices: use "
                "more examples or fewer devices"
            )
        return dataset

    def _ready(self, dataset: ImageDataset | None, stage: str) -> ImageDataset:
        if dataset is None:
            raise RuntimeError(f"call setup({stage!r}) before asking for batches")
        return dataset

    def _eval_loader(self, dataset: ImageDataset) -> DataLoader[Batch]:
        sampler = UnrepeatedDistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        return DataLoader(
            dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": _as_it_is,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self._is_on_cuda and not self._is_resident,
            # Its own generator: a loader otherwise draws from the global one at every start.
            "generator": torch.Generator(),
        }
