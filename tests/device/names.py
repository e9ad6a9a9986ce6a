"""What the scenarios on the far device are called, and what each of them may wait for."""

# Looks of one call of a target, however many chunks its references take. Of a whole pool: at the noise levels; which rows
# are in the band; whether the index is in range, the samples are the pool's, and the rows in the band are sound; which rows
# have small noise. References from the batch need no index, but have norms of their own. One more where conditions are to
# fit, where rows are alone, and where mirror images may have small noise, too; two more where references are drawn.
TARGETS = {
    "pool": 6,
    "floats": 6,
    "far from zero": 6,
    "in batch": 5,
    "DSM": 1,
    "groups": 7,
    "mirrored": 7,
    "flips": 6,
    "alone": 7,
    "drawn": 8,
    "capacity": 6,
    "heavy tails": 6,
    "VP": 6,
    "discrete": 6,
}

# Looks of one training step, and copies to the device: of the places of the rows; of flips; of what else an augmentation has
# drawn. A step also looks at its noise levels and weights.
STEPS = {
    "perceptron": (8, 1),
    "unet": (9, 2),
    "augmented": (9, 7),
    "conditional": (9, 1),
    "accumulated": (15, 2),
    "DSM": (3, 1),
}

# Network evaluations of each step of a sampler.
SAMPLERS = {
    "euler": 1,
    "heun": 2,
    "dpmpp_2m": 1,
    "ancestral": 1,
    "dpmpp_2m_sde": 1,
    "euler_maruyama": 1,
    "predictor_corrector": 2,
}
