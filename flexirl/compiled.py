"""`@compiled`: a function that Numba compiles once for all whole numbers, and keeps between runs.

Numba compiles what compiled code calls anew for each constant and each width of integer that is passed, and with it
what that calls in turn: most of the scheduler three times over. Inlining, which follows, knows the constants anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba as nb
from numba.core import types

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """`function`, compiled at its first call."""
    dispatcher: Any = nb.njit(cache=True)(function)
    template = dispatcher.get_call_template

    def get_call_template(arguments: Sequence[types.Type], named: dict[str, types.Type]) -> Any:
        return template([_wide(kind) for kind in arguments], {name: _wide(kind) for name, kind in named.items()})

    dispatcher.get_call_template = get_call_template
    return cast(_Function, dispatcher)


def _wide(kind: types.Type) -> types.Type:
    kind = types.unliteral(kind)
    return types.int64 if kind in types.signed_domain else kind
