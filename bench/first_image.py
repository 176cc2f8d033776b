"""Print the seconds from the start of this process to its first image, in parts: what test_sampling.py runs.

python first_image.py CHECKPOINT DEVICE ENGINE STEPS STARTED, the last in seconds since the epoch.
"""

import json
import sys
import time


def main(checkpoint: str, device: str, engine: str, steps: str, started: str) -> None:
    parts, last = {}, float(started)

    def done(part: str) -> None:
        nonlocal last
        parts[part], last = round(time.time() - last, 3), time.time()

    done("python")
    import torch

    done("import torch")
    torch.zeros(1, device=device)
    done("device")
    from fastddpm import Sampler

    sampler = Sampler.from_pretrained(checkpoint, device=device, precision="bf16", engine=engine)
    done("load")
    for part in ("prepare", "sample"):
        sampler.sample(1, steps=int(steps), output="uint8", progress=False)
        done(part)
    parts["prepare"] = round(parts["prepare"] - parts["sample"], 3)  # the first call was both
    print(json.dumps(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
