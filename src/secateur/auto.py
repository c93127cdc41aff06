"""transformers' Auto classes learn tier-B checkpoints as soon as both packages are imported, in either order.

Doing so takes torch and transformers, seconds that `import secateur` does not owe to whoever only asks for help. So the
import of transformers is watched, and where it has been imported already, nothing waits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRANSFORMERS = "transformers"
MODELING = "secateur.model.modeling_secateur"


def register_beside_transformers() -> None:
    """Register now if transformers has been imported, else when it will be."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    if TRANSFORMERS in sys.modules:
        import_module(MODELING)


class _Watch(MetaPathFinder):
    """Finds what the other finders find; when one of the two modules has been executed, goes on from there.

    The modeling file imports transformers itself, so that either may be the first: whichever it is, the registration
    comes after the modeling file's last line.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (TRANSFORMERS, MODELING):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if fullname == TRANSFORMERS:
                    import_module(MODELING)
                else:
                    from secateur.model.family_plugins import register_all

                    register_all()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader, made for one module
        return spec
