"""What the engine does to the robustness of what is trained with it."""

import statistics

import torch
from torch import Tensor, nn

from benchmarks.evaluation import EPS, robust_digits
from benchmarks.timing import Keep
from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.suite import SuiteEntry, steps_of
from common.results.statistics import paired_t_test

BASE = "no engine"
ENGINES = {
    BASE: None,
    "folded, channels_last": AttackEngine(),
    "folded, channels_last, bf16": AttackEngine(precision="bf16"),
}
SUITE = {
    "pgd50": SuiteEntry(PGD(EPS, EPS / 4, 50), ["ce_f", "cw_f"]),
    "apgd": SuiteEntry(AutoAttack(EPS, version="custom", attacks=["apgd-ce"])),
}


def compare(seeds: int, epochs: int, keep: Keep) -> None:
    """Clean and worst-case accuracy over seeds, by the engine of the training attack.

    The evaluation attacks the plain float32 network, for every training engine.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for seed in range(seeds):
        for name, engine in ENGINES.items():
            found[name].append(_accuracies(*robust_digits(epochs, seed, engine)))
            both = "clean {clean:.3f}, worst case {worst:.3f}".format_map(found[name][-1])
            print(f"  seed {seed + 1} of {seeds}: {both}: {name}", flush=True)
        keep(
            {
                "setting": f"DigitsResNet on 8x8 digits, {epochs} epochs of PGD-5 training in linf "
                f"eps {EPS}, {seed + 1} seeds; the worst case of PGD-50 on two losses and APGD on "
                "700 test images, all in float32 without an engine",
                "rows": {name: _row(found[name], found[BASE]) for name in ENGINES},
                "accuracies": found,
            }
        )


def _accuracies(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    model = Victim(net, 10).eval()
    batch = {"x": x, "y": y, "index": torch.arange(len(y))}
    steps = steps_of(SUITE, model, 10, 0)
    correct = run_steps(model, batch, steps, seed=0, batch_size=len(y)).correct
    robust = torch.stack(list(correct.values())).all(dim=0)
    return {"clean": correct["clean"].float().mean().item(), "worst": robust.float().mean().item()}


def _row(found: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for key in ("clean", "worst"):
        values, others = ([one[key] for one in every] for every in (found, base))
        row[key] = statistics.mean(values)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        test = paired_t_test([a - b for a, b in zip(values, others, strict=True)])
        if found is not base and test is not None and test.is_tested:
            row |= {f"{key}_p": test.p, f"{key}_low": test.low, f"{key}_high": test.high}
    return row
