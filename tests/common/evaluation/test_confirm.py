"""What an engine finds is judged without it, and it costs no strength."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.gama import GAMAPGD
from common.attacks.minimum_norm import DeepFool
from common.attacks.noise import UniformNoise
from common.attacks.pgd import MIM, PGD, FriendlyPGD
from common.callbacks.robust_evaluation import RobustEvaluation
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.suite import steps_of
from common.results.lines import Outcomes, Threat

FAST = AttackEngine()
BF16 = AttackEngine(precision="bf16")
EPS = 0.012


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip
    nn.init.uniform_(net[1].running_var, 0.02, 0.1)
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return Victim(net, 10).eval()


@pytest.fixture
def examples(model) -> dict[str, Tensor]:
    x = torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[::9] = (y[::9] + 1) % 10
    return {"x": x, "y": y, "index": torch.arange(40)}


SUITE = {
    "pgd": SuiteEntry(PGD(EPS, EPS / 4, 6), ["ce_f", "cw_f"]),
    "mim": SuiteEntry(MIM(EPS, steps=5, start="uniform"), until_broken=True),
    "gama": SuiteEntry(GAMAPGD(EPS, steps=6)),
    "deepfool": SuiteEntry(DeepFool(EPS, norm="linf", steps=5, clip=True)),
    "noise": SuiteEntry(UniformNoise(levels=[EPS])),
}
OFFICIAL = {
    "aa": SuiteEntry(
        AutoAttack(
            EPS, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t", "square"], steps=5,
            square_queries=20, batch_size=32,
        )
    )
}  # fmt: skip


def run(model, examples, engine: AttackEngine | None, suite=SUITE) -> Outcomes:
    steps = steps_of(suite, model, 10, 0, engine)
    return run_steps(model, examples, steps, seed=0, batch_size=25, threat=Threat("linf", EPS))


def assert_confirmed(model, examples, outcomes: Outcomes) -> None:
    """Every image that is said to fool the network does, in the pictures of each step."""
    for key, columns in outcomes.columns.items():
        if "x_adv" not in columns or key == "clean":
            continue
        rows = outcomes.pictured
        broken = ~outcomes.correct[key][rows] & outcomes.correct["clean"][rows]
        with torch.no_grad():
            fooled = model(columns["x_adv"]).argmax(dim=1) != examples["y"][rows]
        assert fooled[broken].all(), key


@pytest.mark.parametrize("suite", [SUITE, OFFICIAL], ids=["ours", "official"])
def test_verdicts_are_those_without_an_engine(model, examples, suite) -> None:
    plain, fast = run(model, examples, None, suite), run(model, examples, FAST, suite)
    for key in plain.correct:
        assert torch.equal(plain.correct[key], fast.correct[key]), key
    robust = plain.correct[list(plain.correct)[-1 if suite is OFFICIAL else 1]]
    assert 3 < robust.sum() < 35, "the task tells nothing apart"
    assert_confirmed(model, examples, fast)
    if suite is SUITE:
        reduced = run(model, examples, BF16)
        for key in plain.correct:
            assert not (reduced.correct[key] & ~plain.correct[key]).any(), key
        assert_confirmed(model, examples, reduced)


def test_distances_and_autoattack_are_left_in_float32(model) -> None:
    suite = {"deepfool": SUITE["deepfool"], **OFFICIAL, "pgd": SUITE["pgd"]}
    found = {step.key: step.settings["engine"] for step in steps_of(suite, model, 10, 0, BF16)}
    assert {key.partition("/")[0] for key in found} == set(suite)
    for key, engine in found.items():
        assert engine["precision"] == ("bf16" if key.startswith("pgd") else "32"), key


class Sabotaged(AttackEngine):
    """An engine that finds nothing, or claims what is not so."""

    claims = True

    @contextmanager
    def applied(self, model, x):
        original, claims = model.net, self.claims

        class Wrong(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                logits = original(x)
                return -logits if claims else logits.detach() + 0 * x.sum()

        model.net = Wrong()
        try:
            yield
        finally:
            model.net = original


def sabotaged(claims: bool, precision: str) -> Sabotaged:
    engine = Sabotaged(precision=precision)
    engine.claims = claims
    engine._plans.full = AttackEngine(fold=False, channels_last=False)
    return engine


@pytest.mark.parametrize(("claims", "precision"), [(False, "bf16"), (True, "32")], ids=str)
def test_a_useless_engine_changes_no_verdict(model, examples, claims, precision) -> None:
    """Such as rounding on a device would: an attack stopped there had found nothing yet."""
    pgd = PGD(EPS, EPS / 4, 10)
    suite = {
        "pgd": SuiteEntry(pgd),
        "gama": SUITE["gama"],
        "compact": SuiteEntry(pgd, until_broken=True),
        "aa": SuiteEntry(OFFICIAL["aa"].attack.but(attacks=["apgd-ce"])),
    }
    engine = sabotaged(claims, precision)
    plain, found = run(model, examples, None, suite), run(model, examples, engine, suite)
    assert 3 < plain.correct["pgd/ce_f"].sum() < 35
    assert not (plain.correct["compact/ce_f"] & ~plain.correct["pgd/ce_f"]).any()
    for key in plain.correct:
        # What is broken besides was broken by an image the plain network gets wrong.
        assert not (found.correct[key] & ~plain.correct[key]).any(), key
        assert claims or torch.equal(plain.correct[key], found.correct[key])
    assert_confirmed(model, examples, found)


@pytest.mark.slow
def test_a_compiled_engine_takes_every_attack_of_a_suite(model, examples) -> None:
    suite = SUITE | OFFICIAL
    plain = run(model, examples, None, suite)
    found = run(model, examples, AttackEngine(compile="default"), suite)
    for key in plain.correct:
        assert torch.equal(plain.correct[key], found.correct[key]), key


def test_only_what_stands_is_attacked_again(model, examples) -> None:
    sizes: list[tuple[int, bool]] = []

    def watch(module, args, output) -> None:
        if torch.is_grad_enabled():
            sizes.append((len(args[0]), torch.is_autocast_enabled("cpu")))

    model.register_forward_hook(watch)
    steps = steps_of({"pgd": SuiteEntry(PGD(EPS, EPS / 4, 6))}, model, 10, 0, BF16)
    outcomes = run_steps(model, examples, steps, seed=0, batch_size=100)
    reduced = [size for size, is_reduced in sizes if is_reduced]
    # Folding is tried out with two images.
    full = [size for size, is_reduced in sizes if not is_reduced and size != 2]
    assert reduced == [int(outcomes.correct["clean"].sum())] * 6
    # Six steps, a gradient to see that there is one, and the signatures before and after.
    assert len(full) == 6 + 1 + 2
    full = full[1:-1]
    assert 0 < full[0] < reduced[0]
    assert full[0] >= outcomes.correct["pgd/ce_f"].sum()


@pytest.mark.parametrize(
    ("attack", "eot"), [(FriendlyPGD(EPS), 1), (GAMAPGD(EPS), 1), (PGD(EPS), 3)]
)
def test_until_broken_is_refused_where_it_has_no_meaning(attack, eot: int) -> None:
    with pytest.raises(ConfigurationError, match="drop until_broken"):
        SuiteEntry(attack, eot=eot, until_broken=True)
    with pytest.raises(ConfigurationError, match="drop until_broken"):
        RobustEvaluation(validation=SuiteEntry(PGD(EPS), until_broken=True))


def test_anybodys_model_takes_an_engine(model, examples, tmp_path, no_pictures) -> None:
    data = (examples["x"], examples["y"])
    settings = {"suite": {"pgd": SUITE["pgd"]}, "eps": EPS, "progress": False}
    plain = evaluate(model.net, data, **settings)
    fast = evaluate(model.net, data, engine=FAST, output=tmp_path, **settings)
    assert plain.metrics == fast.metrics
    assert "AttackEngine(fold, channels_last, winog" in (tmp_path / "results.json").read_text()
