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
from collections.abc import Callable, Mapping, Sequence

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
from paper_wm.figures import figures
from paper_wm.gathered import Gathered, base_of, gather, try_insertions
from paper_wm.method import Variant
from paper_wm.tables import amplification_table, checks_table

VARIANTS = {
    "smoothing": "smoothing",
    "unsharp": "unsharp, lam 1",
    "subtract_summed": "summed map subtracted (unverified reading of unsharp)",
}
"""Methods that are judged, with what the table calls them."""

JUDGED: tuple[Variant, ...] = ("smoothing", "unsharp", "subtract_summed")
SCALED_UP = ("resnet18", "wrn16_4", "wrn28_10")
CLEAN_LOSS = 1.5  # points
LEVELS = 2  # how many levels or radii make a claim
MASKING_GAP = 5.0  # points that a stronger attack may take beyond PGD-20

Audits = Mapping[tuple[str, int], Sequence[str]]
"""(method, seed) -> the checks for gradient masking that failed."""

Transferred = Mapping[tuple[str, int], float]
"""(method, seed) -> accuracy under images made on the base network, in [0, 1]."""

Summaries = Mapping[tuple[str, int], Mapping[str, float | None]]
"""(method, seed) -> numbers of :func:`paper_wm.measures.summarise`."""

_NOISE = re.compile(r"(uniform|gaussian|saltpepper)/level=[\d.e-]+")
_ATTACK = re.compile(r"(fgsm|bim10|mim10|pgd20|pgd100)/eps=([\d.e-]+)")


# ------------------------------------------------------------------------------------- differences


def noise_differences(metrics: Metrics, method: str, control: str) -> dict[str, Difference]:
    """Accuracy of a method minus that of its control, in points, at every noise level."""
    keys = {key for found in metrics.values() for key in found if _NOISE.fullmatch(key)}
    return _differences(
        {key: (by_seed(metrics, method, key), by_seed(metrics, control, key)) for key in keys}
    )


def attack_differences(metrics: Metrics, method: str, control: str) -> dict[str, Difference]:
    """The same at every radius, where accuracy is the lowest over the attacks at that radius."""
    radii: dict[str, list[str]] = {}
    for key in {key for found in metrics.values() for key in found}:
        if match := _ATTACK.fullmatch(key):
            radii.setdefault(match[2], []).append(key)

    def lowest(name: str, keys: Sequence[str]) -> BySeed:
        return {
            seed: min(found[key] for key in keys if key in found)
            for (owner, seed), found in metrics.items()
            if owner == name and any(key in found for key in keys)
        }

    return _differences(
        {f"eps={r}": (lowest(method, keys), lowest(control, keys)) for r, keys in radii.items()}
    )


def _differences(pairs: Mapping[str, tuple[BySeed, BySeed]]) -> dict[str, Difference]:
    """In points, by name, where there are any."""
    named = {name: paired_difference(*pairs[name], scale=100.0) for name in sorted(pairs)}
    return {name: found for name, found in named.items() if found is not None}


def direction(differences: Mapping[str, Difference]) -> Verdict:
    """The rule: two or more levels one way, fewer than two the other."""
    up = sum(one.is_up for one in differences.values())
    down = sum(one.is_down for one in differences.values())
    if up >= LEVELS > down:
        return "supported"
    return "contradicted" if down >= LEVELS > up else "not decided"


def counted(differences: Mapping[str, Difference], what: str) -> str:
    """How many levels are up and down, and the two that move most."""
    up = sum(one.is_up for one in differences.values())
    down = sum(one.is_down for one in differences.values())
    largest = sorted(differences, key=lambda name: -abs(differences[name].mean))[:2]
    shown = ", ".join(f"{name} {differences[name].text()}" for name in sorted(largest))
    return f"up at {up}, down at {down} of {len(differences)} {what}; {shown}"


def beside(
    differences: Callable[[Metrics, str, str], Mapping[str, Difference]],
    metrics: Metrics,
    method: str,
    control: str,
) -> str:
    """The same count for the controls that must accompany a result, where there are any."""
    parts = []
    for name in (f"{method}_frozen", "scale", "wide"):
        found = differences(metrics, name, control)
        if found:
            up = sum(one.is_up for one in found.values())
            down = sum(one.is_down for one in found.values())
            parts.append(f"{name.rpartition('_')[2]} {up} up, {down} down")
    return f"; controls: {', '.join(parts)}" if parts else ""


# ---------------------------------------------------------------------------------------- C1 to C7


def judge_insertion(inserted: Mapping[str, bool], trained: Sequence[str]) -> Judgement:
    """C1: one call puts maps into networks of many kinds, and their weights still load.

    Args:
        inserted: Network -> whether that worked.
        trained: Of which networks with maps there are results.
    """
    worked = sum(inserted.values())
    evidence = f"inserted into {worked} of {len(inserted)} networks ({', '.join(inserted)})"
    evidence += f"; trained in {', '.join(trained)}" if trained else "; trained in none"
    if not trained:
        return Judgement("not run", evidence)
    return Judgement("supported" if worked == len(inserted) else "contradicted", evidence)


def judge_noise(metrics: Metrics, method: str, control: str = "base") -> Judgement:
    """C2: more accurate under noise than the network without maps."""
    found = noise_differences(metrics, method, control)
    if not found:
        return _untested(method)
    evidence = counted(found, "noise levels") + beside(noise_differences, metrics, method, control)
    return Judgement(direction(found), evidence)


def judge_attacks(
    metrics: Metrics,
    method: str,
    audits: Audits | None = None,
    transferred: Transferred | None = None,
    control: str = "base",
) -> Judgement:
    """C3: more accurate under attack, and not by masking gradients."""
    found = attack_differences(metrics, method, control)
    if not found:
        return _untested(method)
    verdict = direction(found)
    evidence = counted(found, "radii") + beside(attack_differences, metrics, method, control)
    signs = masking_signs(metrics, method, audits or {}, transferred or {})
    evidence += f"; signs of masking: {'; '.join(signs) if signs else 'none'}"
    return Judgement("not decided" if signs and verdict == "supported" else verdict, evidence)


def masking_signs(
    metrics: Metrics, method: str, audits: Audits, transferred: Transferred
) -> list[str]:
    """What speaks for masked gradients: failed checks, and attacks that should be weaker."""
    signs = [
        f"seed {seed} fails {', '.join(failed)}"
        for (owner, seed), failed in audits.items()
        if owner == method and failed
    ]
    white_box = by_seed(metrics, method, "bypass/ce_f")
    stronger = {
        "PGD-100 with restarts": by_seed(metrics, method, "pgd100"),
        "gradients past the map": by_seed(metrics, method, "bypass/ce_bypass"),
        "AutoAttack": by_seed(metrics, method, "aa"),
        "transfer from base": {s: a for (owner, s), a in transferred.items() if owner == method},
    }
    for name, accuracy in stronger.items():
        gap = paired_difference(white_box, accuracy, scale=100.0)
        if gap is not None and gap.mean > MASKING_GAP:
            signs.append(f"{name} takes {gap.mean:.1f} points more than PGD-20")
    return signs


def judge_clean(found: Mapping[str, Difference]) -> Judgement:
    """C4: comparable clean accuracy, on every data set there is.

    Args:
        found: Data set and network -> :func:`clean_difference`.
    """
    if not found:
        return Judgement("not run", "no results")
    evidence = ", ".join(f"{name} {one.text()}" for name, one in found.items())
    evidence += f"; allowed -{CLEAN_LOSS:g}" + ("; one data set alone" if len(found) == 1 else "")
    if all(one.is_up for one in found.values()):
        return Judgement("supported", evidence)
    lost = any(one.is_down for one in found.values())
    return Judgement("contradicted" if lost else "not decided", evidence)


def judge_both(noise: Judgement, attacks: Judgement) -> Judgement:
    """C5: this variant is more robust to noise and to attacks."""
    verdicts = (noise.verdict, attacks.verdict)
    evidence = f"C2 {noise.verdict}, C3 {attacks.verdict}"
    for verdict in ("not run", "contradicted"):
        if verdict in verdicts:
            return Judgement(verdict, evidence)
    is_supported = verdicts == ("supported", "supported")
    return Judgement("supported" if is_supported else "not decided", evidence)


def judge_amplification(metrics: Metrics, summaries: Summaries, method: str) -> Judgement:
    """C6: the layer amplifies variance, adaptively, and that is why it is robust.

    Three conditions: the median signal gain is above 1 in every seed; the correlation over units of
    input variance and gain differs from that of the frozen control; and the learned map is more
    robust to noise than the frozen one. Contradicted if the gain is below 1 in every seed, or the
    learned map is less robust than the frozen one.
    """
    frozen = f"{method}_frozen"
    gains = by_seed(summaries, method, "signal_gain")
    if not gains:
        return _untested(method)
    noise_gain = mean(by_seed(summaries, method, "noise_gain"))
    key = "spearman_variance_gain"
    adaptive = paired_difference(by_seed(summaries, method, key), by_seed(summaries, frozen, key))
    robust = noise_differences(metrics, method, frozen)
    evidence = f"median signal gain {mean(gains):.2f}, noise gain {noise_gain:.2f}"
    if adaptive is None or not robust:
        return Judgement("not decided", f"{evidence}; no frozen control")
    evidence += (
        f"; learned minus frozen: rank correlation of variance and gain {adaptive.text(3)}, "
        f"accuracy {counted(robust, 'noise levels')}"
    )
    amplifies = all(gain > 1.0 for gain in gains.values())
    if all(gain < 1.0 for gain in gains.values()) or direction(robust) == "contradicted":
        return Judgement("contradicted", evidence)
    is_adaptive = adaptive.is_up or adaptive.is_down
    is_whole = amplifies and is_adaptive and direction(robust) == "supported"
    return Judgement("supported" if is_whole else "not decided", evidence)


def judge_scaled_up(by_base: Mapping[str, Metrics], method: str) -> Judgement:
    """C7: C2 to C4 on every scaled-up network there is."""
    found: dict[str, Verdict] = {}
    for base, metrics in by_base.items():
        if base.partition("_")[2] not in SCALED_UP or not by_seed(metrics, method, "clean_acc"):
            continue
        clean = clean_difference(metrics, method)
        parts = [
            judge_noise(metrics, method).verdict,
            judge_attacks(metrics, method).verdict,
            judge_clean({} if clean is None else {base: clean}).verdict,
        ]
        order: tuple[Verdict, ...] = ("not run", "contradicted", "not decided")
        found[base] = next((one for one in order if one in parts), "supported")
    if not found:
        return Judgement("not run", "no results of scaled-up networks")
    evidence = ", ".join(f"{base} {verdict}" for base, verdict in found.items())
    for verdict in ("contradicted", "not decided", "not run"):
        if verdict in found.values():
            return Judgement(verdict, evidence)
    return Judgement("supported", evidence)


def clean_difference(metrics: Metrics, method: str) -> Difference | None:
    """Clean accuracy of a method minus that of base, in points, tested against the loss allowed."""
    ours, theirs = (by_seed(metrics, name, "clean_acc") for name in (method, "base"))
    return t_test(minus(ours, theirs, 100.0), -CLEAN_LOSS)


def _untested(method: str) -> Judgement:
    return Judgement("not run", f"no results of {method} beside its control")


def judge_claims(
    base: str,
    by_base: Mapping[str, Metrics],
    audits: Audits,
    transferred: Transferred,
    summaries: Summaries,
    inserted: Mapping[str, Mapping[str, bool]],
) -> list[Claim]:
    """All seven claims for every variant that has results.

    Args:
        base: Data set and network that C2, C3, C5 and C6 are judged on, ``digits_cnn3``.
        by_base: Data set and network -> metrics.
        audits: Of ``base``.
        transferred: Of ``base``.
        summaries: Of ``base``.
        inserted: Method -> network -> whether its maps could be inserted.
    """
    metrics = by_base.get(base, {})
    judged: dict[str, dict[str, Judgement]] = {f"C{i}": {} for i in range(1, 8)}
    for method, name in VARIANTS.items():
        having = {b: m for b, m in by_base.items() if by_seed(m, method, "clean_acc")}
        if method not in ("smoothing", "unsharp") and base not in having:
            continue
        noise = judge_noise(metrics, method)
        attacks = judge_attacks(metrics, method, audits, transferred)
        clean = {b: d for b, m in having.items() if (d := clean_difference(m, method))}
        judged["C1"][name] = judge_insertion(inserted.get(method, {}), list(having))
        judged["C2"][name] = noise
        judged["C3"][name] = attacks
        judged["C4"][name] = judge_clean(clean)
        judged["C5"][name] = judge_both(noise, attacks)
        judged["C6"][name] = judge_amplification(metrics, summaries, method)
        judged["C7"][name] = judge_scaled_up(by_base, method)
    return [Claim(id, text, judged[id]) for id, text in CLAIMS.items()]


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
    "contradicts it. Differences are in points, with 95 % intervals. With three seeds the test has "
    "little power, levels are not independent, and p values are not corrected. Controls are "
    "compared with base too. What is tested is this reconstruction: a contradicted claim may be "
    "its fault."
)


def claims(found: Found) -> list[Claim]:
    """The seven claims of what was found."""
    got: Gathered = found.kept["gathered"]
    inserted = {str(variant): try_insertions(variant) for variant in JUDGED}
    found.measured["inserted"] = inserted
    return judge_claims(found.on, got.by_base, got.audits, got.transferred, got.summaries, inserted)


def scope(on: str) -> tuple[str, str]:
    """Data set and network, and the prefix of the methods."""
    return base_of(on), f"{base_of(on)}_"


ANALYSIS = Analysis(
    package="paper_wm",
    claims=claims,
    measure=gather,
    figures=figures,
    tables=lambda found: [amplification_table(found), checks_table(found)],
    scope=scope,
    baseline="base",
    accuracy="worst",
    accuracy_label="worst-case accuracy",
    note=NOTE,
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
