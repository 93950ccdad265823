"""Claims, amplification and adaptive checks: ``python -m paper_wm.analysis``.

The claims of the abstract, C1 to C7, are judged by one rule for each variant [D]. A gain counts at
a noise level or radius where the paired t-test over seeds against the network without maps is
significant. A claim of robustness is supported with two or more such levels up and fewer than two
down, contradicted the other way round, and not decided otherwise. Comparable clean accuracy is a
loss significantly below 1.5 points. A gain under attack that any check for gradient masking speaks
against is not decided, however large it is. Tags as in ``method.py``.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.analysis.claims import (
    BySeed,
    Claim,
    Judgement,
    Metrics,
    Verdict,
    by_seed,
    mean,
    minus,
    paired_difference,
    t_test,
)
from common.analysis.report import Analysis, Found
from common.results.statistics import Difference
from paper_wm.figures import amplification_table, checks_table, figures
from paper_wm.measures import (
    SCALED_UP,
    STRONGER,
    WHITE_BOX,
    Evidence,
    Summaries,
    measure_runs,
    of_method,
    scope,
)
from paper_wm.method import Variant
from paper_wm.networks import try_insertions

VARIANTS: dict[Variant, str] = {
    "smoothing": "smoothing",
    "unsharp": "unsharp, lam 1",
    "subtract_summed": "summed map subtracted (unverified reading of unsharp)",
}
"""Methods that are judged, with what the table calls them."""

CLEAN_LOSS = 1.5  # points
LEVELS = 2  # how many levels or radii make a claim
MASKING_GAP = 5.0  # points that a stronger attack may take beyond PGD-20

Differences = Callable[[Metrics, str, str], dict[str, Difference]]
_NOISE = re.compile(r"(uniform|gaussian|saltpepper)/level=[\d.e-]+")
_ATTACK = re.compile(r"(fgsm|bim10|mim10|pgd20|pgd100)/eps=([\d.e-]+)")


# ------------------------------------------------------------------------------------- differences


def noise_differences(metrics: Metrics, method: str, control: str) -> dict[str, Difference]:
    """Accuracy of a method minus that of its control, in points, at every noise level."""
    keys = {key for found in metrics.values() for key in found if _NOISE.fullmatch(key)}
    return _differences(metrics, method, control, {key: [key] for key in keys})


def attack_differences(metrics: Metrics, method: str, control: str) -> dict[str, Difference]:
    """The same at every radius, where accuracy is the lowest over the attacks at that radius."""
    radii: dict[str, list[str]] = {}
    for key in {key for found in metrics.values() for key in found}:
        if match := _ATTACK.fullmatch(key):
            radii.setdefault(f"eps={match[2]}", []).append(key)
    return _differences(metrics, method, control, radii)


def _differences(
    metrics: Metrics, method: str, control: str, levels: Mapping[str, Sequence[str]]
) -> dict[str, Difference]:
    def lowest(name: str, keys: Sequence[str]) -> BySeed:
        found = {
            s: [m[k] for k in keys if k in m] for (owner, s), m in metrics.items() if owner == name
        }
        return {seed: min(values) for seed, values in found.items() if values}

    differences = {
        level: paired_difference(lowest(method, keys), lowest(control, keys), scale=100.0)
        for level, keys in sorted(levels.items())
    }
    return {level: one for level, one in differences.items() if one is not None}


def ups_and_downs(differences: Mapping[str, Difference]) -> tuple[int, int]:
    """How many levels are significantly up, and how many down."""
    found = differences.values()
    return sum(one.is_up for one in found), sum(one.is_down for one in found)


def direction(differences: Mapping[str, Difference]) -> Verdict:
    """The rule: two or more levels one way, fewer than two the other."""
    up, down = ups_and_downs(differences)
    if up >= LEVELS > down:
        return "supported"
    return "contradicted" if down >= LEVELS > up else "not decided"


def counted(differences: Mapping[str, Difference], what: str) -> str:
    """How many levels are up and down, and two of them: significant ones first, then by size."""
    up, down = ups_and_downs(differences)

    def order(name: str) -> tuple[bool, float]:
        one = differences[name]
        return not (one.is_up or one.is_down), -abs(one.mean)

    largest = sorted(differences, key=order)[:2]
    shown = ", ".join(f"{name} {differences[name].text()}" for name in sorted(largest))
    return f"up at {up}, down at {down} of {len(differences)} {what}; {shown}"


# ---------------------------------------------------------------------------------------- C1 to C7


def _first_of(order: Sequence[Verdict], verdicts: Iterable[Verdict]) -> Verdict:
    """The first in ``order`` that is among the verdicts of parts, else supported."""
    given = set(verdicts)
    return next((verdict for verdict in order if verdict in given), "supported")


def judge_insertion(inserted: Mapping[str, bool], trained: Sequence[str]) -> Judgement:
    """C1: one call puts maps into networks of many kinds, by name, and some were ``trained``."""
    worked = sum(inserted.values())
    evidence = f"inserted into {worked} of {len(inserted)} networks ({', '.join(inserted)})"
    evidence += f"; trained in {', '.join(trained) or 'none'}"
    if not trained:
        return Judgement("not run", evidence)
    return Judgement("supported" if worked == len(inserted) else "contradicted", evidence)


def _judge_levels(differences: Differences, what: str, metrics: Metrics, method: str) -> Judgement:
    """By :func:`direction` against base; the same count for the controls stands beside."""
    found = differences(metrics, method, "base")
    if not found:
        return _untested(method)
    controls = []
    for name in (f"{method}_frozen", "scale", "wide"):
        if beside := differences(metrics, name, "base"):
            up, down = ups_and_downs(beside)
            controls.append(f"{name.rpartition('_')[2]} {up} up, {down} down")
    evidence = counted(found, what) + (f"; controls: {', '.join(controls)}" if controls else "")
    return Judgement(direction(found), evidence)


def judge_noise(metrics: Metrics, method: str) -> Judgement:
    """C2: more accurate under noise than the network without maps."""
    return _judge_levels(noise_differences, "noise levels", metrics, method)


def judge_attacks(metrics: Metrics, method: str, got: Evidence | None = None) -> Judgement:
    """C3: more accurate under attack, and not by masking gradients."""
    judged = _judge_levels(attack_differences, "radii", metrics, method)
    if judged.verdict == "not run":
        return judged
    signs = masking_signs(metrics, method, got or Evidence())
    verdict = "not decided" if signs and judged.verdict == "supported" else judged.verdict
    return Judgement(verdict, f"{judged.reason}; signs of masking: {'; '.join(signs) or 'none'}")


def masking_signs(metrics: Metrics, method: str, got: Evidence) -> list[str]:
    """What speaks for masked gradients: failed checks, and attacks that should be weaker."""
    signs = [
        f"seed {seed} fails {', '.join(failed)}"
        for (owner, seed), failed in got.audits.items()
        if owner == method and failed
    ]
    stronger = {name: by_seed(metrics, method, key) for key, name in STRONGER.items()}
    stronger["transfer from base"] = of_method(got.transferred, method)
    for name, accuracy in stronger.items():
        gap = paired_difference(by_seed(metrics, method, WHITE_BOX), accuracy, scale=100.0)
        if gap is not None and gap.mean > MASKING_GAP:
            signs.append(f"{name} takes {gap.mean:.1f} points more than PGD-20")
    return signs


def judge_clean(found: Mapping[str, Difference]) -> Judgement:
    """C4: comparable clean accuracy, from the :func:`clean_difference` of every data set."""
    if not found:
        return Judgement("not run", "no results")
    evidence = ", ".join(f"{name} {one.text()}" for name, one in found.items())
    evidence += f"; allowed -{CLEAN_LOSS:g}" + ("; one data set alone" if len(found) == 1 else "")
    if all(one.is_up for one in found.values()):
        return Judgement("supported", evidence)
    lost = any(one.is_down for one in found.values())
    return Judgement("contradicted" if lost else "not decided", evidence)


def clean_difference(metrics: Metrics, method: str) -> Difference | None:
    """Clean accuracy of a method minus that of base, in points, tested against the loss allowed."""
    ours, theirs = (by_seed(metrics, name, "clean_acc") for name in (method, "base"))
    return t_test(minus(ours, theirs, 100.0), -CLEAN_LOSS)


def judge_both(noise: Judgement, attacks: Judgement) -> Judgement:
    """C5: this variant is more robust to noise and to attacks."""
    verdicts = noise.verdict, attacks.verdict
    verdict = _first_of(("not run", "contradicted", "not decided"), verdicts)
    return Judgement(verdict, f"C2 {noise.verdict}, C3 {attacks.verdict}")


def judge_amplification(metrics: Metrics, summaries: Summaries, method: str) -> Judgement:
    """C6: the layer amplifies variance, adaptively, and that is why it is robust.

    Supported if the median signal gain is above 1 in every seed, the correlation over units of
    input variance and gain differs from the frozen control's, and the learned map is more robust to
    noise than the frozen one. Contradicted if the gain is below 1 in every seed, or it is less so.
    """
    frozen_map, key = f"{method}_frozen", "spearman_variance_gain"
    gains = by_seed(summaries, method, "signal_gain")
    if not gains:
        return _untested(method)
    noise_gain = mean(by_seed(summaries, method, "noise_gain"))
    evidence = f"median signal gain {mean(gains):.2f}, noise gain {noise_gain:.2f}"
    learned, fixed = (by_seed(summaries, name, key) for name in (method, frozen_map))
    adaptive, robust = (
        paired_difference(learned, fixed),
        noise_differences(metrics, method, frozen_map),
    )
    if adaptive is None or not robust:
        return Judgement("not decided", f"{evidence}; no frozen control")
    evidence += (
        f"; learned minus frozen: rank correlation of variance and gain {adaptive.text(3)}, "
        f"accuracy {counted(robust, 'noise levels')}"
    )
    if all(gain < 1.0 for gain in gains.values()) or direction(robust) == "contradicted":
        return Judgement("contradicted", evidence)
    is_adaptive = adaptive.is_up or adaptive.is_down
    amplifies = all(gain > 1.0 for gain in gains.values())
    is_whole = amplifies and is_adaptive and direction(robust) == "supported"
    return Judgement("supported" if is_whole else "not decided", evidence)


def judge_scaled_up(by_base: Mapping[str, Metrics], method: str) -> Judgement:
    """C7: C2 to C4 on every scaled-up network there is."""
    found: dict[str, Verdict] = {}
    for base, metrics in by_base.items():
        if base.partition("_")[2] in SCALED_UP and by_seed(metrics, method, "clean_acc"):
            clean = clean_difference(metrics, method)
            parts = (
                judge_noise(metrics, method),
                judge_attacks(metrics, method),
                judge_clean({} if clean is None else {base: clean}),
            )
            order: tuple[Verdict, ...] = ("not run", "contradicted", "not decided")
            found[base] = _first_of(order, (part.verdict for part in parts))
    if not found:
        return Judgement("not run", "no results of scaled-up networks")
    evidence = ", ".join(f"{base} {verdict}" for base, verdict in found.items())
    return Judgement(
        _first_of(("contradicted", "not decided", "not run"), found.values()), evidence
    )


def _untested(method: str) -> Judgement:
    return Judgement("not run", f"no results of {method} beside its control")


CLAIMS = {
    "C1": "a generic architectural addition [P1] [P2]",
    "C2": "more robust to noise than the same network without it [P1] [P2]",
    "C3": "more robust to adversarial attacks [P1] [P2]",
    "C4": "at the same or similar [P1], comparable across data sets [P2], clean accuracy",
    "C5": "two variants, both more robust [P1] [P2]",
    "C6": "because of adaptive amplification of the variance of noise [P1], of activations [P2]",
    "C7": "also in scaled-up models [P1] [P2]",
}

NOTE = (
    "By one rule: a level counts where the paired t-test over seeds against base is significant "
    f"(two-sided, 5 %); {LEVELS} or more levels up and fewer down support a claim, the reverse "
    "contradicts it. Differences are in points, with 95 % intervals. With few seeds the test has "
    "little power, levels are not independent, and p values are not corrected. Controls are "
    "compared with base too. What is tested is this reconstruction: a contradicted claim may be "
    "its fault."
)


def claims(found: Found) -> list[Claim]:
    """All seven claims for every variant that has results."""
    got: Evidence = found.kept["evidence"]
    inserted = {str(variant): try_insertions(variant) for variant in VARIANTS}
    found.measured["inserted"] = inserted
    metrics = got.by_base.get(found.on, {})
    judged: dict[str, dict[str, Judgement]] = {id: {} for id in CLAIMS}
    for method, name in VARIANTS.items():
        having = {b: m for b, m in got.by_base.items() if by_seed(m, method, "clean_acc")}
        if method == "subtract_summed" and found.on not in having:
            continue
        noise, attacks = judge_noise(metrics, method), judge_attacks(metrics, method, got)
        clean = {b: d for b, m in having.items() if (d := clean_difference(m, method))}
        judgements = (
            judge_insertion(inserted[method], list(having)),
            noise,
            attacks,
            judge_clean(clean),
            judge_both(noise, attacks),
            judge_amplification(metrics, got.summaries, method),
            judge_scaled_up(got.by_base, method),
        )
        for id, judgement in zip(CLAIMS, judgements, strict=True):
            judged[id][name] = judgement
    return [Claim(id, text, judged[id]) for id, text in CLAIMS.items()]


ANALYSIS = Analysis(
    package="paper_wm",
    claims=claims,
    measure=measure_runs,
    figures=figures,
    tables=lambda found: [amplification_table(found), checks_table(found)],
    scope=scope,
    accuracy="worst",
    accuracy_label="worst-case accuracy",
    note=NOTE,
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
