"""The commands of ``qtrain COMMAND``. One file a command, imported only when it is called.

A command module has

    CONFIG              the name of its primary config in configs/
    check(cfg) -> None  refuses what cannot run (ValueError, TypeError), cheaply: it may import torch, not lightning
    run(cfg) -> int     the exit code

and may have ``POSITIONAL``, the key that a bare word sets (``qtrain bench step`` is ``what=step``), and
``FORWARDS``, bare words that take the rest of the command line as it is: {word: function(arguments) -> int}.
"""

ENTRIES: dict[str, tuple[str, str]] = {
    "train": ("qtrain.commands.train", "pre-train a model; with -m, every combination of a sweep"),
    "status": (
        "qtrain.commands.status",
        "how far runs and sweeps are, what failed and why, when they are done",
    ),
    "prepare": ("qtrain.commands.prepare", "tokenize a corpus ahead of a run"),
    "evaluate": ("qtrain.commands.evaluate", "measure the loss of a trained model on held-out text"),
    "generate": ("qtrain.commands.generate", "continue a text with a trained model"),
    "export": ("qtrain.commands.export", "write a trained run as a model folder of Hugging Face's layout"),
    "analyze": ("qtrain.commands.analyze", "gradients and sharpness at a checkpoint, under any recipes"),
    "verify": ("qtrain.commands.verify", "measure what papers claim of low-precision training"),
    "ladder": ("qtrain.commands.ladder", "which rung of a ladder of precisions to adopt, on one page"),
    "compare": ("qtrain.commands.compare", "hold runs against a baseline: gaps, stability, verdicts, gates"),
    "doctor": ("qtrain.commands.doctor", "what this machine has, what is missing and how to get it"),
    "bench": ("qtrain.commands.bench", "time a training step (bench step) or a kernel (bench kernels)"),
}
"""Command -> (module, what it does in one line)."""
