"""Models whose figures would be wrong: exact where they can be evaluated, refused where not."""

import importlib
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.pgd import FGSM, PGD
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation import Audit, Evaluation, SuiteEntry, evaluate
from common.results.store import read_result

EPS = 0.03


def robust(model: object, data: object, suite: object = None, **settings: object) -> Evaluation:
    entries = suite or {"pgd": SuiteEntry(PGD(EPS, steps=10))}
    return evaluate(model, data, entries, eps=EPS, progress=False, **settings)


@pytest.fixture
def exact(linear, data):
    """The robust accuracy of the linear network, up to two images."""
    return pytest.approx(linear().exact(*data, EPS).float().mean().item(), abs=0.05)


# --------------------------------------------------------------------------- another function


SHIFT = [0.0]


def by_gradient(m, x: Tensor) -> Tensor:
    signs = 1.0 if m.shift else torch.arange(64).cos().view(1, 8, 8).sign()
    return m.net(x.detach() + signs * (x - x.detach()))


def at_small_gaps(m, x: Tensor) -> Tensor:
    z = m.net(x)
    top = z.topk(2, dim=1).values
    unsure = (top[:, :1] - top[:, 1:]) < (0.01 if m.shift else 0.0)
    return torch.where(unsure, z.roll(1, dims=1), z)


KINDS = {
    "dict": lambda m, x: m.net(x - m.mine["a"]),
    "closure": lambda m, x: m.net(m.closure(x)),
    "global": lambda m, x: m.net(x - SHIFT[0]),
    "gradient": by_gradient,
    "loss": lambda m, x: m.net(x),
    "at small gaps": at_small_gaps,
}


@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_are_not_those_of_another_function(
    tmp_path, data, around, kind, no_pictures
) -> None:
    def evaluated(shift: float, **settings) -> Evaluation:
        def losses() -> dict[str, Any]:
            sign = -1.0 if kind == "loss" and shift else 1.0
            ce = nn.functional.cross_entropy
            return {"ce_f": lambda m, b: lambda x: sign * ce(m(x), b["y"], reduction="none")}

        SHIFT[0] = shift
        model = around(KINDS[kind])
        model.mine, model.closure, model.shift = {"a": shift}, lambda x: x - shift, shift
        model.adaptive_losses = losses
        return robust(model, data, **settings)

    first = evaluated(0.02, output=tmp_path)
    second, fresh = evaluated(0.0, output=tmp_path), evaluated(0.0)
    assert first.metrics != fresh.metrics
    assert second.metrics == fresh.metrics
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert evaluated(0.02, output=tmp_path).metrics == first.metrics
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == kept


# ------------------------------------------------------------------ models that write, or remember


@pytest.mark.parametrize(
    "when",
    [lambda m, x: not x.requires_grad, lambda m, x: x.requires_grad, lambda m, x: m.calls[0] >= 5],
    ids=["without gradient", "with gradient", "fifth call"],
)
def test_a_model_that_writes_into_its_images_gets_copies(data, around, exact, when) -> None:
    def forward(m, x: Tensor) -> Tensor:
        m.calls[0] += 1
        x = x.sub_(0.1) if when(m, x) else x - 0.1
        return m.net(x + 0.1)

    model, before = around(forward), data[0].clone()
    model.calls = [0]
    found = robust(model, data)
    assert torch.equal(data[0], before)
    assert found.robust_acc == exact
    assert found.clean_acc == 1.0


def test_answers_about_other_images_are_named(data, around) -> None:
    def forward(m, x: Tensor) -> Tensor:
        """A cache whose key is no property of the images."""
        if not hasattr(m, "kept"):
            m.kept = m.net(x)
        return m.kept

    with pytest.raises(ConfigurationError, match=r"scores of shape \(120, 4\) for 32 images"):
        robust(around(forward), (data[0].repeat(3, 1, 1, 1), data[1].repeat(3)))


CALLS = [0]


def counter(m, x: Tensor) -> Tensor:
    """Gives away nothing but the class from the 30th call on."""
    m.calls = getattr(m, "calls", 0) + 1
    z = m.net(x)
    return z if m.calls < 30 else nn.functional.one_hot(z.argmax(1), 4) + 0.0 * z


def cache(m, x: Tensor) -> Tensor:
    """Answers with what it said about a similar image."""
    if not hasattr(m, "seen"):
        m.seen = torch.cat([x.detach().flatten(1), m.net(x).detach()], 1)
    distance = torch.cdist(x.detach().flatten(1), m.seen[:, :-4], p=torch.inf)
    near, at = distance.min(1)
    return torch.where((near < 0.1)[:, None], m.seen[at, -4:], m.net(x))


def hidden(m, x: Tensor) -> Tensor:
    """Counts where a copy does not see it."""
    CALLS[0] += 1
    z = m.net(x)
    return z if CALLS[0] < 25 else z.round()


def tuned(m, x: Tensor) -> Tensor:
    """Moves a buffer in evaluation mode."""
    m.net.weight.data -= 1e-3 * x.mean()
    return m.net(x)


@pytest.mark.parametrize("forward", [counter, cache, hidden, tuned])
def test_a_model_with_a_memory_fails(tmp_path, data, around, forward, no_pictures) -> None:
    CALLS[0] = 0
    square = AutoAttack(EPS, version="custom", attacks=["square"], square_queries=20)
    suite = {"pgd": SuiteEntry(PGD(EPS, steps=10)), "square": SuiteEntry(square)}
    found = robust(around(forward), data, suite, output=tmp_path)
    assert "should not depend on earlier calls" in found.failed_checks[0]
    assert "warning: audit: Predictions should not" in str(found)
    entry = read_result(tmp_path / "results.json")["checkpoints"]["model"]
    assert entry["audit"]["checks"][0]["verdict"] == "fail"


def test_what_only_looks_like_a_memory_passes(data, around, exact) -> None:
    def keeps(m, x: Tensor) -> Tensor:
        m.features = x.detach().mean(1)
        return m.net(x)

    def locked(m, x: Tensor) -> Tensor:
        with m.lock:
            return m.net(x)

    for forward in (keeps, locked):
        model = around(forward)
        model.lock, model.double = threading.Lock(), model.net.weight * 2.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = robust(model, data)
        assert not found.failed_checks
        assert found.robust_acc == exact


# --------------------------------------------------------------------------- gradients and types


def by_numpy(m, x: Tensor) -> Tensor:
    z = (x.numpy().reshape(len(x), -1) - 0.5) @ m.net.weight.detach().numpy().T.astype("f8")
    return torch.from_numpy(z)


def thermometer(m, x: Tensor) -> Tensor:
    return m.net((x[..., None] > torch.arange(1, 20) / 20).float().mean(-1))


NO_GRADIENT = {
    "no_grad": torch.no_grad()(lambda m, x: m.net(x)),
    "numpy": by_numpy,
    "thermometer": thermometer,
}


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_a_model_without_a_gradient_is_attacked_by_what_needs_none(data, around, name) -> None:
    model = around(NO_GRADIENT[name])
    x = data[0][:10]
    aa = {"attacks": ["apgd-ce", "square"], "steps": 5, "square_queries": 200}
    suite = {
        "fgsm": SuiteEntry(FGSM(EPS)),
        "aa": SuiteEntry(AutoAttack(EPS, version="custom", **aa)),
    }
    audit = Audit(5, None, 2, 2, square_queries=5, random_samples=5, decision_queries=20)
    given = {"audit": audit} if name == "numpy" else {}
    found = robust(model, (x, model(x).argmax(1)), suite, **given)
    assert found.result["not_run"] == ["fgsm/ce_f", "aa/apgd-ce"]
    assert "fgsm/ce_f" not in found.metrics
    assert "has no gradient" in found.warnings[0]
    assert "need none (aa/square, black_box)" in found.warnings[0]
    assert any("should have a gradient" in text for text in found.failed_checks) == bool(given)
    assert found.robust_acc < 1.0


def test_an_attack_by_labels_is_added_where_there_is_no_gradient(data, around, exact) -> None:
    found = robust(around(NO_GRADIENT["no_grad"]), data)
    assert list(found.result["attacks"]) == ["black_box"]
    assert found.robust_acc == exact


def test_a_model_that_depends_on_large_batches_is_refused(data, around) -> None:
    crowded = around(lambda m, x: m.net(x if len(x) <= 100 else x - x.mean(0) + 0.5))
    data = tuple(torch.cat([part] * 3)[:105] for part in data)
    with pytest.raises(ConfigurationError, match="depends on the images beside it"):
        robust(crowded, data)
    assert robust(crowded, data, batch_size=100).clean_acc > 0.8


def test_functions_methods_and_torchscript_are_models(data, linear, exact) -> None:
    net = linear().eval()
    weight = net.weight.detach()
    found = robust(lambda x: (x.flatten(1) - 0.5) @ weight.T, data)
    assert found.robust_acc == exact
    method = robust(net.forward, data).metrics
    assert found.metrics == {k: v for k, v in method.items() if k not in ("parameters", "macs")}
    assert robust(torch.jit.trace(net, data[0][:2]), data).robust_acc == found.robust_acc
    for wrong, named in ((linear, "the class"), ("resnet", "'resnet'"), (None, "None")):
        with pytest.raises(ConfigurationError, match=named):
            robust(wrong, data)


def test_a_folder_of_other_results_is_refused_at_the_start(
    tmp_path, data, linear, monkeypatch, no_pictures
) -> None:
    robust(linear().eval(), data, output=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    pipeline = importlib.import_module("common.evaluation.pipeline")
    monkeypatch.setattr(pipeline, "run_steps", lambda *_, **__: pytest.fail("it ran"))
    for change, match in (({"seed": 1}, "seed 1"), ({"name": "other"}, "other")):
        with pytest.raises(ConfigurationError, match=f"{match}.*choose another output folder"):
            robust(linear().eval(), data, output=tmp_path, **change)
    assert (tmp_path / "results.json").read_bytes() == before
    for part in ("outcomes", "figures"):
        other = tmp_path / part[0]
        other.mkdir()
        (other / part).write_text("a file where a folder belongs")
        with pytest.raises(RunDirectoryError, match="cannot write"):
            robust(linear().eval(), data, output=other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 2.5}, "batch_size .* got 2.5"),
        ({"examples": 0}, "examples .* got 0"),
        ({"seed": None}, "seed .* got None"),
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"suite": {"pgd": PGD(EPS)}}, "must be a common.evaluation.suite.SuiteEntry"),
        ({"suite": {1: SuiteEntry(PGD(EPS))}}, "the name of a suite entry is 1"),
        ({"suite": {"worst": SuiteEntry(PGD(EPS))}}, "'worst' has the name of another result"),
    ],
)
def test_settings_of_another_type_are_refused(data, linear, change, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        robust(linear().eval(), data, **change)


def test_a_shuffled_loader_has_one_order_and_draws_no_numbers_of_the_callers(data, linear) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8, shuffle=True)
    before = torch.get_rng_state()
    first = robust(linear().eval(), loader)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(robust(linear().eval(), loader).outcomes.y, first.outcomes.y)
