"""A trained network in the form of RobustBench: weights, a loader, the claim and a model card."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from common.errors import RunDirectoryError
from common.evaluation.models import load_run
from common.files import write_bytes_atomically, write_json_atomically, write_text_atomically
from common.limits import read_yaml
from common.results.schema import CheckpointResult, Result
from common.results.store import read_result

WEIGHTS = "weights.safetensors"
LOADER = f'''"""The network {{name}}: images in [0, 1], (N, C, H, W), to logits (N, K)."""
from pathlib import Path

from common.checkpoints import load_weights
from common.evaluation.models import build_sections
from common.limits import read_yaml

FILE = Path(__file__).with_name("model.yaml")

def load_model():
    model = build_sections({{{{"model": read_yaml(FILE)}}}}, FILE).model
    load_weights(model, FILE.with_name("{WEIGHTS}"))
    return model.eval()
'''
CARD = """# {experiment}

{architecture} on {dataset}, trained by `{paper}`, seed {seed}, checkpoint `{checkpoint}`.
Robust accuracy is the worst case over {attacks} within {norm} eps {eps}, on {examples} images.

| accuracy | % | 95 % interval |
|---|---|---|
{rows}

    from loader import load_model
    model = load_model()  # images in [0, 1] to logits

The loader needs the repository it was trained with{commit}. To check the claim, here:

    python -m common.evaluation --model loader:load_model --data data.yaml \\
        --eps {eps} --norm {norm} --suite autoattack --claim claim.json
"""


def export(run: str, folder: str, checkpoint: str = "last") -> None:
    """Write a tested network of ours in RobustBench's form.

    Args:
        run: The directory of the run.
        folder: A new or empty one for the weights, ``loader.py``, ``claim.json`` and the model
            card.
        checkpoint: ``last`` or ``selected``.

    Raises:
        RunDirectoryError: If there is no run, it was not tested, or the folder is not empty.
        CheckpointError: If the checkpoint is missing or damaged.
    """
    source, target = Path(run), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunDirectoryError(f"{target} is not an empty folder; choose another one")
    model, _ = load_run(source, checkpoint)
    if not (source / "results.json").exists():
        raise RunDirectoryError(f"{source} was not tested (no results.json); test it first")
    result, config = read_result(source / "results.json"), read_yaml(source / "config.yaml")
    if checkpoint not in result["checkpoints"]:
        raise RunDirectoryError(
            f"{source} was tested with {', '.join(result['checkpoints'])}, not {checkpoint}; test "
            "it first"
        )
    if "worst" not in result["checkpoints"][checkpoint]["metrics"]:
        raise RunDirectoryError(f"{source} has no robust accuracy to claim; test it with attacks")
    # Clones: the format refuses tensors that share memory or are not contiguous.
    state = model.state_dict()
    weights = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    write_bytes_atomically(target / WEIGHTS, safetensors.torch.save(weights))
    for section in ("model", "data"):
        write_text_atomically(target / f"{section}.yaml", yaml.safe_dump(config[section]))
    write_text_atomically(target / "loader.py", LOADER.format(name=result["experiment"]))
    claim = claim_of(result, checkpoint, config)
    write_json_atomically(target / "claim.json", claim)
    write_text_atomically(target / "README.md", _card(result, checkpoint, claim))


def claim_of(result: Result, checkpoint: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``model_info`` file of RobustBench; authors, link and venue are left empty.

    ``reported`` is our worst case. It is ``autoattack_acc`` too if AutoAttack is part of it.
    """
    entry, data = result["checkpoints"][checkpoint], config["data"]
    worst = f"{100 * entry['metrics']['worst']:.2f}"
    claim: dict[str, Any] = {
        **{"link": "", "name": result["experiment"], "authors": "", "venue": ""},
        "additional_data": data.get("extra") is not None,
        "number_forward_passes": 1,
        "dataset": _class_name(data["source"]).lower(),
        "architecture": _class_name(config["model"]["init_args"]["net"]),
        **_threat_of(entry),
        "clean_acc": f"{100 * entry['metrics']['clean_acc']:.2f}",
        "reported": worst,
    }
    if any(name.partition("/")[0] == "aa" for name in entry["attacks"]):
        claim["autoattack_acc"] = worst
    return claim


def _threat_of(entry: CheckpointResult) -> dict[str, str]:
    threat = entry["threat"]
    if threat is None:
        raise RunDirectoryError("the result has no threat model; test the run with attacks")
    return {"eps": f"{threat['eps']:.6g}", "threat_model": threat["norm"].capitalize()}


def _class_name(section: Any) -> str:
    path = section["class_path"] if isinstance(section, dict) else section
    return str(path).rpartition(".")[2]


def _card(result: Result, checkpoint: str, claim: dict[str, Any]) -> str:
    entry = result["checkpoints"][checkpoint]
    commit = result["provenance"][checkpoint].get("commit")
    return CARD.format(
        **{key: result[key] for key in ("experiment", "paper", "seed")},
        **{key: claim[key] for key in ("architecture", "dataset")},
        eps=claim["eps"],
        norm=claim["threat_model"].lower(),
        checkpoint=checkpoint,
        examples=entry["examples"],
        attacks=", ".join(name for name, step in entry["attacks"].items() if step["counts"]),
        rows="\n".join(_rows(entry)),
        commit=f", at commit {commit}" if commit else "",
    )


def _rows(entry: CheckpointResult) -> list[str]:
    rows = []
    for name in ("clean_acc", "worst"):
        if name in entry["metrics"]:
            low, high = entry["intervals"][name]
            share = entry["metrics"][name]
            rows.append(f"| {name} | {100 * share:.2f} | {100 * low:.2f} to {100 * high:.2f} |")
    return rows
