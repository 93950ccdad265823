"""Models whose figures would be wrong: exact where they can be evaluated, refused where not."""

import importlib
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.pgd import FGSM, PGD
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation import Audit, Evaluation, SuiteEntry, evaluate
from common.evaluation.inputs import collect
from common.evaluation.model_check import Checked, check_model
from common.results.store import read_result

PIPELINE = importlib.import_module("common.evaluation.evaluate")

EPS = 0.03


class Linear(nn.Module):
    """Four classes of 8x8 images, with the robust accuracy known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 64, generator=generator))
        self.register_buffer("bias", -self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(40, 1, 8, 8, generator=generator)
    return x, Linear()(x).argmax(1)


def exact(data: tuple[Tensor, Tensor], eps: float = EPS) -> float:
    """The share of examples that no perturbation of at most eps changes."""
    x, y = data
    net = Linear()
    z, w = net(x).detach(), net.weight.detach()
    gaps = z.gather(1, y[:, None]) - z
    reach = eps * (w[y][:, None] - w[None]).abs().sum(2)
    stands = (gaps > reach) | (torch.arange(4) == y[:, None])
    return stands.all(1).float().mean().item()


def robust(model: object, data: object, suite: object = "pgd", **settings: object) -> Evaluation:
    entries = {"pgd": SuiteEntry(PGD(EPS, steps=10))} if suite == "pgd" else suite
    return evaluate(model, data, entries, eps=EPS, progress=False, **settings)


def check(model: nn.Module, data: tuple[Tensor, Tensor]) -> Checked:
    return check_model(model, collect(data))


# --------------------------------------------------------------------------- another function


@pytest.mark.parametrize("kind", ["dict", "closure", "global", "gradient", "loss", "at small gaps"])
def test_outcomes_are_not_those_of_another_function(tmp_path, data, kind, monkeypatch) -> None:
    class Shifted(Linear):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.mine = {"a": shift}
            self.closure = lambda x: x - shift
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            if kind == "gradient":
                signs = 1.0 if self.shift else torch.arange(64).cos().view(1, 8, 8).sign()
                return self.scores(x.detach() + signs * (x - x.detach()))
            if kind == "loss":
                return self.scores(x)
            if kind == "at small gaps":
                z = self.scores(x)
                top = z.topk(2, dim=1).values
                unsure = (top[:, :1] - top[:, 1:]) < (0.01 if self.shift else 0.0)
                return torch.where(unsure, z.roll(1, dims=1), z)
            if kind == "closure":
                return self.scores(self.closure(x))
            if kind == "global":
                return self.scores(x - SHIFT[0])
            return self.scores(x - self.mine["a"])

        def adaptive_losses(self) -> dict[str, Callable]:
            sign = -1.0 if kind == "loss" and self.shift else 1.0
            ce = nn.functional.cross_entropy
            return {
                "ce_f": lambda m, b: lambda x: sign * ce(m(x), b["y"], reduction="none"),
            }

    monkeypatch.setattr(PIPELINE, "draw", lambda *_: {})
    SHIFT = [0.02]
    first = robust(Shifted(0.02).eval(), data, output=tmp_path)
    SHIFT[0] = 0.0
    second = robust(Shifted(0.0).eval(), data, output=tmp_path)
    fresh = robust(Shifted(0.0).eval(), data)
    assert first.metrics != fresh.metrics
    assert second.metrics == fresh.metrics
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    SHIFT[0] = 0.02
    assert robust(Shifted(0.02).eval(), data, output=tmp_path).metrics == first.metrics
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == kept


# ------------------------------------------------------------------ models that write, or remember


@pytest.mark.parametrize(
    "when",
    ["always", "without gradient", "with gradient", "many images", "fifth call"],
)
def test_a_model_that_writes_into_its_images_gets_copies(data, when: str) -> None:
    class InPlace(Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            InPlace.calls += 1
            writes = {
                "always": True,
                "without gradient": not x.requires_grad,
                "with gradient": x.requires_grad,
                "many images": len(x) > 36,
                "fifth call": InPlace.calls >= 5,
            }[when]
            x = x.sub_(0.1) if writes else x - 0.1
            return self.scores(x + 0.1)

    before = data[0].clone()
    found = robust(InPlace().eval(), data)
    assert torch.equal(data[0], before)
    assert found.robust_acc == pytest.approx(exact(data), abs=0.02)
    assert found.clean_acc == 1.0


@pytest.mark.parametrize(
    "write",
    [
        nn.ReLU(inplace=True),
        lambda x: x[:].copy_(x),
        lambda x: x.data.add_(0.0) * 0.0 + x,
    ],
)
def test_writing_what_is_there_already_is_writing(data, write) -> None:
    class InPlace(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.scores(write(x))

    found = robust(InPlace().eval(), data)
    assert found.robust_acc == robust(Linear().eval(), data).robust_acc


def test_answers_about_other_images_are_named(data) -> None:
    class Forgetful(Linear):
        """A cache whose key is no property of the images."""

        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.scores(x)
            return self.kept

    with pytest.raises(ConfigurationError, match=r"scores of shape \(120, 4\) for 32 images"):
        robust(Forgetful().eval(), (data[0].repeat(3, 1, 1, 1), data[1].repeat(3)))


class Counter(Linear):
    """Gives away nothing but the class from the 30th call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = self.scores(x)
        return z if self.calls < 30 else nn.functional.one_hot(z.argmax(1), 4) + 0.0 * z


class Cache(Linear):
    """Answers with what it said about a similar image."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.cat([x.detach().flatten(1), self.scores(x).detach()], 1)
        distance = torch.cdist(x.detach().flatten(1), self.seen[:, :-4], p=torch.inf)
        near, at = distance.min(1)
        return torch.where((near < 0.1)[:, None], self.seen[at, -4:], self.scores(x))


CALLS = [0]


class Hidden(Linear):
    """Counts where a copy does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        z = self.scores(x)
        return z if CALLS[0] < 25 else z.round()


class Tuned(Linear):
    """Moves a buffer in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.bias -= 1e-3 * x.mean()
        return self.scores(x)


@pytest.mark.parametrize("kind", [Counter, Cache, Hidden, Tuned])
def test_a_model_with_a_memory_fails(tmp_path, data, kind, monkeypatch) -> None:
    monkeypatch.setattr(PIPELINE, "draw", lambda *_: {})
    CALLS[0] = 0
    suite = {
        "pgd": SuiteEntry(PGD(EPS, steps=10)),
        "square": SuiteEntry(
            AutoAttack(EPS, version="custom", attacks=["square"], square_queries=20)
        ),
    }
    found = robust(kind().eval(), data, suite, output=tmp_path)
    assert "should not depend on earlier calls" in found.failed_checks[0]
    entry = read_result(tmp_path / "results.json")["checkpoints"]["model"]
    assert entry["audit"]["checks"][0]["verdict"] == "fail"


def test_what_only_looks_like_a_memory_passes(data) -> None:
    class Keeps(Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.features = x.detach().mean(1)
            return self.scores(x)

    class Unusual(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.double = threading.Lock(), self.weight * 2.0

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.scores(x)

    for kind in (Keeps, Unusual):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = robust(kind().eval(), data)
        assert not found.failed_checks
        assert found.robust_acc == pytest.approx(exact(data), abs=0.02)


# --------------------------------------------------------------------------- gradients and types


class NoGrad(Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class Inference(Linear):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class Numpy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        z = x.numpy().reshape(len(x), -1) @ self.weight.detach().numpy().T.astype("f8")
        return torch.from_numpy(z) + self.bias


class Thermometer(Linear):
    def forward(self, x: Tensor) -> Tensor:
        levels = torch.arange(1, 20, device=x.device) / 20
        return self.scores((x[..., None] > levels).float().mean(-1))


class Lookup(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(torch.linspace(0, 1, 256)[(x * 255).long()])


@pytest.mark.parametrize("kind", [NoGrad, Inference, Numpy, Thermometer, Lookup])
def test_a_model_without_a_gradient_is_attacked_by_what_needs_none(data, kind) -> None:
    data = data[0][:24], kind()(data[0][:24]).argmax(1)
    suite = {
        "fgsm": SuiteEntry(FGSM(EPS)),
        "aa": SuiteEntry(
            AutoAttack(
                EPS, version="custom", attacks=["apgd-ce", "square"], steps=5, square_queries=300
            )
        ),
    }
    audit = Audit(12, None, 2, 2, square_queries=10, random_samples=5, decision_queries=50)
    found = robust(kind().eval(), data, suite, audit=audit)
    assert found.result["not_run"] == ["fgsm/ce_f", "aa/apgd-ce"]
    assert "fgsm/ce_f" not in found.metrics
    assert "has no gradient" in found.warnings[0]
    assert "need none (aa/square, black_box)" in found.warnings[0]
    assert any("should have a gradient" in text for text in found.failed_checks)
    assert found.robust_acc < 1.0


def test_an_attack_by_labels_is_added_where_there_is_no_gradient(data) -> None:
    found = robust(NoGrad().eval(), data)
    assert list(found.result["attacks"]) == ["black_box"]
    assert found.robust_acc == pytest.approx(exact(data), abs=0.05)


def test_a_model_that_depends_on_large_batches_is_refused(data) -> None:
    class Crowded(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x if len(x) <= 100 else x - x.mean(0) + 0.5)

    x, y = (torch.cat([part] * 3)[:150] for part in data)
    with pytest.raises(ConfigurationError, match="depends on the images beside it"):
        robust(Crowded().eval(), (x, y))
    assert robust(Crowded().eval(), (x, y), batch_size=100).clean_acc > 0.8


def test_a_plain_function_is_a_model(data) -> None:
    net = Linear()
    weight, bias = net.weight.detach(), net.bias
    found = robust(lambda x: x.flatten(1) @ weight.T + bias, data)
    assert found.robust_acc == pytest.approx(exact(data), abs=0.02)
    method = robust(net.forward, data).metrics
    assert found.metrics == {k: v for k, v in method.items() if k not in ("parameters", "macs")}
    for wrong in (Linear, "resnet", None):
        with pytest.raises(ConfigurationError, match="make the network first"):
            robust(wrong, data)


def test_a_torchscript_model_is_a_model(data) -> None:
    net = Linear().eval()
    traced = torch.jit.trace(net, data[0][:2])
    assert robust(traced, data).robust_acc == robust(net, data).robust_acc


def test_a_folder_of_other_results_is_refused_at_the_start(tmp_path, data, monkeypatch) -> None:
    robust(Linear().eval(), data, output=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(PIPELINE, "run_steps", lambda *_, **__: pytest.fail("it ran"))
    for change, match in (({"seed": 1}, "with seed 1"), ({"name": "other"}, "any other with")):
        with pytest.raises(ConfigurationError, match=f"{match}.*choose another output folder"):
            robust(Linear().eval(), data, output=tmp_path, **change)
    assert (tmp_path / "results.json").read_bytes() == before
    for part in ("outcomes", "figures"):
        other = tmp_path / part[0]
        other.mkdir()
        (other / part).write_text("a file where a folder belongs")
        with pytest.raises(RunDirectoryError, match="cannot write"):
            robust(Linear().eval(), data, output=other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 2.5}, "batch_size must be at least 1, got 2.5"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"examples": -3}, "examples must be at least 1, got -3"),
        ({"examples": "10"}, "examples must be at least 1, got '10'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"suite": {"pgd": PGD(EPS)}}, "must be a common.evaluation.suite.SuiteEntry"),
        (
            {"suite": {1: SuiteEntry(PGD(EPS))}},
            "the name of a suite entry is 1; it has to be a printable text",
        ),
    ],
)
def test_settings_of_another_type_are_refused(data, change, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        robust(Linear().eval(), data, **change)


def test_a_shuffled_loader_has_one_order_and_draws_no_numbers_of_the_callers(data) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8, shuffle=True)
    before = torch.get_rng_state()
    first = robust(Linear().eval(), loader)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(robust(Linear().eval(), loader).outcomes.y, first.outcomes.y)
