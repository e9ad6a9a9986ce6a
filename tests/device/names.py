"""What the scenarios on the far device are called, and what each of them may wait for."""

# What one call of a target waits for, however many chunks its references take: once for all that the host has to know of
# the rows; and, with references, once to compare samples with those of the pool, or to learn where the batch itself lies.
# Two more where references are drawn.
TARGETS = {
    "pool": 2,
    "floats": 2,
    "far from zero": 2,
    "in batch": 2,
    "in batch, far from zero": 3,
    "DSM": 1,
    "groups": 2,
    "by label": 2,
    "mirrored": 2,
    "flips": 2,
    "source_only": 2,
    "drawn": 4,
    "capacity": 2,
    "heavy tails": 2,
    "VP": 2,
    "discrete": 2,
}
# Operations that a call launches at most, with all references in one chunk: each takes some microseconds of the host.
LAUNCHES = {"DSM": 40, "pool": 300, "mirrored": 480, "by label": 800}

# Waits of one training step: looks, copies to the device (of what an augmentation has drawn), and copies from it. Beside
# the target's, a step looks at its weights.
STEPS = {
    "perceptron": (2, 0, 1),
    "unet": (2, 0, 1),
    "augmented": (2, 3, 1),
    "conditional": (2, 0, 1),
    "accumulated": (4, 0, 2),
    "DSM": (1, 0, 1),
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
