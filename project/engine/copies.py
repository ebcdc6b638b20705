"""Modules that share what they can with the module they were made of: other linear layers, the same everything else.

Unusual here: nothing is deep-copied and nothing is changed in place. A copy has a list of children of its own, so one
run can be served as it is, packed, in bfloat16 and in int8 at once, each for the memory of what differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def with_linears(module: Kind, make: Callable[[nn.Linear], nn.Module], leave: Collection[str] = ()) -> Kind:
    """A module with other linear layers; what holds none is the module itself.

    Args:
        module: Stays as it is.
        make: Says what stands for a plain `nn.Linear`; layers of its subclasses stay.
        leave: Names of children that stay, with all that they hold.
    """
    if not any(type(part) is nn.Linear for part in module.modules()):
        return module
    found = copied(module)
    for name, child in found._modules.items():
        if name in leave:
            continue
        if type(child) is nn.Linear:
            found._modules[name] = make(child)
        elif child is not None:
            found._modules[name] = with_linears(child, make, leave)
    return found
