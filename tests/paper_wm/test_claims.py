"""Every verdict, either way, and what keeps it from being given."""

from pathlib import Path

import pytest

from common.analysis.report import Found
from paper_wm import analysis
from paper_wm.analysis import CLAIMS, VARIANTS, attack_differences, claims, noise_differences
from paper_wm.measures import Evidence

SEEDS, JITTER = (0, 1, 2), (-0.01, 0.0, 0.01)
LEVELS = (*(f"uniform/level={x}" for x in (0.1, 0.2, 0.3)), "saltpepper/level=0.1")
BASE, BETTER = (0.5, 0.1), (0.8, 0.4)
DIGITS, SMOOTHING = "digits_cnn3", VARIANTS["smoothing"]


def metrics(**methods: tuple[float, ...]):
    """(method, seed) -> accuracies for (noise, attack[, clean]) that vary a little over seeds."""
    found = {}
    for i, (method, (noise, attack, *clean)) in enumerate(({"base": BASE} | methods).items()):
        for seed, jitter in zip(SEEDS, JITTER, strict=True):
            shift = jitter * (1 + 1e-3 * i)  # differences vary a little too
            one = {"clean_acc": (clean or [0.98])[0] + 0.1 * shift}
            one |= dict.fromkeys(LEVELS, noise + shift)
            one["uniform/level=0.1/draw=0"] = 0.0  # single draws are no levels
            for eps in ("0.03", "0.05"):
                one |= {f"fgsm/eps={eps}": 0.9, f"pgd20/eps={eps}": attack + shift}
                one[f"pgd20/eps={eps}_union"] = 0.0
            one |= {"bypass/ce_f": attack, "bypass/ce_bypass": attack + 0.1}
            found[method, seed] = one | {"pgd100": attack - 0.02, "aa": attack - 0.03}
    return found


def shifted(found, method: str, **of_key: float):
    """Something added to the accuracies of a method whose names hold a key."""
    for seed in SEEDS:
        for key in found[method, seed]:
            found[method, seed][key] += next((v for k, v in of_key.items() if k in key), 0.0)
    return found


@pytest.fixture
def judged(monkeypatch):
    """Claims by id, for metrics of the digits or by data set and network, and other evidence."""

    def judge(found, inserted=True, **evidence):
        monkeypatch.setattr(analysis, "try_insertions", lambda _: {"a": True, "b": inserted})
        analysed = Found(DIGITS, f"{DIGITS}_", SEEDS, Path(), Path())
        by_base = {DIGITS: found} if ("base", 0) in found else found
        analysed.kept["evidence"] = Evidence(by_base, **evidence)
        return {claim.id: claim.judgements for claim in claims(analysed)}

    return judge


def measured(gain: float, learned: float, frozen: float | None = 0.1):
    """Summaries of learned and frozen maps: the signal gain, correlations of variance and gain."""
    found = {}
    for seed in SEEDS:
        numbers = {"signal_gain": gain, "noise_gain": 7.0}
        found["smoothing", seed] = numbers | {"spearman_variance_gain": learned + JITTER[seed]}
        found["smoothing_frozen", seed] = numbers | {"spearman_variance_gain": frozen}
    return {"summaries": found}


def of_seeds(accuracy: float):
    return {"transferred": {("smoothing", seed): accuracy for seed in SEEDS}}


def learned_and_frozen(accuracy: float):
    return metrics(smoothing=(accuracy, 0.4), smoothing_frozen=(0.8, 0.4))


BETTER_MAPS, FAILED = metrics(smoothing=BETTER), {"audits": {("smoothing", 1): ["black_box"]}}


@pytest.mark.parametrize(
    ("id", "found", "evidence", "verdict"),
    [
        ("C1", BETTER_MAPS, {}, "supported"),
        ("C1", BETTER_MAPS, {"inserted": False}, "contradicted"),
        ("C1", metrics(), {}, "not run"),
        ("C2", metrics(smoothing=(0.8, 0.1)), {}, "supported"),
        ("C2", metrics(smoothing=(0.2, 0.1)), {}, "contradicted"),
        ("C2", metrics(smoothing=(0.5, 0.1)), {}, "not decided"),
        ("C2", metrics(), {}, "not run"),
        ("C3", BETTER_MAPS, {}, "supported"),
        ("C3", shifted(metrics(smoothing=BASE), "base", fgsm=-0.6), {}, "not decided"),
        ("C3", BETTER_MAPS, FAILED, "not decided"),
        ("C3", BETTER_MAPS, {"audits": {("base", 1): ["x"], ("smoothing", 1): []}}, "supported"),
        ("C3", BETTER_MAPS, of_seeds(0.3), "not decided"),
        ("C3", BETTER_MAPS, of_seeds(0.9), "supported"),
        ("C3", metrics(base=(0.5, 0.4), smoothing=BASE), FAILED, "contradicted"),
        ("C4", metrics(smoothing=(*BETTER, 0.97)), {}, "supported"),
        ("C4", metrics(smoothing=(*BETTER, 0.964)), {}, "contradicted"),
        ("C4", metrics(smoothing=(*BETTER, 0.999)), {}, "supported"),
        ("C4", metrics(), {}, "not run"),
        ("C5", BETTER_MAPS, {}, "supported"),
        ("C5", metrics(smoothing=(0.8, 0.1)), {}, "not decided"),
        ("C5", metrics(smoothing=(0.8, 0.0)), {}, "contradicted"),
        ("C5", metrics(), {}, "not run"),
        ("C6", learned_and_frozen(0.9), measured(50.0, 0.5), "supported"),
        ("C6", learned_and_frozen(0.9), measured(50.0, 0.1), "not decided"),  # not adaptive
        ("C6", learned_and_frozen(0.8), measured(50.0, 0.5), "not decided"),  # no more robust
        ("C6", learned_and_frozen(0.7), measured(50.0, 0.5), "contradicted"),
        ("C6", learned_and_frozen(0.9), measured(0.5, 0.5), "contradicted"),  # no amplification
        ("C6", learned_and_frozen(0.9), measured(50.0, 0.5, None), "not decided"),  # no control
        ("C6", learned_and_frozen(0.9), {}, "not run"),
        ("C7", BETTER_MAPS, {}, "not run"),  # not scaled up
        ("C7", {"cifar10_resnet18": BETTER_MAPS}, {}, "supported"),
        (
            "C7",
            {"cifar10_resnet18": BETTER_MAPS, "svhn_wrn16_4": metrics(smoothing=(0.2, 0.4))},
            {},
            "contradicted",
        ),
    ],
)
def test_a_claim_turns_out_either_way(id, found, evidence, verdict, judged) -> None:
    assert judged(found, **evidence)[id][SMOOTHING].verdict == verdict


@pytest.mark.parametrize("key", ["pgd100", "ce_bypass", "aa"])
def test_an_attack_that_should_be_no_stronger_is_a_sign_of_masking(key, judged) -> None:
    found = shifted(metrics(smoothing=BETTER), "smoothing", **{key: -0.2})
    one = judged(found)["C3"][SMOOTHING]
    assert one.verdict == "not decided"
    assert "points more than PGD-20" in one.reason


def test_c2_needs_two_levels_and_none_the_other_way(judged) -> None:
    found = shifted(metrics(smoothing=BASE), "smoothing", **{"uniform/level=0.1": 0.2})
    assert judged(found)["C2"][SMOOTHING].verdict == "not decided"
    found = shifted(found, "smoothing", **{"uniform/level=0.2": 0.2})
    assert judged(found)["C2"][SMOOTHING].verdict == "supported"
    found = shifted(found, "smoothing", **{"uniform/level=0.3": -0.2, "saltpepper": -0.2})
    one = judged(found)["C2"][SMOOTHING]
    assert one.verdict == "not decided"
    assert one.reason.startswith("up at 2, down at 2 of 4 noise levels")


def test_one_seed_decides_nothing(judged) -> None:
    found = {k: v for k, v in metrics(smoothing=(0.9, 0.6)).items() if k[1] == 0}
    assert {judged(found)[id][SMOOTHING].verdict for id in ("C2", "C3", "C4")} == {"not decided"}


def test_reasons_give_numbers_and_controls(judged) -> None:
    found = metrics(smoothing=BETTER, smoothing_frozen=(0.9, 0.4), wide=(0.4, 0.1))
    reasons = {id: one[SMOOTHING].reason for id, one in judged(found, **measured(50, 0.5)).items()}
    assert "controls: frozen 4 up, 0 down, wide 0 up, 4 down" in reasons["C2"]
    assert "signs of masking: none" in reasons["C3"]
    assert reasons["C4"].startswith(f"{DIGITS} +0.0")
    assert "median signal gain 50.00" in reasons["C6"]
    bases = {"cifar10_resnet18": found, "svhn_wrn16_4": metrics(smoothing=(*BETTER, 0.9))}
    reasons = {id: one[SMOOTHING].reason for id, one in judged(bases).items()}
    assert reasons["C7"] == "cifar10_resnet18 supported, svhn_wrn16_4 contradicted"


def test_differences_are_paired_and_in_points() -> None:
    noise = noise_differences(BETTER_MAPS, "smoothing", "base")
    assert set(noise) == set(LEVELS)
    for one in noise.values():
        assert one.mean == pytest.approx(30.0)
        assert one.high - one.low < 0.01, "what seeds share drops out"
    attacks = attack_differences(BETTER_MAPS, "smoothing", "base")
    assert set(attacks) == {"eps=0.03", "eps=0.05"}
    assert attacks["eps=0.03"].mean == pytest.approx(30.0), "the lowest over attacks counts"


def test_a_difference_that_is_not_significant_counts_for_nothing(judged) -> None:
    found = metrics(smoothing=BASE)
    for seed, shift in zip(SEEDS, (-0.1, 0.02, 0.11), strict=True):
        for key in LEVELS:
            found["smoothing", seed][key] += shift
    noise = noise_differences(found, "smoothing", "base")
    assert all(one.mean > 0 and not (one.is_up or one.is_down) for one in noise.values())
    assert judged(found)["C2"][SMOOTHING].verdict == "not decided"


def test_every_claim_is_judged_for_every_variant_with_results(judged) -> None:
    smoothing, unsharp, third = VARIANTS.values()
    found = judged(metrics(smoothing=BETTER, unsharp=(0.2, 0.0)))
    assert list(found) == list(CLAIMS)
    assert all(set(one) == {smoothing, unsharp} for one in found.values())
    assert {found[id][unsharp].verdict for id in ("C2", "C3", "C5")} == {"contradicted"}
    found = judged(metrics(smoothing=BETTER, subtract_summed=BASE))
    assert all(set(one) == {smoothing, unsharp, third} for one in found.values())
