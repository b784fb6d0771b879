"""Every threshold at which something is said of a run: by the verdicts of ``compare`` (``health.py``, ``blame.py``), by the
alarms of the instruments, and by both where they ask the same. What is measured, over which window, is defined where it
is measured (``spikes.py``, ``curve_scores.py``, ``tensor_statistics.py``).
"""

from __future__ import annotations

import math

# Of a robust score, in standard deviations of a Gaussian: a spike
SPIKE_SCORE = 8.0
# Of loss and gradient norm in the same step: each alone may reach this by chance
JOINT_SCORE = 6.0
# Of the mean and standard deviation before (OLMo 2, arXiv 2501.00656)
SIGMAS = 7.0
# OLMo 2 counts 0.40 % of steps of the gradient norm as spikes before its new initialization, and 0.03 % after: between them
SPIKE_SHARE = 0.001
# One lone loss spike is a batch of odd text; with the gradient, or a second time, it is the run's
LONE_SPIKES = 1

# Nats a token of the loss above the least that it has been: of a model that forgot what it knew: noise between steps is a tenth of it, between
# validations a hundredth
DIVERGED_NATS = 0.5
# In a row, for the alarm of a run that lives: as long as the window of a robust score, so that a spike that recovers
# within it is a spike
DIVERGED_STEPS = 100
# Nats: a loss that has fallen by less does not learn. Unigram counts alone are worth ln 257 - 3.2 = 2.3 nats of bytes
LEARNED_NATS = 0.1
# Of steps whose gradient is longer than the clip: a gradient that is clipped more often is led by the clip
CLIP_SHARE = 0.05
# A share of fewer steps is no share: the first steps of a warm-up are often clipped
CLIP_LEAST_STEPS = 100

# SQNR of an operand below which it loses much of what it carries (below 0 dB it is more noise than signal): the best sign quantizer of a Laplace distribution: E|x|^2 / E x^2 = 1/2
LOW_FORWARD_DB = 10 * math.log10(2)
# Of gradients: below |g| = sqrt(3) |noise| quantized training stops helping ("FP4 All the Way", arXiv 2505.19115, section 5)
LOW_GRADIENT_DB = 10 * math.log10(3)
# The same of a weight gradient: std(g) / (sqrt(3) std(noise))
NOISE_FLOOR = 1.0
# A fall of the SQNR by more than this points at an operand: half a bit (6.02 dB a bit)
FALL_DB = 3.0

# Attention logits above this saturate softmax (arXiv 2302.05442, section 2.2: logits grew beyond, and training diverged;
# where Kimi K2 begins to shrink queries and keys, arXiv 2507.20534, section 2.1)
MAX_LOGIT = 100.0
# Samples of an instrument of which the median is the run's, and not a moment's
LEAST_SAMPLES = 3
# Nearly no code of a moment changes from step to step: of 8-bit EMA states with beta 0.95 several percent always do
STALLED_SHARE = 0.99
# Second moments that decode to 0 while they are above it (arXiv 2309.01507, section 3); a share that a tensor may have by chance
ZERO_BIN = 0.001
