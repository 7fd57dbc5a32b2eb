"""A model of shardlm in the lm-evaluation-harness: `HarnessModel`, a class of its `lm_eval.api.model.LM`.

    import lm_eval, shardlm as sl
    from shardlm.generate.harness import HarnessModel

    model = HarnessModel("Qwen3-0.6B", layout=sl.Layout(tensor=4))
    print(lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])["results"])

It asks as the harness's own class for Hugging Face models, `HFLM` of lm_eval 0.4, does of the same folder: the same ids
go in, are cut at the same place and stop at the same strings, so that answers differ by the rounding of logits alone.
The class is made when it is asked for, as the package lm_eval comes with an extra.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlm._extras import install
from shardlm.generate import score
from shardlm.generate.chat import apply_template, chat_template
from shardlm.generate.encode import begin_token, decode, encode, prefix_token
from shardlm.hub.files import folder_of, read_config, read_json
from shardlm.hub.load import load_hf
from shardlm.layout import Layout

_DEFAULT_LENGTH = 2048  # of HFLM, where nothing says how many tokens the model takes
_UNSET = 10**20  # tokenizers write 1e30 for no limit
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
# What transformers takes where config.json does not say.
_FAMILY_LENGTHS = {
    "gemma": 8192,
    "gemma2": 8192,
    "gemma3_text": 131072,
    "gpt2": 1024,
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
}
# Of generation_config.json: what greedy decoding obeys too, or drawing alone, or what has no effect at these values.
_ALWAYS = ("repetition_penalty",)
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_NOTHING_AT = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
}


def __getattr__(name: str) -> Any:
    if name == "HarnessModel":
        return _harness_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _harness_model() -> type:
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(f"to evaluate with the lm-evaluation-harness: {install('eval')}") from error

    class HarnessModel(_Requests, LM):
        """A model of shardlm that the lm-evaluation-harness asks; see the head of this file.

        In a run of several processes all make it and all ask the same: each has every answer.

        Args:
            pretrained: a Hugging Face folder; or None, with the next three.
            config, params, tokenizer: a model in memory, as of `sl.load_hf`.
            layout: a `Layout`, or its text: "tensor=4". Default one device.
            dtype, devices: as of `sl.load_hf`.
            batch_size, chunk: as of `sl.score`; the harness's own `batch_size` argument is this one.
            max_length: the most tokens of context and continuation; default what the folder says, or 2048. Longer
                contexts lose their front, as in the harness.
            max_gen_toks: tokens to make for requests that do not say.
            add_bos_token: True puts the id that begins a text in front of texts, in place of what the tokenizer puts
                around them; False nothing; None what the tokenizer does. Texts that begin with it get nothing.
            prefix_token_id: stands for an empty context; default the id that begins a text, or else ends one.
            chat_template_args: for the chat template, such as {"enable_thinking": False}.

        Raises:
            ImportError: lm_eval is not installed.
            ValueError: there is no tokenizer, or an argument does not fit.
        """

        def __init__(self, pretrained: str | Path | None = None, **options: Any):
            LM.__init__(self)
            self._set_up(pretrained, **options)

    register_model("shardlm")(HarnessModel)
    HarnessModel.__module__ = __name__
    return HarnessModel


class _Requests:
    """What the harness asks of a model, by `sl.score`; apart from the class of lm_eval, which may not be installed."""

    cache_hook: Any  # of LM

    def _set_up(
        self,
        pretrained: str | Path | None,
        *,
        config: Any = None,
        params: Any = None,
        tokenizer: Any = None,
        layout: Layout | str | None = None,
        dtype: str | None = None,
        devices: Sequence[Any] | None = None,
        batch_size: int | str | None = None,
        chunk: int = 64,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        if device is not None or max_batch_size is not None:
            raise ValueError(
                f"device={device!r}, max_batch_size={max_batch_size!r}: shardlm places models by layout= and devices=, "
                "and takes batch_size= alone"
            )
        if isinstance(layout, str):
            layout = Layout.parse(layout)
        folder, self._defaults, self._template = None, {}, None
        if (pretrained is None) == (config is None or params is None):
            raise ValueError("give a Hugging Face folder, or config=, params= and tokenizer= of a model in memory")
        if pretrained is not None:
            folder = folder_of(pretrained)
            config, params, own = load_hf(folder, layout, dtype, devices)
            tokenizer = own if tokenizer is None else tokenizer
            path = folder / "generation_config.json"
            self._defaults = read_json(path) if path.is_file() else {}
            path = folder / "chat_template.jinja"
            self._template = path.read_text(encoding="utf-8") if path.is_file() else None
        if tokenizer is None:
            raise ValueError(f"{folder or 'the model'} has no tokenizer: give tokenizer=")
        self.config, self.params, self.tokenizer, self.layout = config, params, tokenizer, layout
        self.max_length = _length(folder, config, tokenizer) if max_length is None else max_length
        self.max_gen_toks, self.chat_template_args = max_gen_toks, dict(chat_template_args or {})
        self.prefix_token_id = prefix_token(tokenizer) if prefix_token_id is None else prefix_token_id
        self._name = str(pretrained or type(tokenizer).__name__)
        self._special = False if add_bos_token is False else None
        asked = _Beginning(tokenizer) if add_bos_token else tokenizer
        self._where = {"layout": layout, "tokenizer": asked, "devices": devices, "batch_size": _rows(batch_size)}
        self._chunk = chunk

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's files of requests."""
        return self._name.replace("/", "__")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each continuation the sum of its log-probabilities, and whether it is what greedy decoding makes."""
        pairs = [request.args for request in requests]
        found = score.loglikelihood(
            self.config, self.params, pairs, prefix=self.prefix_token_id, special=self._special, chunk=self._chunk,
            max_length=self.max_length, truncate=True, **self._where,
        )  # fmt: skip
        answers = [(x.logprob, x.is_greedy) for x in found]
        self._remember("loglikelihood", pairs, answers)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-probability of each text, in windows of `max_length`."""
        texts = [request.args[0] for request in requests]
        answers = score.loglikelihood_rolling(
            self.config, self.params, texts, prefix=self.prefix_token_id, special=self._special, chunk=self._chunk,
            window=self.max_length, **self._where,
        )  # fmt: skip
        self._remember("loglikelihood_rolling", [(text,) for text in texts], answers)
        return answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What continues each context, up to the first of its stop strings."""
        pairs = [request.args for request in requests]
        asked = [(context, self._settings(settings)) for context, settings in pairs]
        answers = score.generate_until(
            self.config, self.params, asked, special=self._special, max_length=self.max_length, truncate=True,
            prefill_chunk=self._chunk, **self._where,
        )  # fmt: skip
        self._remember("generate_until", pairs, answers)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text, by the folder's template; without a generation prompt its last message stays open."""
        template = self._template or chat_template(self.tokenizer)
        return apply_template(template, self.tokenizer, chat_history, add_generation_prompt, self.chat_template_args)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that the harness notes beside its results; True for the folder's, or its name."""
        if not chat_template:
            return None
        return self._template or _template_of(self.tokenizer, chat_template)

    def _settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Of a request, and of generation_config.json besides, which transformers obeys when the harness asks."""
        wrong = {name: value for name, legal in _NOTHING_AT.items() if (value := self._defaults.get(name)) not in legal}
        if wrong:
            told = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            raise ValueError(f"generation_config.json says {told}, which shardlm's generation does not have")
        found = {"max_gen_toks": self.max_gen_toks} if not any(asked.get(n) is not None for n in score.LENGTHS) else {}
        drawn = asked.get("do_sample") or (asked.get("do_sample") is None and (asked.get("temperature") or 0) > 0)
        names = (*_ALWAYS, *_DRAWING[1:]) if drawn else _ALWAYS
        neutral = {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}
        told = {"top_k": 50} | self._defaults if drawn else self._defaults  # 50 is transformers' own
        found |= {name: told[name] for name in names if told.get(name) not in (None, neutral[name])}
        return found | dict(asked)

    def _remember(self, kind: str, asked: Sequence[Any], answers: Sequence[Any]) -> None:
        for arguments, answer in zip(asked, answers, strict=True):
            self.cache_hook.add_partial(kind, arguments, answer)


class _Beginning:
    """A tokenizer that puts its id for that in front of a text, whatever its file says, and nothing after it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._begin = tokenizer, begin_token(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text."""
        front = [self._begin] if special and self._begin is not None else []
        return front + encode(self._tokenizer, text).tolist()

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids."""
        return decode(self._tokenizer, ids, special)


def _template_of(tokenizer: Any, name: bool | str) -> str:
    return chat_template(tokenizer, None if name is True else str(name))


def _length(folder: Path | None, config: Any, tokenizer: Any) -> int:
    """How many tokens the model takes, as HFLM finds it."""
    if config.max_sequence is not None:
        return config.max_sequence
    values = {} if folder is None else read_config(folder)
    values = values.get("text_config") or values
    told = [values.get(name) for name in _LENGTHS]
    settings = getattr(tokenizer, "settings", None) or {}
    own = getattr(tokenizer, "model_max_length", settings.get("model_max_length"))
    told += [_FAMILY_LENGTHS.get(values.get("model_type", "")), own if own and own < _UNSET else None]
    return int(next((x for x in told if x is not None), _DEFAULT_LENGTH))


def _rows(batch_size: int | str | None) -> int | None:
    """The harness gives text too; "auto" is ours to choose."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return None
    return int(batch_size)


__all__ = ["HarnessModel"]  # noqa: F822  made by __getattr__
