"""Draw one image in this new process, and print the seconds since its start in parts. test_start.py runs this file.

Usage: python first_image.py WHO CHECKPOINT DEVICE ENGINE STEPS IMAGE STARTED
WHO is fastddpm or diffusers, IMAGE the .npy file to write, STARTED the time of the start in seconds since the epoch.
"""

import json
import sys
import time


def main(who: str, checkpoint: str, device: str, engine: str, steps: str, image: str, started: str) -> None:
    parts, last = {}, float(started)

    def done(part: str) -> None:
        nonlocal last
        parts[part], last = round(time.time() - last, 3), time.time()

    done("python")
    import torch

    done("import torch")
    torch.zeros(1, device=device)
    done("device")
    sample = {"fastddpm": fastddpm, "diffusers": diffusers}[who](checkpoint, device, engine, int(steps))
    done("load")
    images = sample()
    done("sample")
    import numpy

    numpy.save(image, images)
    print(json.dumps(parts))


def fastddpm(checkpoint: str, device: str, engine: str, steps: int):
    from fastddpm import Sampler

    sampler = Sampler.from_pretrained(checkpoint, device=device, precision="bf16", engine=engine)
    return lambda: sampler.sample(1, steps=steps, output="uint8", progress=False)


def diffusers(checkpoint: str, device: str, engine: str, steps: int):
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(checkpoint).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(num_inference_steps=steps, output_type="np", generator=torch.manual_seed(0)).images


if __name__ == "__main__":
    main(*sys.argv[1:])
