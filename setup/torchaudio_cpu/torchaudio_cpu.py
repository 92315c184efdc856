"""Makes `import torchaudio` work beside a CPU-only torch, and changes nothing where it works already.

torchaudio's wheel from the package index carries a compiled extension that is linked against CUDA libraries. Beside a
CPU-only torch these are missing, and the import ends in an OSError, although everything this project uses (resampling,
Kaldi filter banks, masking) is plain Python. torchaudio itself runs without the extension when its file is absent; this
hook makes a file that cannot be loaded count as absent. requirements.txt installs it; the .pth file beside this one
starts it with the interpreter, so nothing else has to know.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

MODULE = "torchaudio._extension.utils"


class _Finder(MetaPathFinder):
    """Finds the one module of torchaudio that loads the extension, as usual, and hands it to `_Tolerant`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Tolerant(spec.loader)
        return spec


class _Tolerant(Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        load_lib = module._load_lib

        def load_lib_or_count_as_absent(lib: str) -> bool:
            try:
                return load_lib(lib)
            except OSError:
                return False

        module._load_lib = load_lib_or_count_as_absent


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
