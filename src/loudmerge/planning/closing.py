"""The matrices that `auto` does not balance: what a last layer writes through, and the head. Pure.

Only a norm and the head come after the first, so what rounding does to their mean output moves the logits of
every token alike. Balanced rounding leaves out the small shares, always the same ones, and is off in the mean
where it is chance alone that is right in it. A head's rows are changed alike at first, which no softmax sees;
but it sees what any rounding but the nearest adds to each logit. docs/rounding.md has the measurements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from loudmerge.reading.names import NUMBER

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
"""How transformers' MLPs and experts name what leads back from the inner width, in memory and on disk.

Some models' attention has the name too (GPT-2's c_proj): that writes to the same place.
"""

_HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")


def is_head(name: str) -> bool:
    """Whether a tensor makes the logits of tokens. name: in memory."""
    return name.endswith(_HEADS)


def closing(names: Iterable[str], is_extra: Callable[[str], bool] = lambda _: False) -> frozenset[str]:
    """Those of a checkpoint's names. Each stack of layers, of a tower too, has a last one.

    is_extra: whether a name's layer is none of the model's, as those for multi-token prediction.
    """
    stacks: dict[str, dict[int, tuple[str, list[str]]]] = defaultdict(dict)
    for name in names:
        if (index := NUMBER.search(name)) is None:
            continue
        # By all its names: a layer without an MLP may be the last.
        _, found = stacks[name[: index.start()]].setdefault(int(index[0]), (name, []))
        if name.endswith(_ENDS):
            found.append(name)
    last: set[str] = set()
    for layers in stacks.values():
        own = [number for number, (name, _) in layers.items() if not is_extra(name)]
        last.update(layers[max(own)][1] if own else ())
    return frozenset(last)
