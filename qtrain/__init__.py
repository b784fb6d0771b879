"""qtrain: pre-train transformer language models with quantized weights, activations, gradients and
optimizer states.

The rooms are imported where they are used (``qtrain.quant``, ``qtrain.nn``, ``qtrain.optim``, ...), so that
``import qtrain`` costs nothing and pulls in no logger, no trainer and no dataset library.
"""

__version__ = "0.1.0"
