"""The model_types whose token rows PEFT ties to the head, by transformers' own classes and configs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from loudmerge.planning.tiedrows import TIES_ROWS, TIES_ROWS_WHERE_SAID

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="the tables are those of transformers 5"
)


def ties(model_type: str) -> Iterator[dict[str, str]]:
    """What each class of a model_type ties: the head, and what it shares."""
    for name in dir(modeling_auto):
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES"):
            classes = getattr(modeling_auto, name).get(model_type, ())
            for each in (classes,) if isinstance(classes, str) else classes:
                found = getattr(getattr(transformers, each), "_tied_weights_keys", None)
                if found:
                    yield found


@pytest.mark.parametrize("model_type", sorted(TIES_ROWS | TIES_ROWS_WHERE_SAID))
def test_the_class_names_the_head_and_the_config_says_so(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {model_type}")
    assert any("lm_head.weight" in each for each in ties(model_type))
    said = CONFIG_MAPPING[model_type]().to_dict().get("tie_word_embeddings")
    assert (said is True) == (model_type in TIES_ROWS)
