"""Adapters that PEFT makes for the recorded models, and the logits that it computes with them.

Recorded once in `peft`, by

    pip install torch transformers peft && python -m tests.hub.record_adapters

A case of `CASES` is a folder `peft/NAME` as `save_pretrained` writes it, whose A and B were drawn anew, as B begins as
zero. Beside it, `peft/NAME.npy` holds float32[2, 20, 67], the logits of the recorded `tokens` of its base model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.hub import record

ADAPTERS = Path(__file__).parent / "peft"

# name: (base model, settings of LoraConfig)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # A regular expression over whole names; ranks and alphas by pattern; alpha / sqrt(r).
    "expression": (
        "llama3",
        {
            "target_modules": r"model\.layers\.(0|2)\..*\.(q_proj|o_proj|gate_proj|down_proj)",
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"o_proj": 3, r"^model\.layers\.2\.mlp\.gate_proj": 24},
            "use_rslora": True,
            "init_lora_weights": "gaussian",
        },
    ),
    # Whole names and ends of names in one list, less what is excluded, in some layers.
    "names": (
        "llama3",
        {
            "target_modules": ["model.layers.0.self_attn.k_proj", "mlp.up_proj", "v_proj", "c_attn"],
            "exclude_modules": ["layers.2.self_attn.v_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": "layers",
        },
    ),
    "all": ("llama3", {"target_modules": "all-linear", "init_lora_weights": "orthogonal", "r": 4}),
    # One matrix for query, key and value; two modules of one name.
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "layers_to_transform": [0, 2]}),
}


def make(name: str, folder: Path, seed: int = 0) -> None:
    """Write the case's folder."""
    import peft
    import torch

    base, settings = CASES[name]
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "task_type": "CAUSAL_LM", "lora_dropout": 0.1} | settings)
    model = peft.get_peft_model(record.load(record.DATA / base, "float32"), config)
    rng = np.random.default_rng([seed, *name.encode()])
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".lora_" in path:
                parameter.copy_(torch.from_numpy(0.15 * rng.standard_normal(tuple(parameter.shape))))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text()) | {"base_model_name_or_path": f"somebody/{base}"}
    path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def logits(base: str, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What PEFT computes with the adapters of a folder."""
    import peft

    model = peft.PeftModel.from_pretrained(record.load(record.DATA / base, "float32"), folder)
    return record.logits(model.eval(), tokens)


def main() -> None:
    """Write everything."""
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    for name, (base, _) in CASES.items():
        make(name, ADAPTERS / name)
        with np.load(record.DATA / f"{base}.npz") as file:
            tokens, plain = file["tokens"], file["logits32"]
        found = logits(base, ADAPTERS / name, tokens)
        np.save(ADAPTERS / f"{name}.npy", found)
        print(f"{name}: adapters change logits by up to {np.abs(found - plain).max():.1f}")


if __name__ == "__main__":
    main()
