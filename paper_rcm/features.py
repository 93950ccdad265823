"""E8, how well pooled features separate the classes: two numbers, and a picture.

The paper shows an embedding [note]; which one was not found. Here it is t-SNE (van der Maaten and
Hinton, JMLR 9, 2008) [choice], and numbers of the features themselves stand beside it, because
distances in such a picture mean little.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.modes import frozen


class Embedding(NamedTuple):
    """Pooled features of images in two dimensions.

    Attributes:
        points: ``(N, 2)``.
        y: Labels, ``(N,)``.
        silhouette: Of the features, see :func:`separation`.
    """

    points: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    silhouette: float


class Separation(NamedTuple):
    """How far classes lie apart in feature space.

    Attributes:
        silhouette: Mean silhouette with the labels as clusters, in [-1, 1] (Rousseeuw 1987).
        class_mean_acc: Share of examples nearest to the mean of their own class, the means being
            those of clean features, in [0, 1].
    """

    silhouette: float
    class_mean_acc: float


def pooled_features(model: Any, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Features behind the global pooling of a classifier, ``(N, C)``, in evaluation mode.

    Args:
        model: Its ``net`` has ``pooled``.
        x: Images in [0, 1], ``(N, C, H, W)``.
        batch_size: How many at once.
    """
    with torch.no_grad(), frozen(model):
        return torch.cat([model.net.pooled(part).float() for part in torch.split(x, batch_size)])


def attacked(
    model: Any, x: Tensor, y: Tensor, attack: PGD, seed: int = 0, batch_size: int = 1000
) -> Tensor:
    """Adversarial images of ``x`` against cross-entropy, in evaluation mode.

    Args:
        model: Images in [0, 1] to logits.
        x: ``(N, C, H, W)``.
        y: Labels, ``(N,)``.
        attack: Makes them.
        seed: Of its random start.
        batch_size: How many at once.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    found = []
    with frozen(model):
        for images, labels in zip(
            torch.split(x, batch_size), torch.split(y, batch_size), strict=True
        ):

            def loss(z: Tensor, labels: Tensor = labels) -> Tensor:
                return cross_entropy(model(z), labels)

            found.append(attack(loss, images, generator))
    return torch.cat(found)


def separation(features: Tensor, y: Tensor, clean: Tensor) -> Separation:
    """Two numbers for one set of features.

    Args:
        features: ``(N, C)``.
        y: Labels, ``(N,)``, of at least two classes.
        clean: Features of the clean images, whose class means are the prototypes, ``(N, C)``.
    """
    classes = torch.unique(y)
    means = torch.stack([clean[y == label].mean(dim=0) for label in classes])
    nearest = classes[torch.cdist(features, means).argmin(dim=1)]
    return Separation(
        float(silhouette_score(features.cpu().numpy(), y.cpu().numpy())),
        (nearest == y).double().mean().item(),
    )


def embed(features: Tensor, y: Tensor, seed: int = 0) -> Embedding:
    """t-SNE in two dimensions: perplexity 30, started from principal components [choice].

    Args:
        features: ``(N, C)``, more than 30 of them.
        y: Labels, ``(N,)``.
        seed: Of the optimiser.
    """
    data = features.cpu().numpy()
    points = TSNE(perplexity=30.0, init="pca", random_state=seed).fit_transform(data)
    labels = y.cpu().numpy()
    return Embedding(points, labels, float(silhouette_score(data, labels)))
