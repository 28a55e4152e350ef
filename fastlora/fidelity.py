"""How much of a merge survives the weight's rounding."""

from fastlora.functional.fidelity import Fidelity, FidelityWarning, measure

__all__ = ["Fidelity", "FidelityWarning", "measure"]
