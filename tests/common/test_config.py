"""What is filled in from the data."""

from jsonargparse import dict_to_namespace

from common.config import fill_from_data

NET = {"class_path": "common.networks.resnet.ResNet18", "init_args": {"num_classes": None,
       "in_channels": None}}  # fmt: skip


def test_networks_inside_dataclasses_learn_classes_and_channels_too() -> None:
    """An objective may hold networks in dataclasses, which have no class path of their own."""
    objective = {
        "class_path": "x.Distillation",
        "init_args": {"teacher": {"net": NET, "path": "a"}},
    }
    model = {"class_path": "x.Model", "init_args": {"net": NET, "objective": objective}}
    source = {"class_path": "common.data.sources.Digits", "init_args": {}}
    config = dict_to_namespace({"model": model, "data": {"source": source}})
    fill_from_data(config)
    arguments = config.model.init_args
    for net in (arguments.net, arguments.objective.init_args.teacher.net):
        assert (net.init_args.num_classes, net.init_args.in_channels) == (10, 1)
