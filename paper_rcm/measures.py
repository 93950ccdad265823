"""Numbers of a trained network: consistency, movement and separation of the pooled feature.

With f the arg-max prediction, x' an adversarial image of x, the paper's accuracies are natural
accuracy NA = mean 1[f(x) = y], consistency accuracy CA = mean 1[f(x') = f(x)], and robustness
AR = mean 1[f(x) = y and f(x') = f(x)] [note]. With one x' in all three,
NA + CA - 1 <= AR <= min(NA, CA).

For E8 the paper shows an embedding of the features [note]; which one was not found. Here it is
t-SNE (van der Maaten and Hinton, JMLR 9, 2008), with numbers of the features beside it [choice].
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from common.attacks.losses import classify, label_loss
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.evaluation.measures import AttackMeasure
from common.modes import frozen, network_of
from common.objectives import Batch
from common.results.lines import Columns

# ----------------------------------------------------------------------- during an evaluation, E6


class Consistency(AttackMeasure):
    """``consistency`` (CA), where the attack moves away from the network's own clean prediction.

    So images that are misclassified are attacked too [choice]; on the others it is robustness.
    """

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """``consistency``, 0 or 1 for each image."""
        x = batch["x"]
        with torch.no_grad():
            own = classify(model(x))
        x_adv = self.attack(
            label_loss(model, own.clamp_min(0)),
            x,
            random,
            is_adversarial=lambda images: classify(model(images)) != own,
        )
        with torch.no_grad():
            same = (classify(model(x_adv)) == own) & (own >= 0)
        return {"consistency": same.float()}


class PooledChange(AttackMeasure):
    """How far the pooled feature moves in l2, absolute and relative to its length [choice].

    ``pooled_change`` and ``pooled_change_relative`` under an attack, ``pooled_change_noise`` and
    ``pooled_change_noise_relative`` under uniform noise of the same radius.
    """

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The four numbers of each image."""
        x, net = batch["x"], network_of(model)
        noise = random.uniform(x.shape[1:], -self.attack.eps, self.attack.eps).to(x)
        x_adv = self.attacked(model, batch, random)
        columns = {}
        with torch.no_grad():
            clean: Tensor = net.pooled(x)
            size = clean.norm(dim=1).clamp_min(1e-12)
            moved_to = {"pooled_change": x_adv, "pooled_change_noise": (x + noise).clamp(0.0, 1.0)}
            for name, images in moved_to.items():
                columns[name] = (net.pooled(images) - clean).norm(dim=1)
                columns[f"{name}_relative"] = columns[name] / size
        return columns


# ----------------------------------------------------------------------- by ``analysis.py``, E8


def attacked(
    model: Any, x: Tensor, y: Tensor, attack: PGD, seed: int = 0, batch_size: int = 1000
) -> Tensor:
    """Adversarial images of ``x`` against cross-entropy, batch by batch in evaluation mode."""
    generator = torch.Generator(x.device).manual_seed(seed)
    batches = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    with frozen(model):
        return torch.cat(
            [attack(label_loss(model, labels), images, generator) for images, labels in batches]
        )


def pooled_features(model: Any, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Features ``(N, C)`` behind the pooling of ``model.net``, in evaluation mode."""
    with torch.no_grad(), frozen(model):
        return torch.cat([model.net.pooled(part).float() for part in torch.split(x, batch_size)])


def separation(features: Tensor, y: Tensor, clean: Tensor) -> dict[str, float]:
    """How far classes lie apart in features ``(N, C)``.

    ``silhouette``: mean silhouette with the labels as clusters, in [-1, 1] (Rousseeuw 1987).
    ``class mean``: accuracy of the nearest class mean of ``clean`` features, in [0, 1].
    """
    nearest = NearestCentroid().fit(clean.cpu(), y.cpu())
    return {
        "silhouette": float(silhouette_score(features.cpu(), y.cpu())),
        "class mean": float(nearest.score(features.cpu(), y.cpu())),
    }


def embed(features: Tensor) -> npt.NDArray[np.float32]:
    """t-SNE ``(N, 2)`` of N > 30 images: perplexity 30, started from principal components."""
    tsne = TSNE(perplexity=30.0, init="pca", random_state=0)
    points: npt.NDArray[np.float32] = tsne.fit_transform(features.cpu().numpy())
    return points
