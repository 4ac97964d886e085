"""What the tests of integrations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Attention of oocattn is known while a test runs, and gradients are off."""
    pytest.importorskip("transformers")
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    mappings = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    found = [dict(mapping) for mapping in mappings]
    with torch.no_grad():
        yield
    for mapping, before in zip(mappings, found, strict=True):
        mapping.clear()
        mapping.update(before)
