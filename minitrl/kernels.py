"""The door to the kernels: `import minitrl.kernels.attention` finds the file in minitrl/kernels/ or in ../kernels/.

The kernel files live in the top-level folder `kernels/`, which must not become a top-level package: Hugging Face
publishes a package `kernels`, and transformers breaks when another one shadows it. An installed minitrl has them in
minitrl/kernels/; a checkout, and an editable install of one, has them next to minitrl/. A module with a `__path__`
is a package to Python, so this file points there and that is all.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()][:1]
