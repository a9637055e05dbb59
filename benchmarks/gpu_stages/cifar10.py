"""The table of CIFAR-10: full training of a ResNet-18 and its compression, by `cifar10.py`, which goes on where it
stopped: call the stage until it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from gpu_stages.stage import Context, Stage, Step

METHODS = ("svd", "svd-spatial")  # smoothk's own, without images
MORE = 3  # exit status of `cifar10.py`


def _obstacle(context: Context) -> str | None:
    if context.device != "cuda":
        return "needs a CUDA device"
    if not context.data:
        return "needs --data-dir, the directory that holds cifar-10-batches-py"
    return None if Path(context.data).is_dir() else f"--data-dir {context.data!r} is no directory"


def smallest_drop(keep: float, accuracy: str) -> Callable[[Path], float | str | None]:
    """Points that the network which loses least at this size loses, the mean of its seeds."""

    def read(out: Path) -> float | str | None:
        drops: dict[tuple[str, str], list[float]] = {}
        for path in sorted((out / "cifar10" / "results").glob("*.json")):
            for row in json.loads(path.read_text()).get("rows", []):
                if row["keep"] == keep and row["method"] in METHODS and row[accuracy] is not None:
                    drops.setdefault((row["network"], row["method"]), []).append(row["dense_accuracy"] - row[accuracy])
        return min(map(mean, drops.values()), default=None)

    return read


# Not in the step's folder: what is there is removed with the results of other code, and trained networks cost much.
_COMMAND = (
    "{python} {benchmarks}/cifar10.py --preset full --budget 510 --data-dir {data} --out {out}/../runs "
    "--results {out}/../results"
)
CIFAR10 = Stage("cifar10", 540, [Step("full", tuple(_COMMAND.split()), 540, unfinished=MORE)], obstacle=_obstacle)
