"""The types of a model's matrices under a size: measured, and then allocated."""

from __future__ import annotations

from edge.progress import Progress
from edge.quantizer.allocate import TypeOption, allocate
from edge.quantizer.calibration import Calibration
from edge.quantizer.damage import CANDIDATES, DamageMeasurement
from edge.quantizer.target import Costs, SizeTarget
from edge.quantizer.types import ModelTensors
from edge.weights.model_file import RawModel

__all__ = ["sized_types"]


def sized_types(
    file: RawModel, target: SizeTarget, calibration: Calibration, progress: Progress
) -> dict[str, str]:
    """Matrix -> the type with which all together do the least damage within the target.

    progress(steps done, all). Raises InputError for a target that cannot be reached, and what
    `Calibration.running` and `DamageMeasurement.measure` raise.
    """
    names = [t.name for t in ModelTensors.of(file).matrices]
    costs = Costs(file, target, CANDIDATES, calibration.n_threads)
    measurement = DamageMeasurement(calibration, names, progress)
    measurement.measure()
    options = {
        name: [
            TypeOption(kind, costs.n_bytes(name, kind), damage, costs.seconds(name, kind))
            for kind, damage in damages.items()
        ]
        for name, damages in measurement.damages.items()
    }
    chosen = allocate(options, costs.allowance)
    return {name: option.type for name, option in chosen.items()}
