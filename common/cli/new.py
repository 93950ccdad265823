"""The skeleton of a paper: ``python -m common.cli.new NAME`` writes ``paper_NAME`` and its test."""

import argparse
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from common.errors import ConfigurationError, UserError

FILES = {
    "paper_$name/__init__.py": '''\
"""$title: the title of the paper.

Authors. *Title*. Venue, year, arXiv number.

The claim in two or three sentences.
"""
''',
    "paper_$name/py.typed": "",
    "paper_$name/__main__.py": '''\
"""``python -m paper_$name fit|validate|test|predict|reproduce``."""

from common.cli.main import main

if __name__ == "__main__":
    main(package="paper_$name")
''',
    "paper_$name/method.py": '''\
"""The method of the paper, in the order of its equations."""

from typing import Any

from torch import Tensor

from common.attacks.losses import cross_entropy
from common.objectives import Batch, Objective, adversarial_images


class ${title}Objective(Objective):
    """Adversarial training, until the equations of the paper are here."""

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy of the adversarial images."""
        return cross_entropy(model(adversarial_images(batch)), batch["y"]).mean()
''',
    "paper_$name/module.py": '''\
"""How the method is trained, and what an attacker who knows it would maximise."""

from common.classifier import RobustClassifier
from common.objectives import InnerLoss


class ${title}Classifier(RobustClassifier):
    """A classifier whose evaluation also climbs the loss of the training attack."""

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Cross-entropy, margin and ``ce_inner``, the objective's own inner loss."""
        return {**super().adaptive_losses(), "ce_inner": self.objective.inner}
''',
    "paper_$name/configs/digits_resnet_$name.yaml": """\
# $title on the embedded digits, under a minute on a CPU
model:
  class_path: paper_$name.module.${title}Classifier
  init_args:
    net:
      class_path: common.networks.resnet.ResNet
      init_args: {depths: [1, 1], widths: [8, 16], strides: [1, 2]}
    objective: {class_path: paper_$name.method.${title}Objective}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
data: ../../common/configs/digits.yaml
adversary:
  attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 0.1, step_size: 0.025, steps: 5}}
evaluation:
  validation:
    attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 0.1, step_size: 0.025, steps: 5}}
  suite:
    pgd20:
      attack:
        class_path: common.attacks.pgd.PGD
        init_args: {eps: 0.1, step_size: 0.025, steps: 20}
      losses: ["ce_*"]
trainer: {max_epochs: 10, accelerator: cpu, log_every_n_steps: 5}
""",
    "paper_$name/reference.yaml": """\
# What the paper printed, in percent; a number that is absent was not found.
title: Title of the paper
groups:
  - id: digits
    title: "Digits"
    note: Ours only; the paper has no such table.
    metrics:
      - {key: clean_acc, title: "Clean"}
      - {key: pgd20, title: "PGD-20"}
rows:
  digits_resnet_$name: {groups: [digits], label: $title}
""",
    "paper_$name/README.md": """\
# $title

The claim of the paper, and whether our run supports it.

## Results

<!-- results -->
<!-- /results -->

## Method

| equation | symbol | code |
|---|---|---|
| (1) | L | `method.${title}Objective.outer` |

## Departures

None so far.
""",
    "tests/paper_$name/test_method.py": '''\
"""The equations of $title."""

import torch
from torch import nn

from common.attacks.losses import cross_entropy
from paper_$name.method import ${title}Objective


def test_the_objective_sees_adversarial_images_only(batch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    batch["x_adv"] = (batch["x"] + 0.1).clamp(max=1.0)
    expected = cross_entropy(net(batch["x_adv"]), batch["y"]).mean()
    torch.testing.assert_close(${title}Objective().outer(net, batch), expected)
''',
}


def make(name: str, root: Path) -> list[Path]:
    """Write the files of a paper and enter it into the linter's lists of ``pyproject.toml``.

    Args:
        name: Of the paper, as in ``paper_<name>``.
        root: The folder of the repository.

    Returns:
        The files written.

    Raises:
        ConfigurationError: If the name is no name of a package or is taken, or ``pyproject.toml``
            has no such lists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigurationError(
            f"a paper's name has small letters, digits and underscores, got {name!r}; for instance "
            "make new PAPER=mart"
        )
    package = f"paper_{name}"
    if (root / package).exists():
        raise ConfigurationError(f"there is a folder {package} already; choose another name")
    project = root / "pyproject.toml"
    text = _listed(project.read_text(), package)
    title = "".join(part.capitalize() for part in name.split("_"))
    written = []
    for path, content in FILES.items():
        target = root / Template(path).substitute(name=name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(content).substitute(name=name, title=title))
        written.append(target)
    project.write_text(text)
    return written


def _listed(text: str, package: str) -> str:
    """The text of ``pyproject.toml`` with one more paper; import-linter knows no patterns."""
    text, roots = re.subn(r'(root_packages = \[[^\]]*"paper_\w+")', rf'\1, "{package}"', text)
    text, layers = re.subn(r"(\| paper_\w+)( \| benchmarks)", rf"\1 | {package}\2", text)
    if roots != 1 or layers < 1:
        raise ConfigurationError(
            "pyproject.toml does not list the papers for import-linter as it did (root_packages, "
            "layers); enter the new one by hand"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the skeleton into the current folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.cli.new", description=__doc__)
    parser.add_argument("name", help="of the paper, as in paper_NAME")
    try:
        written = make(parser.parse_args(argv).name, Path())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
