"""The specification in eager torch: the paper's diffusion (`diffusion`) and its network (`unet`)."""
