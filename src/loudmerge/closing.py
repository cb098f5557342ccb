"""The matrices that `auto` does not balance: what a last layer's MLP writes through, and the head. Pure.

Only a norm and the head come after the first, so what rounding does to their mean output moves the logits of
every token alike. Balanced rounding leaves out the small shares, always the same ones, and is off in the mean
where it is chance alone that is right in it. A head's rows are changed alike at first, which no softmax sees;
but it sees what any rounding but the nearest adds to each logit. docs/rounding.md has the measurements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from loudmerge.names import INDEX

_DOWN = (
    "down_proj",
    "w2",
    "wo",
    "fc2",
    "c_proj",
    "fc_out",
    "lin2",
    "linear2",
    "dense_4h_to_h",
    "output_linear",
    "output.dense",
)
_ENDS = tuple(f".{name}{end}" for name in _DOWN for end in ("", ".weight", "_weight"))
"""How transformers' MLPs and experts name what leads back from the inner width, in memory and on disk."""

_HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")


def is_head(name: str) -> bool:
    """Whether a tensor makes the logits of tokens."""
    return name.endswith(_HEADS)


def closing(names: Iterable[str], is_extra: Callable[[str], bool] = lambda _: False) -> frozenset[str]:
    """Those of a checkpoint's names. Each stack of layers, of a tower too, has a last one.

    is_extra: whether a name's layer is none of the model's, as those for multi-token prediction.
    """
    stacks: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if name.endswith(_ENDS) and (index := INDEX.search(name)) is not None:
            stacks[name[: index.start()]][int(index[0])].append(name)
    found: set[str] = set()
    for layers in stacks.values():
        own = (layer for layer in layers if not is_extra(layers[layer][0]))
        found.update(layers.get(max(own, default=-1), ()))
    return frozenset(found)
