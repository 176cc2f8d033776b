"""Print the seconds from the start of this process to its first image, in parts: used by test_sampling.py

python first_image.py CHECKPOINT DEVICE ENGINE STEPS STARTED, the last in seconds since the epoch
"""

import json
import sys
import time

parts, last = {}, float(sys.argv[5])


def done(part: str) -> None:
    global last
    parts[part], last = round(time.time() - last, 3), time.time()


done("python")
import torch  # noqa: E402, F401

done("torch")
from fastddpm import Sampler  # noqa: E402

sampler = Sampler.from_pretrained(sys.argv[1], device=sys.argv[2], precision="bf16", engine=sys.argv[3])
done("load")
sampler.sample(1, steps=int(sys.argv[4]), output="uint8", progress=False)
done("prepare")
sampler.sample(1, steps=int(sys.argv[4]), output="uint8", progress=False)
done("sampling")
parts["prepare"] = round(parts["prepare"] - parts["sampling"], 3)  # the first call was both
print(json.dumps(parts))
