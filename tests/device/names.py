"""What the scenarios on the far device are called, and what each of them may wait for."""

# Looks of one call of a target, however many chunks its references take. Of a whole pool: at all that the values of the
# arguments must meet; which rows are in the band; whether the samples are the pool's, and the rows in the band are sound;
# which rows have small noise. References from the batch are no samples, but have norms of their own. One more where labels
# are to fit, where rows are alone, and where mirror images may have small noise, too; two more where references are drawn.
TARGETS = {
    "pool": 5,
    "floats": 5,
    "far from zero": 5,
    "in batch": 5,
    "DSM": 1,
    "groups": 6,
    "mirrored": 6,
    "flips": 5,
    "alone": 6,
    "drawn": 7,
    "capacity": 5,
    "heavy tails": 5,
    "VP": 5,
    "discrete": 5,
}

# Looks of one training step, and copies to the device: of the places of the rows; of flips; of what else an augmentation has
# drawn. A step also looks at its noise levels and weights.
STEPS = {
    "perceptron": (7, 1),
    "unet": (8, 2),
    "augmented": (8, 7),
    "conditional": (8, 1),
    "accumulated": (13, 2),
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
