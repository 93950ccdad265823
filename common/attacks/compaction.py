"""Projected ascent that spends no step on an example that is broken already.

Plain PGD takes all its steps with every example and is judged where it ends. Here examples are
classified now and then on the way; those found wrong keep that point and leave the batch, which
gets smaller. Whoever is never found wrong takes exactly the steps of PGD. So an example that PGD
breaks is broken here too, and some that PGD breaks and loses again are broken here alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.attacks.geometry import projection
from common.attacks.pgd import PGD, LossFn
from common.attacks.randomness import ExampleRandom

Of = Callable[[Tensor], tuple[LossFn, Callable[[Tensor], Tensor]]]
"""Rows of the batch -> their loss (x' -> (n,)), and whether they are misclassified (x' -> bool)."""


def check_points(steps: int) -> set[int]:
    """After which steps examples are classified: 1, 2, 3, 4, 6, 9, 13, ..., before the last.

    Half as many steps again lie between two of them: eleven more forward passes in a hundred steps.
    """
    points, at = set(), 1
    while at < steps:
        points.add(at)
        at += max(1, at // 2)
    return points


def climb_until_broken(attack: PGD, of: Of, x: Tensor, random: ExampleRandom) -> Tensor:
    """Attack every example until it is misclassified or all steps and restarts are taken.

    Args:
        attack: Any ascent whose steps are those of :class:`PGD`; early-stopped ones have a rule of
            their own. ``attack.unmoved`` then says which rows no step had a direction for.
        of: Makes loss and verdict of some rows; an example's loss depends on no other example.
        x: Images in [0, 1], ``(N, C, H, W)``.
        random: Made from the indices of all rows.

    Returns:
        x', detached, in box and ball: of an example that fell the first point found wrong, of the
        others what PGD gives.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
        out = x.clone()
        best = torch.full((len(x),), -torch.inf, device=x.device)
        standing = torch.arange(len(x), device=x.device)
        unmoved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(attack.restarts):
            if len(standing) == 0:
                break
            ends, is_broken, is_idle = _ascent(attack, of, x[standing], standing, random)
            unmoved[standing] &= is_idle
            attack.lost, attack.unmoved = torch.zeros_like(unmoved), unmoved
            if attack.restarts == 1:
                return ends
            loss_fn, _ = of(standing)
            with torch.no_grad():
                loss = loss_fn(ends).nan_to_num(nan=-torch.inf, posinf=torch.inf).to(best.dtype)
            is_first = best[standing].isneginf()
            better = is_broken | is_first | (loss > best[standing])
            out[standing[better]] = ends[better]
            best[standing[better]] = loss[better]
            random = random.of(~is_broken)
            standing = standing[~is_broken]
        return out


def _ascent(
    attack: PGD, of: Of, x: Tensor, rows: Tensor, random: ExampleRandom
) -> tuple[Tensor, Tensor, Tensor]:
    """One ascent: where each row ends, which were found wrong on the way, and which never moved."""
    points = check_points(attack.steps)
    project = projection(x, attack.eps, attack.norm)
    x_adv = attack._start(x, project, random)
    velocity = torch.zeros_like(x) if attack.momentum is not None else None
    loss_fn, is_wrong = of(rows)
    ends = x.clone()
    at = torch.arange(len(x), device=x.device)  # where in ``ends`` the climbing ones belong
    is_idle = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(1, attack.steps + 1):
        attack.lost = attack.unmoved = None  # about as many examples as there were a step ago
        direction, velocity = attack._direction(loss_fn, x_adv, velocity)
        is_idle[at] &= (direction == 0.0).flatten(1).all(dim=1)
        x_adv = project(x_adv.add(direction, alpha=attack.step_size))
        if step not in points:
            continue
        fallen = is_wrong(x_adv)
        if not fallen.any():
            continue
        ends[at[fallen]] = x_adv[fallen]
        kept = ~fallen
        at, x_adv = at[kept], x_adv[kept]
        if len(at) == 0:
            break
        velocity = None if velocity is None else velocity[kept]
        project = projection(x[at], attack.eps, attack.norm)
        loss_fn, is_wrong = of(rows[at])
    ends[at] = x_adv
    is_broken = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if len(at) > 0:
        is_broken[at] = is_wrong(x_adv)
    return ends, is_broken, is_idle
