"""Which examples the batches of a loader hold, on one process or several."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from common.attacks.pgd import FGSM
from common.callbacks.batches import BatchReader
from common.callbacks.robust_evaluation import RobustEvaluation
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry

X, Y = torch.rand(7, 1, 8, 8), torch.arange(7)


class Reversed(DistributedSampler):
    """A sampler with another order than Lightning's."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


def loader(**settings) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=2, **settings)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_example_is_new_once_and_has_its_place(processes: int) -> None:
    found = []
    for rank in range(processes):
        sampler = DistributedSampler(Y, processes, rank, shuffle=False) if processes > 1 else None
        batches = loader(sampler=sampler)
        reader = BatchReader([batches], processes)
        for batch in batches:
            part, is_new = reader.read(batch)
            assert torch.equal(part["x"], X[part["index"]])
            assert torch.equal(part["y"], part["index"])
            found += part["index"][is_new].tolist()
    assert sorted(found) == Y.tolist()


def test_what_cannot_be_placed_is_refused() -> None:
    own = loader(sampler=Reversed(Y, 2, 0, shuffle=False))
    for batches, named in ((own, "Reversed"), (loader(), "SequentialSampler")):
        reader, batch = BatchReader(batches, 2), next(iter(batches))
        with pytest.raises(ConfigurationError, match=named):
            reader.read(batch)
        part, is_new = reader.read({"x": batch[0], "y": batch[1], "index": torch.tensor([5, 3])})
        assert (part["index"].tolist(), is_new.tolist()) == ([5, 3], [True, True])
    with pytest.raises(ConfigurationError, match="got 2"):
        BatchReader([own, own], 1)
    with pytest.raises(ConfigurationError, match="normalised"):
        BatchReader(own, 1).read((4 * X - 2, Y))


def test_a_module_without_forward_is_refused_before_it_is_attacked(quiet_trainer) -> None:
    trainer = quiet_trainer(
        RobustEvaluation({"fgsm": SuiteEntry(FGSM(0.1))}), kind=lightning.Trainer
    )
    module = type("Blind", (lightning.LightningModule,), {"test_step": lambda *_: None})()
    with pytest.raises(ConfigurationError, match="Blind"):
        trainer.test(module, loader(), verbose=False)
