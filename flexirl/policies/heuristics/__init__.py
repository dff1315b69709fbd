"""Policies written by hand: the rules of published schedulers, the anchors, and a constant setting of the dials.

A rule is one file: importing this package imports them all, and each makes itself known by its name.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
