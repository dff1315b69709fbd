"""Named tuples of arrays by reference, for compiled code that calls functions many times an iteration.

The scheduler's `State` is such a tuple. Numba hands it on by value, a hundred machine words, and counts references to
every array in it at every call, which costs a scheduler more than its work. A borrowed state is one pointer to that
tuple, kept on the stack of the function that borrows it; its fields are the same arrays, without an owner to count.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

from numba.core import cgutils, types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, models, register_model


class Borrowed(types.Type):
    """The type of a pointer to a named tuple of arrays that somebody else keeps alive."""

    def __init__(self, borrowed_tuple: types.NamedTuple) -> None:
        self.tuple = borrowed_tuple
        super().__init__(name=f"Borrowed({borrowed_tuple.name})")


register_model(Borrowed)(models.OpaqueModel)


def _borrow(_context: Any, state: Any) -> Any:
    if isinstance(state, Borrowed):
        return state(state), lambda _context, _builder, _signature, arguments: arguments[0]

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        slot = cgutils.alloca_once_value(builder, arguments[0])
        return builder.bitcast(slot, cgutils.voidptr_t)

    return Borrowed(state)(state), generate


_Arrays = TypeVar("_Arrays", bound=tuple[Any, ...])


class _Borrow(Protocol):
    def __call__(self, arrays: _Arrays, /) -> _Arrays: ...


# The tuple by reference: valid in the compiled function that calls this and in those that it calls.
borrow = cast(_Borrow, intrinsic(_borrow))


@infer_getattr
class _Fields(AttributeTemplate):
    key = Borrowed

    def generic_resolve(self, borrowed: Borrowed, name: str) -> types.Type | None:  # type: ignore[override]
        fields = borrowed.tuple.fields
        return borrowed.tuple.types[fields.index(name)] if name in fields else None


@lower_getattr_generic(Borrowed)
def _field(context: Any, builder: Any, borrowed: Borrowed, pointer: Any, name: str) -> Any:
    index = borrowed.tuple.fields.index(name)
    slot = builder.bitcast(pointer, context.get_value_type(borrowed.tuple).as_pointer())
    place = cgutils.gep_inbounds(builder, slot, 0, index)
    array = context.make_array(borrowed.tuple.types[index])(context, builder, builder.load(place))
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    return array._getvalue()
