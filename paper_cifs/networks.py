"""Channel selections in any network. Tags as in :mod:`paper_cifs.method`."""

from collections.abc import Sequence

from torch import nn

from common.errors import ConfigurationError
from common.networks.insertion import find_places, given_shape
from paper_cifs.method import (
    BETA,
    Selection,
    insert_selections,
    positions_of,
    usual_selections,
)


def with_cifs(
    net: nn.Module,
    selections: dict[str, Selection] | None = None,
    beta: float = BETA,
    image_shape: Sequence[int] | None = None,
) -> nn.Module:
    """A network with channel selections behind named modules, for configuration files.

    Args:
        net: The base network; it is changed and returned.
        selections: Name of a module -> selection, dots as underscores where an option changes them;
            a stage, for instance. By default CIFS at the last two positions of
            :func:`~paper_cifs.method.positions_of`, with a nonlinear and a linear probe.
        beta: Weight of the probes together in the losses of ``common.objectives``.
        image_shape: Channels, height and width of the images; the command line fills it in.

    Raises:
        ConfigurationError: If there is no shape or no such module, or a setting is out of range.
    """
    image_shape = given_shape(image_shape, "the channels of a feature are found with a blank image")
    if selections is None:
        selections = usual_selections(list(positions_of(net)), hidden=128)
    names = {name.replace(".", "_"): name for name, _ in net.named_modules()}
    chosen = {names.get(key.replace(".", "_"), key): make for key, make in selections.items()}
    if len(chosen) < len(selections):
        raise ConfigurationError(
            f"two of the selections {list(selections)} follow the same module; give one of them"
        )
    places, logits = find_places(net, list(chosen), image_shape, "a channel selection")
    made = {
        name: chosen[name](place.output.shape[1], logits.shape[1]).to(place.output.device)
        for name, place in places.items()
    }
    insert_selections(net, made, beta)
    return net
