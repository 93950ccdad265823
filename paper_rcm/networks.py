"""Larger maps in any network; and the network of DAJAT: two copies of every batch-norm [code]."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.modes import try_out
from common.networks.insertion import given_shape
from common.networks.resnet import ResNet18, check_positive
from paper_rcm.method import EnlargedNetwork, shrink_first

Branch = Literal["base", "auto"]


def with_larger_input(net: nn.Module, **settings: Any) -> EnlargedNetwork:
    """A network that sees its input enlarged, for configuration files.

    Args:
        net: The base network.
        **settings: Of :class:`~paper_rcm.method.EnlargedNetwork`.
    """
    return EnlargedNetwork(net, **settings)


def with_larger_maps(
    net: nn.Module, times: int = 1, image_shape: Sequence[int] | None = None
) -> nn.Module:
    """A network whose first strides above 1 are 1, for configuration files.

    Args:
        net: The base network; it is changed and returned.
        times: How many strides are replaced, which :func:`~paper_rcm.method.shrink_first` does.
        image_shape: Channels, height and width of the images; the command line fills it in.

    Raises:
        ConfigurationError: If there is no shape, there are fewer strides, or the network does not
            work with larger maps.
    """
    check_positive(times=times)
    image_shape = given_shape(image_shape, "strides are found with a blank image")
    for _ in range(times):
        shrink_first(net, image_shape)
    try_out(net, image_shape, "change strides first, and put other methods around the result")
    return net


class SplitBatchNorm2d(nn.Module):
    """Two batch-norms of which one is used at a time; both start as ``norm`` [code]."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.base = norm
        # Built, not copied: a weight that several batch-norms share must not tie the branches.
        self.auto = nn.BatchNorm2d(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self.auto.load_state_dict(norm.state_dict())
        self.branch: Branch = "base"

    def forward(self, x: Tensor) -> Tensor:
        """The batch-norm of the current branch."""
        out: Tensor = self.base(x) if self.branch == "base" else self.auto(x)
        return out


def split_batch_norm(module: nn.Module) -> None:
    """Replace every batch-norm below ``module`` by a :class:`SplitBatchNorm2d`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm2d(child))
        elif not isinstance(child, SplitBatchNorm2d):
            split_batch_norm(child)


@contextmanager
def branch(model: nn.Module, name: Branch) -> Iterator[None]:
    """Use the batch-norms of one branch inside the block; afterwards those of ``base``.

    Raises:
        ConfigurationError: If ``model`` has no split batch-norm, or the branch is unknown.
    """
    check_choice("branch", name, Branch)
    norms = [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]
    if not norms:
        raise ConfigurationError(
            f"{type(model).__name__} has no batch-norm of two branches, which DAJAT needs; take "
            "paper_rcm.networks.SplitResNet18 as arch, or make them with split_batch_norm"
        )
    try:
        for norm in norms:
            norm.branch = name
        yield
    finally:
        for norm in norms:
            norm.branch = "base"


class SplitResNet18(ResNet18):
    """ResNet-18 with split batch-norms and a global pool, 11,183,562 parameters [measured].

    Args:
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        split_batch_norm(self)
