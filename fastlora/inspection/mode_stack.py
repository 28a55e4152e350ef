"""Stack of torch's modes, from which hooks take theirs in whatever order."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode


def remove_mode(mode: TorchFunctionMode) -> None:
    """Takes a mode from this thread's stack, where others may lie on it, if it is there.

    Its own ``__exit__`` takes whichever is on top.
    """
    above: list[TorchFunctionMode] = []
    while (top := _get_current_function_mode()) is not None:
        _pop_mode()
        if top is mode:
            break
        above.append(top)
    for each in reversed(above):
        _push_mode(each)
