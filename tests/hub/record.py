"""Tiny models that `transformers` makes, and what it computes with them: read by tests on machines that lack it.

A wheel of torch costs a test machine hundreds of megabytes, so its results are recorded in `data`, once, by

    pip install torch transformers && python tests/hub/record.py

A case of `CASES` is a folder `data/NAME`, as `save_pretrained` writes it (config.json, model.safetensors), of a model
all of whose parameters were moved away from their initial values, norms and biases too: untouched ones hide what
ignores them. Beside it is `data/NAME.npz`:

    tokens      int[2, 20]          rows of token ids, longer than every sliding window
    logits32    float32[2, 20, 67]  of `tokens`, computed in float32 as transformers does
    logits64    float64[2, 20, 67]  the same in float64, also where transformers' code says float32 (see `Wide`)
    packed64    float64[2, 20, 67]  of the pieces in PIECES of each row, each in a call of its own; 0 in the padding
    prompt0/1   int[5], int[11]     what generation starts from
    greedy      int[2, 64]          what greedy decoding adds to the prompts, one call each, in float64
    margin      float               how far the likeliest token's logit is ahead of the next at least, there

`data/generation.npz` holds results on the model of the case `llama3`:

    ids         int[4, 12]          contexts, and
    scores      float32[4, 67]      the logits after them;
    SETTINGS    float32[4, 67]      of each string of settings in WARPERS: `scores` after transformers' processors of
                                    logits (minus infinity: never drawn), for sampling after `ids`; float32
    beam/...    of each string of settings in BEAMS, starting from `prompt`:
                .../sequences int[4, n] (prompt left out, best first, `pad` after the end), .../scores float32[4]
    prompt, end, pad                what beams start from, the id that ends a text, and what fills after it
"""

import importlib.machinery
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
VOCABULARY, WIDTH = 67, 24
PIECES = ((0, 7, 20), (0, 12, 17))  # of each row, where its pieces begin and the last one ends
PROMPTS = (5, 11)
WARPERS = (
    "temperature=0.7",
    "top_k=5",
    "top_p=0.6",
    "min_p=0.2",
    "repetition_penalty=1.4",
    "repetition_penalty=1.4,temperature=0.7,top_k=20,top_p=0.8,min_p=0.05",
)
BEAMS = (
    "num_beams=4,max_new_tokens=12,length_penalty=1.0,early_stopping=False",
    "num_beams=4,max_new_tokens=12,length_penalty=2.0,early_stopping=True",
    "num_beams=3,max_new_tokens=12,length_penalty=0.0,early_stopping=True",
)


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}

# name: (class of transformers, dtype of its file, what differs from `_common`)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("Llama", "bfloat16", {"num_key_value_heads": 4, "rope_parameters": _rope(1e4)}),
    "llama3": ("Llama", "float32", {"rope_parameters": _rope(100.0, **_LLAMA3)}),
    "llama_tied": (
        "Llama",
        "float16",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": _rope(1e3, **_LLAMA3)},
    ),
    "llama_linear": (
        "Llama",
        "bfloat16",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _rope(1e4, rope_type="linear", factor=4.0),
        },
    ),
    "mistral": ("Mistral", "bfloat16", {"sliding_window": 5, "rope_parameters": _rope(1e4)}),
    "qwen2": (
        "Qwen2",
        "bfloat16",
        {"use_sliding_window": False, "tie_word_embeddings": True, "rope_parameters": _rope(1e6), "head_dim": None},
    ),
    "qwen2_windows": (
        "Qwen2",
        "bfloat16",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": _rope(1e4),
            "head_dim": None,
        },
    ),
    "qwen3": ("Qwen3", "bfloat16", {"rope_parameters": _rope(1e6), "head_dim": 10}),
    "gemma": (
        "Gemma",
        "bfloat16",
        _GEMMA | {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh", "rope_parameters": _rope(1e4)},
    ),
    "gemma2": (
        "Gemma2",
        "bfloat16",
        _GEMMA
        | {
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
            "rope_parameters": _rope(1e4),
        },
    ),
    "gemma3": (
        "Gemma3",
        "bfloat16",
        _GEMMA
        | {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": _rope(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": _rope(1e4),
            },
        },
    ),
    "gpt2": ("GPT2", "bfloat16", {}),
}

SEEDS = {"llama_linear": 3, "qwen2_windows": 3, "qwen3": 5, "gemma2": 1, "gemma3": 4}  # whose greedy texts vary most


class Wide(importlib.machinery.SourceFileLoader):
    """Imports a file of transformers with float64 wherever it says float32."""

    def get_code(self, fullname: str):
        source = Path(self.path).read_text(encoding="utf-8")
        for narrow, wide in (
            ("torch.float32", "torch.float64"),
            (".float()", ".double()"),
            ("dtype=torch.float)", "dtype=torch.float64)"),
        ):
            source = source.replace(narrow, wide)
        return compile(source, self.path, "exec", dont_inherit=True)


class _WideFinder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None):
        last = name.rpartition(".")[2]
        if not name.startswith("transformers.") or not last.startswith(("modeling_rope_utils", "modeling_")):
            return None
        if not (name.startswith("transformers.models.") or last == "modeling_rope_utils"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.util.spec_from_file_location(name, spec.origin, loader=Wide(name, spec.origin))


def config_of(name: str) -> Any:
    """The case's configuration, of transformers."""
    import transformers

    kind, _, changes = CASES[name]
    if kind == "GPT2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=WIDTH,
            n_layer=3,
            n_head=4,
            n_inner=40,
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        )
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings = {key: value for key, value in (common | changes).items() if value is not None}
    return getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**settings)


def make(name: str, folder: Path, seed: int | None = None) -> None:
    """Write the case's folder: a model of transformers, every parameter moved, rounded to the dtype of its file."""
    import torch
    import transformers

    kind, dtype, _ = CASES[name]
    torch.manual_seed(0)
    rng = np.random.default_rng([SEEDS.get(name, 0) if seed is None else seed, *name.encode()])
    config = config_of(name)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Layers strong beside the embeddings: a tied model would else repeat one token for ever.
            std = 0.4 if parameter.ndim == 2 and VOCABULARY not in parameter.shape else 0.2
            parameter.add_(torch.from_numpy(std * rng.standard_normal(tuple(parameter.shape))).to(parameter.dtype))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def load(folder: Path, dtype: str) -> Any:
    """A folder as a model of transformers that computes in `dtype`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma: rounded to float32 when the model is made
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=getattr(torch, dtype))
    return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of int[batch, sequence]: float[batch, sequence, vocabulary]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def packed(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of the rows' PIECES, each called alone; 0 where there is no piece."""
    result = np.zeros((*tokens.shape, VOCABULARY), logits(model, tokens[:, :1]).dtype)
    for row, ends in enumerate(PIECES):
        for begin, end in zip(ends, ends[1:], strict=False):
            result[row, begin:end] = logits(model, tokens[row : row + 1, begin:end])[0]
    return result


def greedy(model: Any, prompt: np.ndarray, count: int = 64) -> tuple[np.ndarray, float]:
    """What greedy decoding adds, and by how much it was the likeliest at least."""
    import torch

    made = model.generate(
        torch.from_numpy(prompt[None]),
        attention_mask=torch.ones(1, prompt.size, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=count,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([torch.topk(s[0], 2).values for s in made.scores])
    return made.sequences[0, prompt.size :].numpy(), float((best[:, 0] - best[:, 1]).min())


def settings_of(text: str) -> dict[str, Any]:
    """ "top_k=5,top_p=0.6" as a dict."""
    return {key: json.loads(value.lower()) for key, value in (item.split("=") for item in text.split(","))}


def generation(model: Any) -> dict[str, np.ndarray]:
    """The arrays of `data/generation.npz`."""
    import torch
    import transformers

    rng = np.random.default_rng(7)
    ids = rng.integers(0, VOCABULARY, (4, 12))
    scores = 2 * logits(model, ids)[:, -1].astype(np.float32)  # less flat than a random model's
    made = {"ids": ids, "scores": scores}
    for text in WARPERS:
        asked = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | settings_of(text)))
        processors = model._get_logits_processor(asked, input_ids_seq_length=ids.shape[1])
        made[text] = processors(torch.from_numpy(ids), torch.from_numpy(scores.copy())).numpy()
    prompt = rng.integers(0, VOCABULARY, 7)
    made |= {"prompt": prompt, "end": greedy(model, prompt, 7)[0][6], "pad": np.array(-1)}
    for text in BEAMS:
        asked = settings_of(text)
        found = model.generate(
            torch.from_numpy(prompt[None]),
            attention_mask=torch.ones(1, prompt.size, dtype=torch.int64),
            do_sample=False,
            num_return_sequences=asked["num_beams"],
            eos_token_id=int(made["end"]),
            pad_token_id=-1,
            output_scores=True,
            return_dict_in_generate=True,
            **asked,
        )
        made[f"beam/{text}/sequences"] = found.sequences[:, prompt.size :].numpy()
        made[f"beam/{text}/scores"] = found.sequences_scores.numpy()
    return made


def record() -> None:
    """Write everything but what is computed in float64, and have another process add that."""
    shutil.rmtree(DATA, ignore_errors=True)
    for name in CASES:
        make(name, DATA / name)
        rng = np.random.default_rng([1, *name.encode()])
        tokens = rng.integers(0, VOCABULARY, (2, 20))
        made = {"tokens": tokens, "logits32": logits(load(DATA / name, "float32"), tokens)}
        made |= {f"prompt{i}": rng.integers(0, VOCABULARY, length) for i, length in enumerate(PROMPTS)}
        np.savez_compressed(DATA / f"{name}.npz", **made)
    subprocess.run([sys.executable, __file__, "wide"], check=True)


def record_wide() -> None:
    """Add what is computed in float64 to the files of `record`."""
    sys.meta_path.insert(0, _WideFinder)
    import torch

    torch.set_default_dtype(torch.float64)
    for name in CASES:
        with np.load(DATA / f"{name}.npz") as file:
            made = dict(file)
        model = load(DATA / name, "float64")
        made["logits64"] = logits(model, made["tokens"])
        made["packed64"] = packed(model, made["tokens"])
        texts, margins = zip(*(greedy(model, made[f"prompt{i}"]) for i in range(len(PROMPTS))), strict=True)
        made |= {"greedy": np.stack(texts), "margin": np.array(min(margins))}
        np.savez_compressed(DATA / f"{name}.npz", **made)
        apart = np.abs(made["logits64"] - made["logits32"]).max()
        print(
            f"{name}: float32 is {apart:.1e} away, largest logit {np.abs(made['logits64']).max():.1f}, "
            f"greedy margin {made['margin']:.1e}, {len(set(made['greedy'].ravel()))} ids"
        )
    np.savez_compressed(DATA / "generation.npz", **generation(load(DATA / "llama3", "float64")))


if __name__ == "__main__":
    record_wide() if "wide" in sys.argv else record()
