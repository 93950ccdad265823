import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.vit import Tokens, ViT, ViTTiny


def tiny(**kwargs) -> ViT:
    sizes = {"image_size": 6, "patch": 3, "dim": 6, "depth": 2, "heads": 2, "head_dim": 4}
    return ViT(**{**sizes, "mlp_dim": 5, **kwargs})


@pytest.mark.parametrize("small", [False, True], ids=["plain", "shifted and local"])
def test_forward_equals_the_layers_written_out(small):
    net = tiny(shifted=small, local=small, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    for name, parameter in net.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("log_scale"):
            nn.init.constant_(parameter, -0.3)
    net = net.double().eval()
    w = net.state_dict()

    def norm(z, name):
        z = z - z.mean(-1, keepdim=True)
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(z, name, bias=True):
        return z @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0)

    def attention(z, name):
        t, (q, k, v) = len(z), linear(norm(z, f"{name}.norm"), f"{name}.qkv", False).chunk(3, -1)
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            scale = math.exp(w[f"{name}.log_scale"]) if small else 0.5
            scores = q[:, part] @ k[:, part].T * scale
            if small:
                scores[range(t), range(t)] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, part])
        return linear(torch.cat(heads, -1), f"{name}.out")

    def forward(image):
        image = (image - w["normalize.mean"]) / w["normalize.std"]
        if small:
            wide = F.pad(image, (1, 1, 1, 1))
            moved = [wide[:, a : a + 6, b : b + 6] for a, b in ((1, 0), (1, 2), (0, 1), (2, 1))]
            image = torch.cat([image, *moved])
        rows = [image[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3] for i in (0, 1) for j in (0, 1)]
        z = torch.stack([patch.flatten() for patch in rows])
        z = linear(norm(z, "stem.norm") if small else z, "stem.linear")
        z = torch.cat([w["stem.token"][0], z]) + w["stem.positions"][0]
        for i in range(2):
            z = z + attention(z, f"stages.{i}.attention")
            h = F.gelu(linear(norm(z, f"stages.{i}.mlp.norm"), f"stages.{i}.mlp.linear1"))
            z = z + linear(h, f"stages.{i}.mlp.linear2")
        return linear(norm(z.mean(0), "head.norm"), "head.linear")

    x = torch.rand(3, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(net(x), torch.stack([forward(image) for image in x]), atol=1e-10)


def test_starting_weights():
    scale = ViTTiny(dim=8).stages[0].attention.log_scale
    assert scale.exp().item() == pytest.approx(64**-0.5)  # the usual temperature
    tokens = Tokens(3, 32, 4, 64)
    assert tokens.positions.std().item() == pytest.approx(1, abs=0.05)
    assert tokens.token.std().item() == pytest.approx(1, abs=0.3)


def test_says_when_the_images_have_another_size():
    with pytest.raises(ValueError, match="made for 6x6 pixels, got 12x12; set image_size"):
        tiny()(torch.rand(1, 3, 12, 12))
