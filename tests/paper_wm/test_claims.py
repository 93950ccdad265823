"""Every verdict, either way, and what keeps it from being given."""

from pathlib import Path

import pytest

from common.analysis.report import Found
from paper_wm import analysis
from paper_wm.analysis import (
    CLAIMS,
    VARIANTS,
    attack_differences,
    claims,
    clean_difference,
    direction,
    judge_amplification,
    judge_attacks,
    judge_both,
    judge_clean,
    judge_insertion,
    judge_noise,
    judge_scaled_up,
    masking_signs,
    noise_differences,
)
from paper_wm.measures import Evidence

SEEDS, JITTER = (0, 1, 2), (-0.01, 0.0, 0.01)
LEVELS = (*(f"uniform/level={x}" for x in (0.1, 0.2, 0.3)), "saltpepper/level=0.1")
BASE, BETTER = (0.5, 0.1), (0.8, 0.4)


def metrics(**methods: tuple[float, ...]):
    """(method, seed) -> accuracies for (noise, attack[, clean]) that vary a little over seeds."""
    found = {}
    for method, (noise, attack, *clean) in methods.items():
        for seed, shift in zip(SEEDS, JITTER, strict=True):
            one = {"clean_acc": (clean or [0.98])[0] + 0.1 * shift}
            one |= dict.fromkeys(LEVELS, noise + shift)
            one["uniform/level=0.1/draw=0"] = 0.0  # single draws are no levels
            for eps in ("0.03", "0.05"):
                one |= {f"fgsm/eps={eps}": 0.9, f"pgd20/eps={eps}": attack + shift}
                one[f"pgd20/eps={eps}_union"] = 0.0
            one |= {"bypass/ce_f": attack, "bypass/ce_bypass": attack + 0.1}
            found[method, seed] = one | {"pgd100": attack - 0.02, "aa": attack - 0.03}
    return found


def changed(found, method: str, **of_key: float):
    """The same with something added to keys that begin so."""
    for seed in SEEDS:
        for key in found[method, seed]:
            found[method, seed][key] += next((v for k, v in of_key.items() if k in key), 0.0)
    return found


# ----------------------------------------------------------------------------------- differences


def test_differences_are_paired_and_in_points() -> None:
    found = metrics(base=BASE, smoothing=BETTER)
    noise = noise_differences(found, "smoothing", "base")
    assert set(noise) == set(LEVELS)
    for one in noise.values():
        assert one.mean == pytest.approx(30.0)
        assert one.high - one.low == pytest.approx(0.0, abs=1e-9), "what seeds share drops out"
    attacks = attack_differences(found, "smoothing", "base")
    assert set(attacks) == {"eps=0.03", "eps=0.05"}
    assert attacks["eps=0.03"].mean == pytest.approx(30.0), "the lowest over attacks counts"


def test_a_gain_under_fgsm_alone_is_no_gain() -> None:
    found = changed(metrics(base=BASE, smoothing=BASE), "base", fgsm=-0.6)
    assert judge_attacks(found, "smoothing").verdict == "not decided"


def test_a_difference_that_is_not_significant_counts_for_nothing() -> None:
    found = metrics(base=BASE, smoothing=BASE)
    for seed, shift in zip(SEEDS, (-0.1, 0.02, 0.11), strict=True):
        for key in LEVELS:
            found["smoothing", seed][key] += shift
    noise = noise_differences(found, "smoothing", "base")
    assert all(one.mean > 0 and not (one.is_up or one.is_down) for one in noise.values())
    assert direction(noise) == "not decided"


# ---------------------------------------------------------------------------------- single claims


@pytest.mark.parametrize(
    ("inserted", "trained", "verdict"),
    [
        ({"a": True, "b": True}, ["digits_cnn3"], "supported"),
        ({"a": True, "b": False}, ["digits_cnn3"], "contradicted"),
        ({"a": True}, [], "not run"),
    ],
)
def test_c1_takes_every_network(inserted, trained, verdict) -> None:
    assert judge_insertion(inserted, trained).verdict == verdict


@pytest.mark.parametrize(
    ("noise", "verdict"), [(0.8, "supported"), (0.2, "contradicted"), (0.5, "not decided")]
)
def test_c2_turns_out_either_way(noise, verdict) -> None:
    found = metrics(base=BASE, smoothing=(noise, 0.1))
    assert judge_noise(found, "smoothing").verdict == verdict
    assert judge_noise(found, "scale").verdict == "not run"


def test_c2_needs_two_levels_and_none_the_other_way() -> None:
    found = metrics(base=BASE, smoothing=BASE)
    found = changed(found, "smoothing", **{"uniform/level=0.1": 0.2})
    assert judge_noise(found, "smoothing").verdict == "not decided"
    found = changed(found, "smoothing", **{"uniform/level=0.2": 0.2})
    assert judge_noise(found, "smoothing").verdict == "supported"
    found = changed(found, "smoothing", **{"uniform/level=0.3": -0.2, "saltpepper": -0.2})
    judged = judge_noise(found, "smoothing")
    assert judged.verdict == "not decided"
    assert judged.reason.startswith("up at 2, down at 2 of 4 noise levels")


def test_one_seed_decides_nothing() -> None:
    found = {k: v for k, v in metrics(base=BASE, smoothing=(0.9, 0.6)).items() if k[1] == 0}
    clean = {"digits_cnn3": clean_difference(found, "smoothing")}
    judged = (judge_noise(found, "smoothing"), judge_attacks(found, "smoothing"))
    assert {one.verdict for one in (*judged, judge_clean(clean))} == {"not decided"}


def test_controls_stand_beside() -> None:
    found = metrics(base=BASE, smoothing=BETTER, smoothing_frozen=(0.9, 0.4), wide=(0.4, 0.1))
    evidence = judge_noise(found, "smoothing").reason
    assert "controls: frozen 4 up, 0 down, wide 0 up, 4 down" in evidence


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        (Evidence(), "supported"),
        (Evidence(audits={("smoothing", 1): ["black_box"]}), "not decided"),
        (Evidence(audits={("base", 1): ["black_box"], ("smoothing", 1): []}), "supported"),
        (Evidence(transferred={("smoothing", seed): 0.3 for seed in SEEDS}), "not decided"),
        (Evidence(transferred={("smoothing", seed): 0.9 for seed in SEEDS}), "supported"),
    ],
)
def test_c3_is_not_supported_by_masked_gradients(got, verdict) -> None:
    judged = judge_attacks(metrics(base=BASE, smoothing=BETTER), "smoothing", got)
    assert judged.verdict == verdict
    assert ("signs of masking: none" in judged.reason) == (verdict == "supported")
    worse = metrics(base=(0.5, 0.4), smoothing=(0.8, 0.1))
    assert judge_attacks(worse, "smoothing", got).verdict == "contradicted", "masking excuses none"


@pytest.mark.parametrize("key", ["pgd100", "ce_bypass", "aa"])
def test_an_attack_that_should_be_no_stronger_is_a_sign(key) -> None:
    found = metrics(base=BASE, smoothing=BETTER)
    assert masking_signs(found, "smoothing", Evidence()) == []
    (sign,) = masking_signs(changed(found, "smoothing", **{key: -0.2}), "smoothing", Evidence())
    assert "points more than PGD-20" in sign
    assert judge_attacks(found, "smoothing").verdict == "not decided"


@pytest.mark.parametrize(
    ("clean", "verdict"),
    [(0.98, "supported"), (0.97, "supported"), (0.964, "contradicted"), (0.999, "supported")],
)
def test_c4_allows_a_point_and_a_half(clean, verdict) -> None:
    difference = clean_difference(metrics(base=BASE, smoothing=(*BETTER, clean)), "smoothing")
    judged = judge_clean({"digits_cnn3": difference})
    assert judged.verdict == verdict
    assert judged.reason.startswith(f"digits_cnn3 {100 * (clean - 0.98):+.1f}")
    fine = clean_difference(metrics(base=BASE, smoothing=BETTER), "smoothing")
    both = judge_clean({"mnist_cnn3": fine, "digits_cnn3": difference})
    assert both.verdict == verdict, "on every data set"
    assert judge_clean({}).verdict == "not run"


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        ("good", "supported"),
        ("half", "not decided"),
        ("bad", "contradicted"),
        ("none", "not run"),
    ],
)
def test_c5_takes_both(method, verdict) -> None:
    found = metrics(base=BASE, good=BETTER, half=(0.8, 0.1), bad=(0.8, 0.0))
    judged = judge_both(judge_noise(found, method), judge_attacks(found, method))
    assert judged.verdict == verdict


def summaries(gain: float, learned: float, frozen: float = 0.1):
    found = {}
    for seed in SEEDS:
        numbers = {"signal_gain": gain, "noise_gain": 7.0}
        found["smoothing", seed] = numbers | {"spearman_variance_gain": learned + JITTER[seed]}
        found["smoothing_frozen", seed] = numbers | {"spearman_variance_gain": frozen}
    return found


@pytest.mark.parametrize(
    ("gain", "learned", "robust", "verdict"),
    [
        (50.0, 0.5, 0.9, "supported"),
        (50.0, 0.1, 0.9, "not decided"),  # no more adaptive than the frozen control
        (50.0, 0.5, 0.8, "not decided"),  # no more robust than it
        (50.0, 0.5, 0.7, "contradicted"),
        (0.5, 0.5, 0.9, "contradicted"),  # no amplification at all
    ],
)
def test_c6_takes_amplification_adaptivity_and_their_use(gain, learned, robust, verdict) -> None:
    found = metrics(base=BASE, smoothing=(robust, 0.4), smoothing_frozen=(0.8, 0.4))
    measured = summaries(gain, learned)
    judged = judge_amplification(found, measured, "smoothing")
    assert judged.verdict == verdict
    assert f"median signal gain {gain:.2f}" in judged.reason
    alone = {key: one for key, one in measured.items() if key[0] == "smoothing"}
    judged = judge_amplification(found, alone, "smoothing")
    assert (judged.verdict, "no frozen control" in judged.reason) == ("not decided", True)
    assert judge_amplification(found, {}, "smoothing").verdict == "not run"


def test_c7_asks_for_scaled_up_networks() -> None:
    good = metrics(base=BASE, smoothing=BETTER)
    bad = metrics(base=BASE, smoothing=(0.2, 0.4))
    assert judge_scaled_up({"digits_cnn3": good}, "smoothing").verdict == "not run"
    assert judge_scaled_up({"cifar10_resnet18": good}, "smoothing").verdict == "supported"
    both = judge_scaled_up({"cifar10_resnet18": good, "svhn_wrn16_4": bad}, "smoothing")
    assert both.verdict == "contradicted"
    assert both.reason == "cifar10_resnet18 supported, svhn_wrn16_4 contradicted"


# ------------------------------------------------------------------------------------ all of them


def test_every_claim_is_judged_for_every_variant_with_results(monkeypatch) -> None:
    monkeypatch.setattr(analysis, "try_insertions", lambda variant: {"a": True})
    found = Found("digits_cnn3", "digits_cnn3_", SEEDS, Path(), Path())

    def judged(**methods):
        found.kept["evidence"] = Evidence({"digits_cnn3": metrics(**methods)})
        return {one.id: {k: j.verdict for k, j in one.judgements.items()} for one in claims(found)}

    verdicts = judged(base=BASE, smoothing=BETTER, unsharp=(0.2, 0.0))
    assert list(verdicts) == list(CLAIMS)
    smoothing, unsharp, third = VARIANTS.values()
    assert all(set(found) == {smoothing, unsharp} for found in verdicts.values())
    assert [verdicts[c][smoothing] for c in ("C1", "C2", "C3", "C4", "C5")] == ["supported"] * 5
    assert [verdicts[c][unsharp] for c in ("C2", "C3", "C5")] == ["contradicted"] * 3
    assert verdicts["C7"] == {smoothing: "not run", unsharp: "not run"}
    verdicts = judged(base=BASE, smoothing=BETTER, subtract_summed=BASE)
    assert all(set(found) == {smoothing, unsharp, third} for found in verdicts.values())
