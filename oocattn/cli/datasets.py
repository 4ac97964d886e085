"""What `synth` and `import` have written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oocattn.storage.inputs.dataset import Dataset

FORMAT = 1
"""Of the JSON document."""


@dataclass(frozen=True)
class WrittenDataset:
    """A dataset as the commands that write one describe it."""

    dataset: Dataset

    def to_json(self) -> dict[str, Any]:
        """Where it is, and its arrays."""
        specs = {name: source.spec for name, source in self.dataset.arrays.items()}
        return {
            "format": FORMAT,
            "dataset": self.dataset.location,
            "arrays": {name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in specs.items()},
        }
