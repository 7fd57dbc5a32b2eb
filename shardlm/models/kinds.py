"""What a user gave where a configuration or parameters belong: the right kind, or an error that says how to make it.

Every public function that takes one asks here before it looks inside, so that a mistake is not an AttributeError from
the depths.
"""

from collections.abc import Mapping
from typing import Any

from shardlm.models.config import TransformerConfig


def require_config(config: Any, where: str = "config") -> TransformerConfig:
    """The configuration; raises TypeError, with the way to one, for anything else.

    Args:
        config: what a user gave.
        where: the name of the argument.
    """
    if isinstance(config, TransformerConfig):
        return config
    if isinstance(config, str):
        how = f"a preset's name goes to sl.presets.get({config!r}), and a Hugging Face folder to sl.load_hf({config!r})"
    elif isinstance(config, Mapping):
        made = ".from_dict(values)" if config.get("type") == "TransformerConfig" else "(**values)"
        how = f"make one of the values: sl.TransformerConfig{made}"
    elif isinstance(config, type):
        how = f"make one: {config.__name__}(...)"
    elif isinstance(getattr(config, "config", None), TransformerConfig):
        how = f"give the {type(config).__name__}'s own: .config"
    elif callable(config) and hasattr(config, "__name__"):
        how = f"call it: {config.__name__}()"
    else:
        how = "as sl.presets.tiny() makes one; a module of your own goes to sl.Trainer.from_module"
    raise TypeError(f"{where} is {kind(config)}, not a sl.TransformerConfig: {how}")


def require_params(params: Any, where: str = "params") -> Mapping[str, Any]:
    """Parameters, a nested dict of arrays; raises TypeError for anything else, such as the state that holds them."""
    if isinstance(params, Mapping) and not hasattr(params, "opt_state"):
        return params
    if hasattr(params, "params"):
        how = f"give the {type(params).__name__}'s own: .params"
    elif isinstance(params, tuple):
        how = (
            "sl.load_hf returns (config, params, tokenizer), trainer.step (state, metrics): take the one that is meant"
        )
    else:
        how = "it is the nested dict of arrays that state.params is"
    raise TypeError(f"{where} is {kind(params)}; {how}")


def kind(value: Any) -> str:
    """A value's kind in words, for an error: "the string 'tiny'", "the function adam", "a dict"."""
    if isinstance(value, str):
        return f"the string {value!r}"
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and type(value).__name__ in ("function", "builtin_function_or_method", "method"):
        return f"the function {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
