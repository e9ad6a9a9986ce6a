"""Low-variance training targets for any Gaussian diffusion or flow model.

import stablefield as sf

stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))
target = stable(x0, x_t, sigma, index=index)  # then regress on target.x0, .noise, .score, .v or .velocity

run = sf.train(images, out="runs/mine")  # or the whole training: images is a folder, or a tensor, uint8 or float data
run.sample(64).save("grid.png")
"""

from stablefield._lazy import attach

__version__ = "0.1.0"

# Lazy, so that the command can print its help and correct a mistyped flag without importing torch.
__getattr__, __dir__ = attach(__name__, __file__)
