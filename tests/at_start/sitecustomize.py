"""Python runs this at its start if the folder is on PYTHONPATH: see ../torchvision_operators.py."""

import sys
from pathlib import Path


class BeforeTorchvision:
    """Finds no module, but sees which one is looked for."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.path.append(str(Path(__file__).parent.parent))
            import torchvision_operators

            sys.path.pop()
            torchvision_operators.declare()


sys.meta_path.insert(0, BeforeTorchvision)
