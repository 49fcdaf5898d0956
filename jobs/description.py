"""What an ensemble is made of, as `ensemble.json` tells it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir
from fivefold.inference.systems import Score


def description(
    groups: Mapping[str, list[ModelDir]],
    files: Mapping[str, Path],
    weights: np.ndarray,
    temperature: float,
    scores: list[Score],
) -> dict[str, Any]:
    """What `ensemble.json` holds: members, weights, temperature, and scores with what they speak of."""
    members = [
        {
            "system": name,
            "model": model.name,
            "weight": round(float(weight) / len(group), 9),
            "best": model.info["best"],
        }
        for (name, group), weight in zip(groups.items(), weights, strict=False)
        for model in group
    ]
    systems = {name: round(float(weight), 9) for name, weight in zip([*groups, *files], weights, strict=True)}
    members += [{"system": name, "model": f"file {path.name}", "weight": systems[name]} for name, path in files.items()]
    return {"members": members, "weights": systems, "temperature": temperature, "scores": scores}
