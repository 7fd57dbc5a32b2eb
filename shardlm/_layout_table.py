"""What a layout's settings mean in words, and the table that says so, as text and as HTML.

`layout` is a `shardlm.layout.Layout` throughout; that file imports this one.
"""

import html
from typing import Any

from shardlm._text import fold

ZERO = {
    1: "optimizer state",
    2: "gradients and optimizer state",
    3: "parameters, gradients and optimizer state",
}
REMAT = {
    "none": "every activation kept for the backward pass",
    "dots": "results of matrix products kept, the rest recomputed in the backward pass",
    "full": "only each layer's input kept, the rest recomputed in the backward pass",
}
REDUCE_GRADIENTS = {
    "layer": "summed over the batch axes layer by layer inside the backward pass, where it can overlap",
    "step": "summed over the batch axes once, after the backward pass",
}
_TITLES = ("axis", "devices", "what it does")


def as_text(layout: Any, config: Any) -> str:
    """Aligned columns, then a line for each setting that matters, folded to the terminal's width.

    `config` is a model's, or None.
    """
    lines = [fold(f"{axis:<8}{size:>7}  {use}", hang=17) for axis, size, use in [_TITLES, *_rows(layout)]]
    return "\n".join([fold(f"Layout {layout}"), *lines, *map(fold, _notes(layout, config))])


def as_html(layout: Any) -> str:
    """The same as an HTML table, for notebooks."""
    rows = [("th", _TITLES), *(("td", row) for row in _rows(layout))]
    table = "".join(f"<tr>{''.join(f'<{t}>{html.escape(cell)}</{t}>' for cell in row)}</tr>" for t, row in rows)
    return f"<table>{table}</table>{'<br>'.join(html.escape(note) for note in _notes(layout, None))}"


def uses(zero: int | None) -> tuple[str, ...]:
    """What each axis does, in mesh order; without a ZeRO level, which of the state `fsdp` splits stays open."""
    return (
        "layers split into stages",
        "batch split, gradients summed",
        "batch and state split" if zero is None else f"batch split; ZeRO-{zero}: {ZERO[zero]} split",
        "batch and experts split",
        "sequence split",
        "heads, MLP width and vocabulary split",
    )


def _rows(layout: Any) -> list[tuple[str, str, str]]:
    return [
        (str(axis), str(size), use if size != 1 else "-")
        for (axis, size), use in zip(layout.sizes.items(), uses(layout.zero), strict=True)
    ]


def _notes(layout: Any, config: Any) -> list[str]:
    notes = []
    if -1 in layout.sizes.values():
        notes.append("-1 is filled from the number of devices")
    if layout.sequence_parallel:
        notes.append("sequence_parallel: activations between blocks split over tensor, by sequence")
    if layout.accumulate > 1:
        notes.append(f"accumulate {layout.accumulate}: gradients of {layout.accumulate} microbatches summed per step")
    if layout.pipeline is not None:
        ends = layout.pipeline.vocabulary == "ends"
        notes.append(
            f"pipeline {layout.pipeline}: {layout.microbatches} microbatches through {layout.pipe} stages; embedding "
            + (
                "and head on the first and last, their tables on all"
                if ends
                else "and head split over them by vocabulary"
            )
            + "; parameters gathered, and gradients summed, once per step"
        )
    if layout.remat != "none":
        notes.append(f"remat {layout.remat}: {REMAT[layout.remat]}")
    if (layout.data, layout.fsdp, layout.expert) != (1, 1, 1):
        when = layout.gradient_reduction
        notes.append(f"reduce_gradients {when}: {REDUCE_GRADIENTS[when]}")
    if config is None:
        return notes
    if layout.pipeline is not None:
        counts = layout.pipeline.counts(config.num_layers, layout.pipe)
        rows = max(counts) * len(counts)
        if rows != config.num_layers:
            notes.append(
                f"layers of each piece: {', '.join(map(str, counts))}; {rows - config.num_layers} of {rows} rows of "
                "layers are padding, which takes memory and time and computes the identity"
            )
    if config.num_kv_heads < layout.tensor:
        notes.append(
            f"kv heads {config.num_kv_heads} < tensor {layout.tensor}: every device of the tensor axis stores the "
            f"weights of all {config.num_kv_heads}, and computes with the one that its query heads share"
        )
    padded = getattr(config, "padded_vocab_size", config.vocab_size)
    if padded != config.vocab_size:
        notes.append(f"vocabulary {config.vocab_size} padded to {padded}")
    return notes
