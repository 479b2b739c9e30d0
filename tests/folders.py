"""Modules of the self-contained folders, side by side in one process: for the tests and for bench.py."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_loaded = {}  # folder -> its modules, by name


def load(folder, name):
    """Module `name` of a folder, e.g. load("omniglot", "model"); the same object every time.

    Every folder has its own main, model, dataloader and runtime, so `import model` has to mean another file
    in each: while one folder is loading only its modules are visible, and afterwards none is.
    """
    place, mine = str(ROOT / folder), _loaded.setdefault(folder, {})
    if name not in mine:
        names = {path.stem for path in (ROOT / folder).glob("*.py")}
        hidden = {other: sys.modules.pop(other) for other in names & sys.modules.keys()}
        sys.modules.update(mine)
        sys.path.insert(0, place)
        try:
            importlib.invalidate_caches()
            importlib.import_module(name)
        finally:
            sys.path.remove(place)
            mine.update({other: sys.modules.pop(other) for other in names & sys.modules.keys()})
            sys.modules.update(hidden)
        for other, module in mine.items():
            sys.modules[f"{folder.replace('/', '_')}_{other}"] = module
    return mine[name]
