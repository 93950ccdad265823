"""Every verdict, either way, and what keeps it from being given."""

import pytest

from paper_wm.analysis import (
    CLAIMS,
    VARIANTS,
    attack_differences,
    clean_difference,
    direction,
    judge_amplification,
    judge_attacks,
    judge_both,
    judge_claims,
    judge_clean,
    judge_insertion,
    judge_noise,
    judge_scaled_up,
    masking_signs,
    noise_differences,
)

SEEDS = (0, 1, 2)
JITTER = (-0.01, 0.0, 0.01)


def accuracies(noise: float, attack: float, clean: float = 0.98, seed: int = 0) -> dict[str, float]:
    """Accuracies that vary a little between seeds."""
    shift = JITTER[seed]
    found = {"clean_acc": clean + 0.1 * shift}
    for level in (0.1, 0.2, 0.3):
        found[f"uniform/level={level}"] = noise + shift
        found[f"uniform/level={level}/draw=0"] = 0.0  # single draws are no levels
    found["saltpepper/level=0.1"] = noise + shift
    for eps in ("0.03", "0.05"):
        found[f"fgsm/eps={eps}"] = 0.9
        found[f"pgd20/eps={eps}"] = attack + shift
        found[f"pgd20/eps={eps}_union"] = 0.0
    found |= {"bypass/ce_f": attack, "bypass/ce_bypass": attack + 0.1, "pgd100": attack - 0.02}
    return found | {"aa": attack - 0.03}


def metrics(**methods: tuple[float, ...]):
    return {
        (method, seed): accuracies(*values, seed=seed)
        for method, values in methods.items()
        for seed in SEEDS
    }


# ----------------------------------------------------------------------------------- differences


def test_differences_are_paired_and_in_points() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4))
    noise = noise_differences(found, "smoothing", "base")
    assert set(noise) == {f"uniform/level={x}" for x in (0.1, 0.2, 0.3)} | {"saltpepper/level=0.1"}
    for one in noise.values():
        assert one.mean == pytest.approx(30.0)
        assert one.high - one.low == pytest.approx(0.0, abs=1e-9), "what seeds share drops out"
    attacks = attack_differences(found, "smoothing", "base")
    assert set(attacks) == {"eps=0.03", "eps=0.05"}
    assert attacks["eps=0.03"].mean == pytest.approx(30.0), "the lowest over attacks counts"


def test_a_gain_under_fgsm_alone_is_no_gain() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.5, 0.1))
    for seed in SEEDS:
        for eps in ("0.03", "0.05"):
            found["base", seed][f"fgsm/eps={eps}"] = 0.3
    assert judge_attacks(found, "smoothing").verdict == "not decided"


def test_a_difference_that_is_not_significant_counts_for_nothing() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.5, 0.1))
    for seed, shift in zip(SEEDS, (-0.1, 0.02, 0.11), strict=True):
        for key in found["smoothing", seed]:
            if key.startswith(("uniform", "saltpepper")):
                found["smoothing", seed][key] += shift
    noise = noise_differences(found, "smoothing", "base")
    assert all(one.mean > 0 for one in noise.values())
    assert not any(one.is_up or one.is_down for one in noise.values())
    assert direction(noise) == "not decided"


# ---------------------------------------------------------------------------------- single claims


@pytest.mark.parametrize(
    ("noise", "verdict"), [(0.8, "supported"), (0.2, "contradicted"), (0.5, "not decided")]
)
def test_c2_turns_out_either_way(noise, verdict) -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(noise, 0.1))
    assert judge_noise(found, "smoothing").verdict == verdict


def test_c2_needs_two_levels_and_none_the_other_way() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.5, 0.1))
    for seed in SEEDS:
        found["smoothing", seed]["uniform/level=0.1"] += 0.2
    assert judge_noise(found, "smoothing").verdict == "not decided"
    for seed in SEEDS:
        found["smoothing", seed]["uniform/level=0.2"] += 0.2
    assert judge_noise(found, "smoothing").verdict == "supported"
    for seed in SEEDS:
        found["smoothing", seed]["uniform/level=0.3"] -= 0.2
        found["smoothing", seed]["saltpepper/level=0.1"] -= 0.2
    judged = judge_noise(found, "smoothing")
    assert judged.verdict == "not decided"
    assert judged.reason.startswith("up at 2, down at 2 of 4 noise levels")


def test_one_seed_decides_nothing() -> None:
    found = {k: v for k, v in metrics(base=(0.5, 0.1), smoothing=(0.9, 0.6)).items() if k[1] == 0}
    assert judge_noise(found, "smoothing").verdict == "not decided"
    assert judge_attacks(found, "smoothing").verdict == "not decided"
    clean = clean_difference(found, "smoothing")
    assert clean is not None
    assert judge_clean({"digits_cnn3": clean}).verdict == "not decided"


def test_controls_stand_beside() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4), smoothing_frozen=(0.9, 0.4))
    found |= metrics(wide=(0.4, 0.1))
    evidence = judge_noise(found, "smoothing").reason
    assert "controls: frozen 4 up, 0 down, wide 0 up, 4 down" in evidence


def test_c3_is_not_supported_by_masked_gradients() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4))
    assert judge_attacks(found, "smoothing").verdict == "supported"
    failed = judge_attacks(found, "smoothing", {("smoothing", 1): ["black_box"]})
    assert failed.verdict == "not decided"
    assert "seed 1 fails black_box" in failed.reason
    elsewhere = judge_attacks(found, "smoothing", {("base", 1): ["black_box"]})
    assert elsewhere.verdict == "supported"
    bad = {("smoothing", seed): 0.3 for seed in SEEDS}
    assert judge_attacks(found, "smoothing", {}, bad).verdict == "not decided"
    fine = {("smoothing", seed): 0.9 for seed in SEEDS}
    assert judge_attacks(found, "smoothing", {}, fine).verdict == "supported"


@pytest.mark.parametrize("key", ["pgd100", "bypass/ce_bypass", "aa"])
def test_an_attack_that_should_be_no_stronger_is_a_sign(key) -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4))
    assert masking_signs(found, "smoothing", {}, {}) == []
    for seed in SEEDS:
        found["smoothing", seed][key] = 0.3
    (sign,) = masking_signs(found, "smoothing", {}, {})
    assert "takes 10.0 points more than PGD-20" in sign
    assert judge_attacks(found, "smoothing").verdict == "not decided"


def test_masking_does_not_excuse_a_loss() -> None:
    found = metrics(base=(0.5, 0.4), smoothing=(0.8, 0.1))
    judged = judge_attacks(found, "smoothing", {("smoothing", 1): ["black_box"]})
    assert judged.verdict == "contradicted"


@pytest.mark.parametrize(
    ("clean", "verdict"),
    [(0.98, "supported"), (0.97, "supported"), (0.964, "contradicted"), (0.999, "supported")],
)
def test_c4_allows_a_point_and_a_half(clean, verdict) -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4, clean))
    difference = clean_difference(found, "smoothing")
    assert difference is not None
    judged = judge_clean({"digits_cnn3": difference})
    assert judged.verdict == verdict
    assert judged.reason.startswith(f"digits_cnn3 {100 * (clean - 0.98):+.1f}")
    fine = clean_difference(metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4)), "smoothing")
    assert fine is not None
    both = judge_clean({"mnist_cnn3": fine, "digits_cnn3": difference})
    assert both.verdict == verdict, "on every data set"


def test_c5_takes_both() -> None:
    found = metrics(base=(0.5, 0.1), good=(0.8, 0.4), half=(0.8, 0.1), bad=(0.8, 0.0))
    for method, verdict in (
        ("good", "supported"),
        ("half", "not decided"),
        ("bad", "contradicted"),
    ):
        judged = judge_both(judge_noise(found, method), judge_attacks(found, method))
        assert judged.verdict == verdict
    untested = judge_both(judge_noise(found, "none"), judge_attacks(found, "none"))
    assert untested.verdict == "not run"


def summaries(gain: float, learned: float, frozen: float):
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
    found = metrics(base=(0.5, 0.1), smoothing=(robust, 0.4), smoothing_frozen=(0.8, 0.4))
    judged = judge_amplification(found, summaries(gain, learned, 0.1), "smoothing")
    assert judged.verdict == verdict
    assert f"median signal gain {gain:.2f}" in judged.reason


def test_c6_without_the_control_is_undecided() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.9, 0.4))
    alone = {k: v for k, v in summaries(50.0, 0.5, 0.1).items() if k[0] == "smoothing"}
    judged = judge_amplification(found, alone, "smoothing")
    assert (judged.verdict, "no frozen control" in judged.reason) == ("not decided", True)
    assert judge_amplification(found, {}, "smoothing").verdict == "not run"


def test_c7_asks_for_scaled_up_networks() -> None:
    good = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4))
    bad = metrics(base=(0.5, 0.1), smoothing=(0.2, 0.4))
    assert judge_scaled_up({"digits_cnn3": good}, "smoothing").verdict == "not run"
    assert judge_scaled_up({"cifar10_resnet18": good}, "smoothing").verdict == "supported"
    both = judge_scaled_up({"cifar10_resnet18": good, "svhn_wrn16_4": bad}, "smoothing")
    assert both.verdict == "contradicted"
    assert both.reason == "cifar10_resnet18 supported, svhn_wrn16_4 contradicted"


def test_c1_takes_every_network() -> None:
    assert judge_insertion({"a": True, "b": True}, ["digits_cnn3"]).verdict == "supported"
    assert judge_insertion({"a": True, "b": False}, ["digits_cnn3"]).verdict == "contradicted"
    assert judge_insertion({"a": True}, []).verdict == "not run"


# ------------------------------------------------------------------------------------ all of them


def test_every_claim_is_judged_for_both_variants() -> None:
    found = metrics(base=(0.5, 0.1), smoothing=(0.8, 0.4), unsharp=(0.2, 0.0))
    inserted = {"smoothing": {"a": True}, "unsharp": {"a": True}}
    claims = judge_claims("digits_cnn3", {"digits_cnn3": found}, {}, {}, {}, inserted)
    assert [claim.id for claim in claims] == list(CLAIMS)
    verdicts = {
        claim.id: {name: judged.verdict for name, judged in claim.judgements.items()}
        for claim in claims
    }
    smoothing, unsharp = VARIANTS["smoothing"], VARIANTS["unsharp"]
    assert all(set(found) == {smoothing, unsharp} for found in verdicts.values())
    assert [verdicts[c][smoothing] for c in ("C1", "C2", "C3", "C4", "C5")] == ["supported"] * 5
    assert [verdicts[c][unsharp] for c in ("C2", "C3", "C5")] == ["contradicted"] * 3
    assert verdicts["C7"] == {smoothing: "not run", unsharp: "not run"}
    third = metrics(subtract_summed=(0.5, 0.1)) | found
    claims = judge_claims("digits_cnn3", {"digits_cnn3": third}, {}, {}, {}, inserted)
    assert all(len(claim.judgements) == 3 for claim in claims)
