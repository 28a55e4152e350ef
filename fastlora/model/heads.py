"""Heads of a classifier that its adapter's files would not hold, though no checkpoint has them."""

from __future__ import annotations

from torch import nn

from fastlora.config import LoRAConfig
from fastlora.model.targets import Plan

# What PEFT trains whole for the task types of classifiers, and what such classes are called.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("score", "classifier")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def explain_unsaved_head(model: nn.Module, config: LoRAConfig, chosen: Plan) -> str | None:
    """Says why a transformers classifier's head is lost when only the adapter is saved, or None.

    It is new where the checkpoint was of another class, as its config tells, or there was none:
    then the whole model is new, which matters only where the head is adapted unawares.
    """
    kind = type(model).__name__
    ending = next((suffix for suffix in _TASKS if kind.endswith(suffix)), None)
    if ending is None or not type(model).__module__.startswith("transformers."):
        return None
    task, names = _TASKS[ending]
    name = next((n for n in names if isinstance(getattr(model, n, None), nn.Module)), None)
    architectures = getattr(getattr(model, "config", None), "architectures", None)
    if name is None or kind in (architectures or ()) or not (architectures or config.all_linear):
        return None
    if any(f"{name}.".startswith(f"{saved}.") for saved in chosen.saved):
        return None
    origin = (
        f"the checkpoint was a {architectures[0]}" if architectures else "there was no checkpoint"
    )
    return (
        f"task_type={config.task_type!r}: the {name} of {kind} is new ({origin}), but neither "
        "trained whole nor saved with the adapter, which is of no use without it: give "
        f'task_type="{task}", or modules_to_save=["{name}"]'
    )
